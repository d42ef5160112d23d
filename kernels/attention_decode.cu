// Attention of the last few tokens of each sequence over keys and values in pages: decoding.
//
// Bound by memory: each key and value is read once, for all query heads that share it and all of a sequence's query tokens.
// Adds to attention_hopper: a page table; packed queries (row `head of the group * tokens + token` of a tile); work cut by
// keys alone. The keys of all sequences and heads lie end to end as units of UNIT_KEYS, and each block takes as many of them
// as any other, wherever sequences begin and end.
// Slow at: many query tokens, for which there is attention_hopper: all 64 rows of a tile are multiplied, used or not.
//
// Roles: the producer, one warp, looks pages up and copies them into two rings. NUM_CONSUMERS warpgroups take units in turn;
// what they have of a head, when the block's units of it are done, is a part, which goes to global memory. The combiner, three
// warps, counts the units that are accounted for, and combines a head's parts once all are.
//
// With FLASHCORE_MASKS there are other masks than the causal one (masks.cuh); units wholly before a window are not there at all.
// With FLASHCORE_INVARIANT the bits of a row are those that it has in any other call (chunks.cuh, decode_chunks.cuh).
//
// Variants: head_dim 64 128, dtype float16 bfloat16
#include "online_softmax.cuh"
#include "paged.cuh"
#include "warpgroup_tile.cuh"

#ifdef FLASHCORE_INVARIANT
constexpr int UNIT_KEYS = LAW_TILE, UNIT_SHIFT = 6;
#else
constexpr int UNIT_KEYS = HEAD_DIM == 64 ? 128 : 64;
constexpr int UNIT_SHIFT = HEAD_DIM == 64 ? 7 : 6;
#endif
static_assert(UNIT_KEYS == 1 << UNIT_SHIFT, "a unit is a page, or part of one, or several");
constexpr int TILE_ROWS = WARPGROUP_ROWS;
constexpr int NUM_CONSUMERS = 2;
constexpr int CONSUMER_THREADS = NUM_CONSUMERS * WARPGROUP;
constexpr int COMBINER_THREADS = 3 * WARP;
constexpr int THREADS = CONSUMER_THREADS + WARP + COMBINER_THREADS;
// Registers a thread. A block starts with the same for all; then the others give up what the consumers take.
constexpr int LAUNCH_REGISTERS = 64 * 1024 / THREADS / 8 * 8;
constexpr int OTHER_REGISTERS = 120;
constexpr int CONSUMER_REGISTERS =
    (LAUNCH_REGISTERS * THREADS - OTHER_REGISTERS * WARPGROUP) / CONSUMER_THREADS / 8 * 8;
constexpr int UNIT_BYTES = UNIT_KEYS * HEAD_DIM * sizeof(Element);
#ifdef FLASHCORE_INVARIANT
constexpr int NUM_SLOTS = HEAD_DIM == 64 ? 12 : 6;     // each warpgroup has a chunk of its own, and half of them
#else
constexpr int NUM_SLOTS = 4;                           // units of K, and of V, under way: more only make the rest wait
#endif
// A warpgroup that waits for a slot's next round must have seen the last one, or it would take an old one for it.
static_assert(NUM_SLOTS % NUM_CONSUMERS == 0, "a slot is always taken by the same warpgroup");
static_assert(NUM_CONSUMERS == 2, "one warpgroup lends what it has of a head to the other");
constexpr int MAX_HEADS = 6144;                        // of K and V, of all sequences, each with its tiles of query rows
constexpr int MOST_BOXES = UNIT_KEYS / SMALLEST_PAGE;  // pieces of a unit that may lie in different pages
constexpr int PARTS_AT_ONCE = 8;                       // read before any is used, when parts are combined
constexpr int PARTS_UNDER_WAY = 4;                     // between consumers and combiner
constexpr int CONSUMER_BARRIER = 1, COMBINER_BARRIER = CONSUMER_BARRIER + NUM_CONSUMERS;  // named barriers

// What the host adds: room for parts, and how a call is cut.
struct DecodeParams {
  float* accum_gmem;     // [parts, tile rows, HEAD_DIM]
  float2* softmax_gmem;  // [parts, tile rows]: reference and row sum
  int* accounted_gmem;   // [heads]: units that are done; zero before a call and after it
  int heads_a_tile;      // query heads of a group that a tile holds
  int tiles_a_group;
};

// What the producer tells of a unit.
struct Unit {
  int number;        // of its head; NO_MORE after the last unit
  int index;         // in that head
  int sequence;      // of that head, in the block
  int taken;         // units that the block has of the head
  bool begins, ends; // of those, the first or last one of the warpgroup that takes it
  bool closes;       // the last one of them all
  bool whole;        // every query sees all its keys
  int position[MOST_BOXES];  // of the first key of each box
};
constexpr int NO_MORE = -1;

// A part that is complete: a head, and how many units of it the block had.
struct Part {
  int number, taken;
};

#ifndef FLASHCORE_INVARIANT
// What a warpgroup has of a head, by thread, for the other one to add.
struct Loan {
  float o[OUTPUTS][WARPGROUP];
  float2 softmax[2][WARPGROUP];  // of a thread's two rows: reference and row sum
};
#endif

struct SharedMemory {
  alignas(1024) unsigned char k[NUM_SLOTS][UNIT_BYTES];  // [column block][row][64 columns], swizzled
  alignas(1024) unsigned char v[NUM_SLOTS][UNIT_BYTES];
  Unit unit[2][NUM_SLOTS];        // by round: the last one's V is still wanted when K of this one comes
  int first_unit[MAX_HEADS + 1];  // of each head
  int sums[THREADS / WARP];
#ifndef FLASHCORE_INVARIANT
  Loan loan;
#endif
  Part part[PARTS_UNDER_WAY];
#ifdef FLASHCORE_INVARIANT
  int completed;  // a head whose parts are all there
#else
  bool combines;
#endif
#ifndef FLASHCORE_INVARIANT
  Mbarrier loan_full, loan_empty;
#endif
  Mbarrier k_full[NUM_SLOTS], k_empty[NUM_SLOTS];
  Mbarrier v_full[NUM_SLOTS], v_empty[NUM_SLOTS];
  Mbarrier part_full[PARTS_UNDER_WAY], part_empty[PARTS_UNDER_WAY];
};
static_assert(sizeof(SharedMemory) <= SHARED_LIMIT, "a block has 227 KB of shared memory");

extern "C" __device__ const LaunchShape attention_decode_shape = {TILE_ROWS, UNIT_KEYS, THREADS, sizeof(SharedMemory),
                                                                  NUM_CONSUMERS, 1};

// Where a ring of slots stands: which slot, and in which round.
struct RingPosition {
  int slot = 0;
  unsigned parity = 0;

  __device__ void advance(int slots = 1) {
    slot += slots;
    if (slot >= NUM_SLOTS) {
      slot -= NUM_SLOTS;
      parity ^= 1;
    }
  }
};

// A head of K and V of a sequence, and the query heads of a tile that share it.
struct Head {
  int batch, head_kv, first_head, heads;

  __device__ Head(const AttentionParams& params, const DecodeParams& decode, int number) {
    const int group = params.num_heads_q / params.num_heads_kv;
    const int flat = number / decode.tiles_a_group, tile = number - flat * decode.tiles_a_group;
    batch = flat / params.num_heads_kv;
    head_kv = flat - batch * params.num_heads_kv;
    first_head = head_kv * group + tile * decode.heads_a_tile;
    heads = min(decode.heads_a_tile, group - tile * decode.heads_a_tile);
  }
};

// How units are shared out: `few` to each block, and one more to the first `longer` blocks.
struct Shares {
  int few, longer;

  __device__ explicit Shares(int units) : few(units / static_cast<int>(gridDim.x)), longer(units - few * gridDim.x) {}
  __device__ int begin(int block) const { return block * few + min(block, longer); }
  __device__ int block_of(int unit) const {
    const int in_longer = longer * (few + 1);
    return unit < in_longer ? unit / (few + 1) : longer + (unit - in_longer) / few;
  }
};

#ifdef FLASHCORE_MASKS
// Units of a sequence that no query sees, since its window begins after them. On a list of selected pages all count.
__device__ __forceinline__ int units_before(const AttentionParams& params, const PagedParams& paged, const MaskParams& masks,
                                            int batch) {
  if (!HAS_WINDOW || paged.selected_gmem != nullptr) return 0;
  return seen_by(masks, 0, params.seqlen_q, paged.lengths_gmem[batch]).begin / UNIT_KEYS;
}
#endif

// Units of a head; one without keys has one unit without keys.
__device__ __forceinline__ int units_of(const AttentionParams& params, const PagedParams& paged, const DecodeParams& decode,
                                        int number MASKED(, const MaskParams& masks)) {
  const Head head(params, decode, number);
  const int keys = listed_keys(paged, params.num_heads_kv, head.batch, head.head_kv);
  return max(1, (keys + UNIT_KEYS - 1) / UNIT_KEYS MASKED(- units_before(params, paged, masks, head.batch)));
}

// Where each head's units begin, by all threads; the number of all units.
__device__ __forceinline__ int lay_out_units(SharedMemory& smem, const AttentionParams& params, const PagedParams& paged,
                                             const DecodeParams& decode, int num_heads MASKED(, const MaskParams& masks)) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int heads_a_thread = (num_heads + THREADS - 1) / THREADS;
  const int first = threadIdx.x * heads_a_thread, end = min(num_heads, first + heads_a_thread);
  int units = 0;  // of the thread's heads
#pragma unroll 2
  for (int number = first; number < end; ++number) units += smem.first_unit[number] = units_of(params, paged, decode, number MASKED(, masks));
  int up_to = units;  // the sum over the warp's lanes up to this one
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    const int other = __shfl_up_sync(~0u, up_to, step);
    if (lane >= step) up_to += other;
  }
  if (lane == WARP - 1) smem.sums[warp] = up_to;
  __syncthreads();
  int all = 0, before = up_to - units;
#pragma unroll
  for (int w = 0; w < THREADS / WARP; ++w) {
    if (w < warp) before += smem.sums[w];
    all += smem.sums[w];
  }
  for (int number = first; number < end; ++number) {
    const int own = smem.first_unit[number];
    smem.first_unit[number] = before;
    before += own;
  }
  if (threadIdx.x == 0) smem.first_unit[num_heads] = all;
  __syncthreads();
  return all;
}

// The head that a unit belongs to.
__device__ __forceinline__ int head_of(const SharedMemory& smem, int num_heads, int unit) {
  int low = 0, high = num_heads;  // first_unit[low] <= unit < first_unit[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (smem.first_unit[middle] <= unit ? low : high) = middle;
  }
  return low;
}

// Row `row` of a head's tile of Q.
__device__ __forceinline__ const Element* q_row(const AttentionParams& params, const Head& head, int row) {
  return params.q_gmem + head.batch * params.q.batch + (head.first_head + row / params.seqlen_q) * params.q.head +
         row % params.seqlen_q * params.q.row;
}

// ---------------------------------------------------------------------------------------------------- the producer

// Bring a head's tile of Q closer: the consumers would wait for it behind all the copies under way.
__device__ __forceinline__ void prefetch_q(const AttentionParams& params, const Head& head) {
  for (int row = 0; row < head.heads * params.seqlen_q; ++row)
#pragma unroll
    for (int column = 0; column < HEAD_DIM; column += 64) prefetch_l2(q_row(params, head, row) + column);
}

// What is looked up of a box: the keys of a unit that lie in one page. Nothing is made of it before its time comes, so that
// nobody waits for the loads.
struct Lookup {
  int number, head_kv;  // of its head, and head of K and V
  int key;              // the box's first, on the list of its head
  int page, pool_page;  // of the sequence, and what the table says of it
  int length;           // tokens of the sequence
};

// The box that starts `keys` into a unit.
__device__ __forceinline__ Lookup look_up(const SharedMemory& smem, const AttentionParams& params, const PagedParams& paged,
                                          const DecodeParams& decode, int num_heads, int unit,
                                          int keys MASKED(, const MaskParams& masks)) {
  Lookup box;
  box.number = head_of(smem, num_heads, unit);
  const Head head(params, decode, box.number);
  box.head_kv = head.head_kv;
  box.key = (unit - smem.first_unit[box.number] MASKED(+ units_before(params, paged, masks, head.batch))) * UNIT_KEYS + keys;
  box.page = listed_page(paged, params.num_heads_kv, head.batch, head.head_kv, box.key);
  box.pool_page = paged.page_table_gmem[Index(head.batch) * paged.table_stride + max(0, min(box.page, paged.table_stride - 1))];
  box.length = paged.lengths_gmem[head.batch];
  return box;
}

#ifdef FLASHCORE_INVARIANT
#include "decode_chunks.cuh"
#else
// One warp: the block's units, as room becomes free. Each lane looks up one box, a warp's worth of them ahead.
__device__ __forceinline__ void produce(SharedMemory& smem, const AttentionParams& params, const PagedParams& paged,
                                        const DecodeParams& decode, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                        const Shares& shares, int num_heads MASKED(, const MaskParams& masks)) {
  const int lane = threadIdx.x % WARP;
  const int box_keys = min(UNIT_KEYS, 1 << paged.page_shift), boxes = UNIT_KEYS / box_keys;
  const int units_ahead = WARP / boxes;
  const int begin = shares.begin(blockIdx.x), end = shares.begin(blockIdx.x + 1);
  const auto look = [&](int unit) {
    return look_up(smem, params, paged, decode, num_heads, min(unit + lane / boxes, end - 1),
                   lane % boxes * box_keys MASKED(, masks));
  };

  RingPosition at;
  int sequence = -1;  // of the last head
  Lookup next_box = {};
  if (begin < end) next_box = look(begin);
  for (int unit = begin; unit < end;) {
    const Lookup box = next_box;
    const int batch_end = min(end, unit + units_ahead);
#ifdef FLASHCORE_MASKS
    const int own_unit = min(unit + lane / boxes, end - 1);
    const bool begins = lane % boxes == 0 && (own_unit == smem.first_unit[box.number] || unit == begin && lane == 0);
    const Span of_first = seen_by(masks, 0, params.seqlen_q, box.length);
    const Span of_last = seen_by(masks, params.seqlen_q - 1, params.seqlen_q, box.length);
#else
    const bool begins = lane % boxes == 0 && (box.key == 0 || unit == begin && lane == 0);
#endif

    // A box that is not there has page -1, which the tensor copies fill with zeros.
    const int own_position = (box.page << paged.page_shift) + (box.key & ((1 << paged.page_shift) - 1));
    const bool is_there = box.page >= 0 && box.pool_page >= 0 && own_position < box.length;
    const int own_pool_page = is_there ? box.pool_page : -1;
#ifdef FLASHCORE_MASKS
    const bool is_whole = is_there && (HAS_SOFTCAP || params.softmax_scale >= 0.f) && own_position >= of_last.begin &&
                          own_position + box_keys <= of_first.end;
#else
    const bool is_whole = is_there && params.softmax_scale >= 0.f &&
                          own_position + box_keys <= visible_positions(params, box.length, 0);
#endif
    const unsigned whole = __ballot_sync(~0u, is_whole);
    for (int i = 0; unit < batch_end; ++i, ++unit, at.advance()) {
      const int from = i * boxes + lane % boxes;
      const int pool_page = __shfl_sync(~0u, own_pool_page, from);
      const int position = __shfl_sync(~0u, is_there ? own_position : NO_POSITION, from);
      const int head_kv = __shfl_sync(~0u, box.head_kv, from), number = __shfl_sync(~0u, box.number, from);
      const unsigned own = ((1u << boxes) - 1) << i * boxes;
      const int row = position & ((1 << paged.page_shift) - 1), into = lane * box_keys * ROW_BYTES;
      mbarrier_wait(&smem.k_empty[at.slot], at.parity ^ 1);
      Unit& info = smem.unit[at.parity][at.slot];
      if (lane < boxes) info.position[lane] = position;
      const int head_begin = max(begin, smem.first_unit[number]);
      const int since = unit - head_begin, left = min(end, smem.first_unit[number + 1]) - unit;
      if (since == 0) ++sequence;
      if (lane == 0) {
        info.number = number;
        info.index = unit - smem.first_unit[number];
#ifdef FLASHCORE_MASKS
        TRACE(info.index += units_before(params, paged, masks, Head(params, decode, number).batch);)
#endif
        info.sequence = sequence;
        info.taken = since + left;
        info.begins = since < NUM_CONSUMERS;
        info.ends = left <= NUM_CONSUMERS;
        info.closes = left == 1;
        info.whole = (whole & own) == own;
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive_expect_tx(&smem.k_full[at.slot], UNIT_BYTES);
      __syncwarp();
      if (lane < boxes) {
#pragma unroll
        for (int block = 0; block < COLUMN_BLOCKS; ++block)
          tma_load_4d(smem.k[at.slot] + block * UNIT_KEYS * ROW_BYTES + into, k_map, &smem.k_full[at.slot],
                      block * BLOCK_COLUMNS, row, head_kv, pool_page);
      }
      mbarrier_wait(&smem.v_empty[at.slot], at.parity ^ 1);
      if (lane == 0) mbarrier_arrive_expect_tx(&smem.v_full[at.slot], UNIT_BYTES);
      __syncwarp();
      if (lane < boxes) {
#pragma unroll
        for (int block = 0; block < COLUMN_BLOCKS; ++block)
          tma_load_4d(smem.v[at.slot] + block * UNIT_KEYS * ROW_BYTES + into, v_map, &smem.v_full[at.slot],
                      block * BLOCK_COLUMNS, row, head_kv, pool_page);
      }
      if (i == 0) {
        if (begins) prefetch_q(params, Head(params, decode, box.number));
        // What comes after this batch is looked up now, and used when the batch has been copied.
        if (batch_end < end) next_box = look(batch_end);
      }
    }
  }
  for (int consumer = 0; consumer < NUM_CONSUMERS; ++consumer, at.advance()) {
    mbarrier_wait(&smem.k_empty[at.slot], at.parity ^ 1);
    if (lane == 0) {
      smem.unit[at.parity][at.slot].number = NO_MORE;
      smem.unit[at.parity][at.slot].sequence = sequence + 1;
      mbarrier_arrive(&smem.k_full[at.slot]);
    }
  }
}
#endif

// ---------------------------------------------------------------------------------------------------- the consumer

// Positions of a unit's keys, of which a query sees those below a limit.
struct UnitPositions {
  const int* first;  // of each box
  int box_shift;
  MASKED(const int (&begin)[2];)  // of a thread's two rows, as they are when asked: a query sees none before it

  __device__ int at(int column) const { return first[column >> box_shift] + (column & ((1 << box_shift) - 1)); }
};

// Scores as the softmax wants them: the sign of the scale in them, and minus infinity where a row does not see the key.
template <int SCORES>
__device__ __forceinline__ void sign_and_mask(float (&s)[SCORES], float scale, const int (&limit)[2],
                                              const UnitPositions& positions, int lane) {
#pragma unroll
  for (int i = 0; i < SCORES; ++i) {
    const float score = scale < 0.f MASKED(&& !HAS_SOFTCAP) ? -s[i] : s[i];
    s[i] = positions.at(column_of(i, lane)) < limit[row_of(i)] ? score : -INFINITY;
    MASKED(if (positions.at(column_of(i, lane)) < positions.begin[row_of(i)]) s[i] = -INFINITY;)
  }
}

// Rows of Q as wgmma takes its left operand from registers: of each step of 16 columns, two neighbours of row lane / 4 and
// two of row lane / 4 + 8, and again eight columns on. A row that no query fills is zero.
constexpr int Q_REGISTERS = HEAD_DIM / DEPTH * 4;
__device__ __forceinline__ void load_q(unsigned (&q)[Q_REGISTERS], const AttentionParams& params, const Head& head, int row,
                                       int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool exists = row + 8 * r < head.heads * params.seqlen_q;
    const Element* row_gmem = q_row(params, head, row + 8 * r) + lane % 4 * 2;
#pragma unroll
    for (int i = r; i < Q_REGISTERS; i += 2) q[i] = exists ? *reinterpret_cast<const unsigned*>(row_gmem + i / 2 * 8) : 0;
  }
}

#ifdef FLASHCORE_TRACE
__device__ __forceinline__ AccumulatorTrace traced_rows(const TraceBuffers& trace, const AttentionParams& params,
                                                        const Head& head, const int (&limit)[2], int row, int lane,
                                                        int first_key MASKED(, const MaskParams& masks, const int (&begin)[2])) {
  const auto stages_of = [&](int r) {
    return TraceRow(trace, params, head.batch, head.first_head + r / params.seqlen_q, r % params.seqlen_q);
  };
  const int rows = head.heads * params.seqlen_q;
#ifdef FLASHCORE_MASKS
  AccumulatorTrace stages(stages_of(row), stages_of(row + 8), {row < rows, row + 8 < rows}, limit, lane, first_key);
  for (int r = 0; r < 2; ++r) {
    stages.begins[r] = begin[r];
    if (begin[r] >= limit[r]) stages.visible[r] = 0;
  }
  if (HAS_SOFTCAP && params.softmax_scale != 0.f) stages.by_scale = masks.softcap / fabsf(params.softmax_scale);
  return stages;
#else
  return AccumulatorTrace(stages_of(row), stages_of(row + 8), {row < rows, row + 8 < rows}, limit, lane, first_key);
#endif
}
#endif

#ifndef FLASHCORE_INVARIANT
// Tell the combiner of a part, after those before it; by all threads of the consumer.
__device__ __forceinline__ void pass_on(SharedMemory& smem, int sequence, const Part& part) {
  const int entry = sequence % PARTS_UNDER_WAY;
  mbarrier_wait(&smem.part_empty[entry], sequence / PARTS_UNDER_WAY % 2 ^ 1);
  if (threadIdx.x % WARPGROUP == 0) smem.part[entry] = part;
  __syncwarp();
  if (threadIdx.x % WARP == 0) mbarrier_arrive(&smem.part_full[entry]);
}

// Leave what this warpgroup has of a head.
__device__ __forceinline__ void lend(Loan& loan, const float (&o)[OUTPUTS], const float (&reference)[2],
                                     const float (&row_sum)[2]) {
  const int thread = threadIdx.x % WARPGROUP;
#pragma unroll
  for (int i = 0; i < OUTPUTS; ++i) loan.o[i][thread] = o[i];
#pragma unroll
  for (int r = 0; r < 2; ++r) loan.softmax[r][thread] = make_float2(reference[r], row_sum[r]);
}

// O, and its rows' softmax, with what the other warpgroup left: both brought to the higher reference.
__device__ __forceinline__ void add_loan(const Loan& loan, float (&o)[OUTPUTS], float (&reference)[2], float (&row_sum)[2]) {
  const int thread = threadIdx.x % WARPGROUP;
  float own_weight[2], weight[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float2 other = loan.softmax[r][thread];
    const bool own_keys = row_sum[r] != 0.f, other_keys = other.y != 0.f;  // none, and the reference means nothing
    const float highest = own_keys && other_keys ? fmaxf(reference[r], other.x) : own_keys ? reference[r] : other.x;
    own_weight[r] = own_keys ? ex2_approx(reference[r] - highest) : 0.f;
    weight[r] = other_keys ? ex2_approx(other.x - highest) : 0.f;
    reference[r] = highest;
    row_sum[r] = row_sum[r] * own_weight[r] + other.y * weight[r];
  }
#pragma unroll
  for (int i = 0; i < OUTPUTS; ++i) o[i] = o[i] * own_weight[row_of(i)] + loan.o[i][thread] * weight[row_of(i)];
}
#endif

// One warpgroup: every NUM_CONSUMERS-th unit of the ring. Of a head's units that the block has, the warpgroup with the last
// one adds what the other has, so that they make one part.
__device__ __forceinline__ void consume(SharedMemory& smem, const AttentionParams& params, const PagedParams& paged,
                                        const DecodeParams& decode MASKED(, const MaskParams& masks) TRACE_PARAM) {
  const int consumer = uniform(threadIdx.x / WARPGROUP);
  const int warp = threadIdx.x / WARP % 4;
  const int lane = threadIdx.x % WARP;
  const int tile_rows = decode.heads_a_tile * params.seqlen_q;
  const int row = warp * 16 + lane / 4;  // a thread's other row is row + 8
  const bool has_rows = warp * 16 < tile_rows;
  const int box_shift = min(paged.page_shift, UNIT_SHIFT);
  const MatrixDescriptor k_ring(smem.k[0], 0), v_ring(smem.v[0], UNIT_KEYS * ROW_BYTES);
  float s[UNIT_KEYS / 2], o[OUTPUTS];
  unsigned q[Q_REGISTERS] = {}, p[UNIT_KEYS / 4] = {};  // P stays zero in a warp without rows
  Softmax softmax(MASKED(HAS_SOFTCAP ? masks.softcap :) params.softmax_scale);
  int length = 0, limit[2] = {} MASKED(, begin[2] = {});
#ifdef FLASHCORE_INVARIANT
  int parts = 0;
#else
  unsigned loans = 0;
#endif
  RingPosition at;
  TRACE(int first_key = 0;)

  for (at.advance(consumer);; at.advance(NUM_CONSUMERS)) {
    const int slot = uniform(at.slot);
    mbarrier_wait(&smem.k_full[slot], at.parity);
    const Unit& unit = smem.unit[at.parity][slot];
#ifdef FLASHCORE_INVARIANT
    const int number = unit.number, taken = unit.taken, index = unit.index;
    const bool whole = unit.whole, ends = unit.ends;
#else
    const int number = unit.number, taken = unit.taken, sequence = unit.sequence;
    const bool whole = unit.whole, ends = unit.ends, closes = unit.closes;
#endif
    const UnitPositions positions = {unit.position, box_shift MASKED(, begin)};
    if (number == NO_MORE) {
#ifdef FLASHCORE_INVARIANT
      pass_on(smem, consumer, parts, {NO_MORE, 0});
#else
      if (consumer == 0) pass_on(smem, sequence, {NO_MORE, 0});
#endif
      return;
    }
    if (unit.begins) {
      const Head head(params, decode, number);
      length = paged.lengths_gmem[head.batch];
      load_q(q, params, head, row, lane);
      softmax = Softmax(MASKED(HAS_SOFTCAP ? masks.softcap :) params.softmax_scale);
#pragma unroll
      for (int i = 0; i < OUTPUTS; ++i) o[i] = 0.f;
#pragma unroll
      for (int r = 0; r < 2; ++r) limit[r] = visible_positions(params, length, (row + 8 * r) % params.seqlen_q);
#ifdef FLASHCORE_MASKS
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Span span = seen_by(masks, (row + 8 * r) % params.seqlen_q, params.seqlen_q, length);
        begin[r] = span.begin;
        limit[r] = span.end;
      }
#endif
      TRACE(first_key = unit.index * UNIT_KEYS;)
    }
    TRACE(const int page = unit.index;)
    TRACE(const AccumulatorTrace stages = traced_rows(trace, params, Head(params, decode, number), limit, row, lane,
                                                     first_key MASKED(, masks, begin));)

    // S = Q @ K^T
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < HEAD_DIM / DEPTH; ++step) {
      const int block = step / (BLOCK_COLUMNS / DEPTH), bytes = step % (BLOCK_COLUMNS / DEPTH) * DEPTH * 2;
      Wgmma<UNIT_KEYS>::registers<true>(s, &q[4 * step],
                                        k_ring.at(slot * UNIT_BYTES + block * UNIT_KEYS * ROW_BYTES + bytes), step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(&smem.k_empty[slot]);
    MASKED(if (HAS_SOFTCAP) cap(s, masks.scale_by_cap);)
    if (!whole) sign_and_mask(s, params.softmax_scale, limit, positions, lane);
    if (has_rows) softmax.next(s, p, o);
    TRACE(if (has_rows) stages.page(page, UNIT_KEYS, s, p, softmax);)
    // O += P @ V
    mbarrier_wait(&smem.v_full[slot], at.parity);
    if (!whole)
      clear_rows<UNIT_KEYS>(smem.v[slot], CONSUMER_BARRIER + consumer, [&](int i) { return positions.at(i) >= length; });
    wgmma_fence();
    multiply_p_v(o, p, v_ring.at(slot * UNIT_BYTES), true);
    wgmma_commit();
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(&smem.v_empty[slot]);
    TRACE(if (has_rows) stages.accum(page, o);)
    if (!ends) continue;

    float row_sum[2] = {quad_sum(softmax.row_sum[0]), quad_sum(softmax.row_sum[1])};
#ifndef FLASHCORE_INVARIANT
    if (taken > 1) {
      const unsigned parity = loans++ % 2;
      mbarrier_wait(closes ? &smem.loan_full : &smem.loan_empty, closes ? parity : parity ^ 1);
      if (has_rows && closes) add_loan(smem.loan, o, softmax.reference, row_sum);
      if (has_rows && !closes) lend(smem.loan, o, softmax.reference, row_sum);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(closes ? &smem.loan_empty : &smem.loan_full);
      if (!closes) continue;
    }
#endif
    if (has_rows) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + 8 * r >= tile_rows) continue;
#ifdef FLASHCORE_INVARIANT
        const Index part_row = (Index(number) * most_chunks(paged) + chunk_of(index)) * tile_rows + row + 8 * r;
#else
        const Index part_row = Index(number + static_cast<int>(blockIdx.x)) * tile_rows + row + 8 * r;
#endif
        if (lane % 4 == 0) __stcg(&decode.softmax_gmem[part_row], make_float2(softmax.reference[r], row_sum[r]));
#pragma unroll
        for (int i = 2 * r; i < OUTPUTS; i += 4)
          __stcg(reinterpret_cast<float2*>(decode.accum_gmem + part_row * HEAD_DIM + column_of(i, lane)),
                 make_float2(o[i], o[i + 1]));
      }
    }
#ifdef FLASHCORE_INVARIANT
    pass_on(smem, consumer, parts++, {number, taken});
#else
    pass_on(smem, sequence, {number, taken});
#endif
  }
}

// ---------------------------------------------------------------------------------------------------- the combiner

// out = sum of w * O over the parts of a head, by the sum of w * l; w = exp2(m - largest m)
__device__ __forceinline__ void combine(const SharedMemory& smem, const AttentionParams& params, const DecodeParams& decode,
                                        const Shares& shares, int number,
                                        int thread INVARIANT(, const PagedParams& paged) MASKED(, const MaskParams& masks)) {
  constexpr int PIECE = 8;  // columns of a thread: 16 bytes of output
  constexpr int PIECES = HEAD_DIM / PIECE;
  const Head head(params, decode, number);
  const int tile_rows = decode.heads_a_tile * params.seqlen_q;
#ifdef FLASHCORE_INVARIANT
  const int before = 0 MASKED(+ units_before(params, paged, masks, head.batch));
  const int last = before + smem.first_unit[number + 1] - smem.first_unit[number] - 1;
  const int first_part = number * most_chunks(paged) + chunk_of(before);
  const int end_part = number * most_chunks(paged) + chunk_of(last) + 1;
#else
  // Shares lie end to end as heads do, so that a head's parts do too.
  const int first_part = number + shares.block_of(smem.first_unit[number]);
  const int end_part = number + shares.block_of(smem.first_unit[number + 1] - 1) + 1;
#endif
  for (int i = thread; i < head.heads * params.seqlen_q * PIECES; i += COMBINER_THREADS) {
    const int row = i / PIECES, column = i % PIECES * PIECE;
    float reference = -INFINITY, row_sum = 0.f, out[PIECE] = {};
    INVARIANT(ChunkSum sum;)
    for (int first = first_part; first < end_part; first += PARTS_AT_ONCE) {
      float2 softmax[PARTS_AT_ONCE];
      float4 accum[PARTS_AT_ONCE][PIECE / 4];
#pragma unroll
      for (int j = 0; j < PARTS_AT_ONCE; ++j) {
        const bool is_there = first + j < end_part;
        const Index part_row = Index(is_there ? first + j : first_part) * tile_rows + row;
        softmax[j] = __ldcg(&decode.softmax_gmem[part_row]);
        if (!is_there) softmax[j].y = 0.f;
#pragma unroll
        for (int c = 0; c < PIECE / 4; ++c)
          accum[j][c] = __ldcg(reinterpret_cast<const float4*>(decode.accum_gmem + part_row * HEAD_DIM + column) + c);
      }
#pragma unroll
      for (int j = 0; j < PARTS_AT_ONCE; ++j) {
#ifdef FLASHCORE_INVARIANT
        if (first + j >= end_part) continue;
        float before;
        const float weight = sum.join(softmax[j].x, softmax[j].y, before);
#pragma unroll
        for (int c = 0; c < PIECE; ++c)
          out[c] = joined(out[c], before, reinterpret_cast<const float(&)[PIECE]>(accum[j])[c], weight);
#else
        if (softmax[j].y == 0.f) continue;  // it saw no key of this row
        const float highest = fmaxf(reference, softmax[j].x);
        const float before = ex2_approx(reference - highest), weight = ex2_approx(softmax[j].x - highest);
        reference = highest;
        row_sum = row_sum * before + softmax[j].y * weight;
#pragma unroll
        for (int c = 0; c < PIECE; ++c)
          out[c] = out[c] * before + reinterpret_cast<const float(&)[PIECE]>(accum[j])[c] * weight;
#endif
      }
    }
#ifdef FLASHCORE_INVARIANT
    reference = sum.reference;
    row_sum = sum.row_sum;
    float lse = log_sum_exp(reference, row_sum);
#else
    MASKED(float lse = row_sum == 0.f ? -INFINITY : reference * LN_2 + logf(row_sum);)
#endif
#ifdef FLASHCORE_MASKS
    if (HAS_SINK) {
      const float sink = masks.sink_gmem[head.first_head + row / params.seqlen_q] * LOG2_E;
      lse = join_sink(fmaxf(sink, UNSEEN), reference, row_sum);
    }
#endif
#ifdef FLASHCORE_INVARIANT
    const float inverse = row_sum == 0.f ? 0.f : rcp_approx(row_sum);
#else
    const float inverse = row_sum == 0.f ? 0.f : __fdividef(1.f, row_sum);
#endif
    const int query_head = head.first_head + row / params.seqlen_q, token = row % params.seqlen_q;
    unsigned packed[PIECE / 2];
#pragma unroll
    for (int c = 0; c < PIECE; c += 2)
#ifdef FLASHCORE_INVARIANT
      packed[c / 2] = pack_pair(normalised(out[c], inverse), normalised(out[c + 1], inverse));
#else
      packed[c / 2] = pack_pair(out[c] * inverse, out[c + 1] * inverse);
#endif
    Element* out_gmem = params.out_gmem + head.batch * params.out.batch + query_head * params.out.head +
                        token * params.out.row + column;
    *reinterpret_cast<uint4*>(out_gmem) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    if (column == 0) {
      const Index lse_row = (Index(head.batch) * params.num_heads_q + query_head) * params.seqlen_q + token;
#if defined(FLASHCORE_MASKS) || defined(FLASHCORE_INVARIANT)
      params.lse_gmem[lse_row] = lse;
#else
      params.lse_gmem[lse_row] = row_sum == 0.f ? -INFINITY : reference * LN_2 + logf(row_sum);
#endif
    }
  }
}

// Three warps: each part that the warpgroups complete.
__device__ __forceinline__ void combine_parts(SharedMemory& smem, const AttentionParams& params, const DecodeParams& decode,
                                              const Shares& shares INVARIANT(, const PagedParams& paged)
                                                  MASKED(, const MaskParams& masks)) {
  const int thread = threadIdx.x - CONSUMER_THREADS - WARP;
#ifdef FLASHCORE_INVARIANT
  PartsOfBlock parts;
  for (;;) {
    if (thread == 0) smem.completed = parts.next_head(smem, decode);
    barrier_sync(COMBINER_BARRIER, COMBINER_THREADS);
    const int number = smem.completed;
    barrier_sync(COMBINER_BARRIER, COMBINER_THREADS);  // it may be set anew
    if (number == NO_MORE) return;
    fence_acquire();
    combine(smem, params, decode, shares, number, thread, paged MASKED(, masks));
  }
#else
  for (int sequence = 0;; ++sequence) {
    const int entry = sequence % PARTS_UNDER_WAY;
    mbarrier_wait(&smem.part_full[entry], sequence / PARTS_UNDER_WAY % 2);
    const Part part = smem.part[entry];
    if (part.number == NO_MORE) return;
    if (thread == 0) {
      const int all = smem.first_unit[part.number + 1] - smem.first_unit[part.number];
      smem.combines = atomic_add_release(&decode.accounted_gmem[part.number], part.taken) + part.taken == all;
      if (smem.combines) decode.accounted_gmem[part.number] = 0;
    }
    barrier_sync(COMBINER_BARRIER, COMBINER_THREADS);
    if (thread == 0) mbarrier_arrive(&smem.part_empty[entry]);
    const bool combines = smem.combines;
    barrier_sync(COMBINER_BARRIER, COMBINER_THREADS);  // the flag may be set anew
    if (!combines) continue;
    fence_acquire();
    combine(smem, params, decode, shares, part.number, thread MASKED(, masks));
  }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_decode(const __grid_constant__ AttentionParams params, const __grid_constant__ CUtensorMap k_map,
                     const __grid_constant__ CUtensorMap v_map, const __grid_constant__ PagedParams paged,
                     const __grid_constant__ DecodeParams decode MASKED(, const __grid_constant__ MaskParams masks)
                         TRACE_PARAM) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  SharedMemory& smem = *reinterpret_cast<SharedMemory*>(shared_bytes);
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    prefetch_tensormap(k_map);
    prefetch_tensormap(v_map);
    for (int i = 0; i < NUM_SLOTS; ++i) {
      mbarrier_init(&smem.k_full[i], 1);
      mbarrier_init(&smem.v_full[i], 1);
      mbarrier_init(&smem.k_empty[i], WARPGROUP / WARP);
      mbarrier_init(&smem.v_empty[i], WARPGROUP / WARP);
    }
#ifndef FLASHCORE_INVARIANT
    mbarrier_init(&smem.loan_full, WARPGROUP / WARP);
    mbarrier_init(&smem.loan_empty, WARPGROUP / WARP);
#endif
    for (int i = 0; i < PARTS_UNDER_WAY; ++i) {
      mbarrier_init(&smem.part_full[i], WARPGROUP / WARP);
      mbarrier_init(&smem.part_empty[i], 1);
    }
    fence_mbarrier_init();
  }
  wait_for_kernel_ahead();
  const int num_heads = params.batch * params.num_heads_kv * decode.tiles_a_group;
  const Shares shares(lay_out_units(smem, params, paged, decode, num_heads MASKED(, masks)));
  if (threadIdx.x < CONSUMER_THREADS) {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume(smem, params, paged, decode MASKED(, masks) TRACE(, trace));
  } else {
    setmaxnreg_dec<OTHER_REGISTERS>();
    if (threadIdx.x < CONSUMER_THREADS + WARP)
      produce(smem, params, paged, decode, k_map, v_map, shares, num_heads MASKED(, masks));
    else
      combine_parts(smem, params, decode, shares INVARIANT(, paged) MASKED(, masks));
  }
}
