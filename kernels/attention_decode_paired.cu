// Attention of the last few tokens of each sequence over keys and values in pages: decoding, by pairs of blocks.
//
// Bound by memory: each key and value is read once, for all query heads that share it and all of a sequence's query tokens.
// Adds to attention_decode: two blocks a multiprocessor, so that one copies while the other begins or ends a head; a head that
// one block has alone goes straight to the result; and keys and values are the first to leave L2, as nobody reads them again.
// Slow at: many query tokens, for which there is attention_hopper: all 64 rows of a tile are multiplied, used or not.
//
// The keys of all sequences and heads lie end to end as units of UNIT_KEYS, and each block takes as many of them as any other,
// wherever sequences begin and end.
//
// Roles: the producer, one warp, looks pages up and copies them into two rings. The consumer, a warpgroup, takes unit by unit;
// what it has of a head that other blocks have keys of too is a part, which goes to global memory. The combiner, three warps,
// counts the units that are accounted for, and combines a head's parts once all are.
//
// With FLASHCORE_MASKS there are other masks than the causal one (masks.cuh); units wholly before a window are not there at all.
//
// Variants: head_dim 64 128, dtype float16 bfloat16
#include "online_softmax.cuh"
#include "paged.cuh"
#include "warpgroup_tile.cuh"

constexpr int UNIT_KEYS = HEAD_DIM == 64 ? 128 : 64;
constexpr int UNIT_SHIFT = HEAD_DIM == 64 ? 7 : 6;
static_assert(UNIT_KEYS == 1 << UNIT_SHIFT, "a unit is a page, or part of one, or several");
constexpr int TILE_ROWS = WARPGROUP_ROWS;
constexpr int BLOCKS_A_MULTIPROCESSOR = 2;
constexpr int CONSUMER_THREADS = WARPGROUP;
constexpr int COMBINER_THREADS = 3 * WARP;
constexpr int THREADS = CONSUMER_THREADS + WARP + COMBINER_THREADS;
// Registers a thread. A block starts with the same for all; then the others give up what the consumer takes.
constexpr int LAUNCH_REGISTERS = 64 * 1024 / BLOCKS_A_MULTIPROCESSOR / THREADS / 8 * 8;
constexpr int OTHER_REGISTERS = 72;
constexpr int CONSUMER_REGISTERS = 2 * LAUNCH_REGISTERS - OTHER_REGISTERS;
constexpr int UNIT_BYTES = UNIT_KEYS * HEAD_DIM * sizeof(Element);
constexpr int NUM_SLOTS = 2;                           // units of K, and of V, under way: more only make the rest wait
constexpr int MAX_HEADS = 3072;                        // of K and V, of all sequences, each with its tiles of query rows
constexpr int MOST_BOXES = UNIT_KEYS / SMALLEST_PAGE;  // pieces of a unit that may lie in different pages
constexpr int FETCHED_ROWS = 2048 / HEAD_DIM * 2;      // of parts, on chip at once, when they are combined
constexpr int PARTS_UNDER_WAY = 4;                     // between consumers and combiner
constexpr int CONSUMER_BARRIER = 1, COMBINER_BARRIER = 2;  // named barriers

// A row of a part, in global memory.
struct PartRow {
  float o[HEAD_DIM];
  float2 softmax;  // reference and row sum
  float2 unused;   // rows begin at multiples of 16 bytes
};

// What the host adds: room for parts, and how a call is cut.
struct DecodeParams {
  PartRow* parts_gmem;   // [parts, tile rows]
  int* accounted_gmem;   // [heads]: units that are done; zero before a call and after it
  int heads_a_tile;      // query heads of a group that a tile holds
  int tiles_a_group;
};

// What the producer tells of a unit.
struct Unit {
  int number;        // of its head; NO_MORE after the last unit
  int index;         // in that head
  int taken;         // units that the block has of the head
  bool begins, ends; // the first or last one of them
  bool alone;        // they are the whole head
  bool whole;        // every query sees all its keys
  int position[MOST_BOXES];  // of the first key of each box
};
constexpr int NO_MORE = -1;

// A part that is complete: a head, and how many units of it the block had.
struct Part {
  int number, taken;
};

struct SharedMemory {
  alignas(1024) unsigned char k[NUM_SLOTS][UNIT_BYTES];  // [column block][row][64 columns], swizzled
  alignas(1024) unsigned char v[NUM_SLOTS][UNIT_BYTES];
  Unit unit[2][NUM_SLOTS];        // by round: the last one's V is still wanted when K of this one comes
  alignas(16) PartRow fetched[2][FETCHED_ROWS];  // rows of parts that are combined, and those to come
  int first_unit[MAX_HEADS + 1];  // of each head
  int sums[THREADS / WARP];
  Part part[PARTS_UNDER_WAY];
  bool combines;
  Mbarrier k_full[NUM_SLOTS], k_empty[NUM_SLOTS];
  Mbarrier v_full[NUM_SLOTS], v_empty[NUM_SLOTS];
  Mbarrier part_full[PARTS_UNDER_WAY], part_empty[PARTS_UNDER_WAY];
};
static_assert((sizeof(SharedMemory) + 1024) * BLOCKS_A_MULTIPROCESSOR <= 228 * 1024, "and 1 KB of each block is taken");

// cp.async.bulk.tensor.4d with createpolicy's evict_first (PTX ISA, Data Movement: cp.async.bulk.tensor, createpolicy): as
// tma_load_4d, of what nobody reads again. Lines that somebody will read, those of parts and of page tables, stay in L2.
__device__ __forceinline__ void tma_load_4d_once(void* dst_smem, const CUtensorMap& map, Mbarrier* barrier_smem, int column,
                                                 int row, int head, int batch) {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem_address(dst_smem)),
      "l"(&map), "r"(smem_address(barrier_smem)), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(policy)
      : "memory");
}

extern "C" __device__ const LaunchShape attention_decode_paired_shape = {TILE_ROWS, UNIT_KEYS, THREADS,
                                                                         sizeof(SharedMemory), 1, 1};

// Where a ring of slots stands: which slot, and in which round.
struct RingPosition {
  int slot = 0;
  unsigned parity = 0;

  __device__ void advance() {
    if (++slot == NUM_SLOTS) {
      slot = 0;
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
#pragma unroll 4
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
  Lookup next_box = {};
  if (begin < end) next_box = look(begin);
  for (int unit = begin; unit < end;) {
    const Lookup box = next_box;
    const int batch_end = min(end, unit + units_ahead);
#ifdef FLASHCORE_MASKS
    const Span of_first = seen_by(masks, 0, params.seqlen_q, box.length);
    const Span of_last = seen_by(masks, params.seqlen_q - 1, params.seqlen_q, box.length);
#endif
    const int own_unit = min(unit + lane / boxes, end - 1);
    const bool begins = lane % boxes == 0 && (own_unit == smem.first_unit[box.number] || own_unit == begin);

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
      const int head_begin = smem.first_unit[number], head_end = smem.first_unit[number + 1];
      const int own_begin = max(begin, head_begin), own_end = min(end, head_end);  // of the head, the block's
      mbarrier_wait(&smem.k_empty[at.slot], at.parity ^ 1);
      Unit& info = smem.unit[at.parity][at.slot];
      if (lane < boxes) info.position[lane] = position;
      if (lane == 0) {
        info.number = number;
        info.index = unit - head_begin;
#ifdef FLASHCORE_MASKS
        TRACE(info.index += units_before(params, paged, masks, Head(params, decode, number).batch);)
#endif
        info.taken = own_end - own_begin;
        info.begins = unit == own_begin;
        info.ends = unit == own_end - 1;
        info.alone = own_begin == head_begin && own_end == head_end;
        info.whole = (whole & own) == own;
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive_expect_tx(&smem.k_full[at.slot], UNIT_BYTES);
      __syncwarp();
      if (lane < boxes) {
#pragma unroll
        for (int block = 0; block < COLUMN_BLOCKS; ++block)
          tma_load_4d_once(smem.k[at.slot] + block * UNIT_KEYS * ROW_BYTES + into, k_map, &smem.k_full[at.slot],
                           block * BLOCK_COLUMNS, row, head_kv, pool_page);
      }
      mbarrier_wait(&smem.v_empty[at.slot], at.parity ^ 1);
      if (lane == 0) mbarrier_arrive_expect_tx(&smem.v_full[at.slot], UNIT_BYTES);
      __syncwarp();
      if (lane < boxes) {
#pragma unroll
        for (int block = 0; block < COLUMN_BLOCKS; ++block)
          tma_load_4d_once(smem.v[at.slot] + block * UNIT_KEYS * ROW_BYTES + into, v_map, &smem.v_full[at.slot],
                           block * BLOCK_COLUMNS, row, head_kv, pool_page);
      }
      if (i == 0) {
        if (begins) prefetch_q(params, Head(params, decode, box.number));
        // What comes after this batch is looked up now, and used when the batch has been copied.
        if (batch_end < end) next_box = look(batch_end);
      }
    }
  }
  mbarrier_wait(&smem.k_empty[at.slot], at.parity ^ 1);
  if (lane == 0) {
    smem.unit[at.parity][at.slot].number = NO_MORE;
    mbarrier_arrive(&smem.k_full[at.slot]);
  }
}

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

// Tell the combiner of a part, the block's nth; by all threads of the consumer.
__device__ __forceinline__ void pass_on(SharedMemory& smem, int nth, const Part& part) {
  const int entry = nth % PARTS_UNDER_WAY;
  mbarrier_wait(&smem.part_empty[entry], nth / PARTS_UNDER_WAY % 2 ^ 1);
  if (threadIdx.x % WARPGROUP == 0) smem.part[entry] = part;
  __syncwarp();
  if (threadIdx.x % WARP == 0) mbarrier_arrive(&smem.part_full[entry]);
}

// The result of a row of a head's tile.
struct ResultRow {
  Element* out_gmem;
  float* lse_gmem;

  __device__ ResultRow(const AttentionParams& params, const Head& head, int row) {
    const int query_head = head.first_head + row / params.seqlen_q, token = row % params.seqlen_q;
    out_gmem = params.out_gmem + head.batch * params.out.batch + query_head * params.out.head + token * params.out.row;
    lse_gmem = params.lse_gmem + (Index(head.batch) * params.num_heads_q + query_head) * params.seqlen_q + token;
  }
};

// O / l and lse of a thread's two rows, where no other part has anything of the head.
__device__ __forceinline__ void store_alone(const AttentionParams& params, const Head& head, int row, int lane,
                                            const float (&o)[OUTPUTS], const float (&reference)[2],
                                            float (&row_sum)[2] MASKED(, const MaskParams& masks)) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= head.heads * params.seqlen_q) continue;  // the last tile of a group may have fewer heads
    const ResultRow result(params, head, row + 8 * r);
    float lse = row_sum[r] == 0.f ? -INFINITY : reference[r] * LN_2 + logf(row_sum[r]);
#ifdef FLASHCORE_MASKS
    if (HAS_SINK) {
      const float sink = masks.sink_gmem[head.first_head + (row + 8 * r) / params.seqlen_q] * LOG2_E;
      lse = join_sink(fmaxf(sink, UNSEEN), reference[r], row_sum[r]);
    }
#endif
    const float inverse = row_sum[r] == 0.f ? 0.f : __fdividef(1.f, row_sum[r]);
    if (lane % 4 == 0) *result.lse_gmem = lse;
#pragma unroll
    for (int i = 2 * r; i < OUTPUTS; i += 4)
      *reinterpret_cast<unsigned*>(result.out_gmem + column_of(i, lane)) = pack_pair(o[i] * inverse, o[i + 1] * inverse);
  }
}

// One warpgroup: unit by unit, and part by part.
__device__ __forceinline__ void consume(SharedMemory& smem, const AttentionParams& params, const PagedParams& paged,
                                        const DecodeParams& decode MASKED(, const MaskParams& masks) TRACE_PARAM) {
  const int warp = threadIdx.x / WARP;
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
  int parts = 0;
  RingPosition at;
  TRACE(int first_key = 0;)

  for (;; at.advance()) {
    const int slot = uniform(at.slot);
    mbarrier_wait(&smem.k_full[slot], at.parity);
    const Unit& unit = smem.unit[at.parity][slot];
    const int number = unit.number, taken = unit.taken;
    const bool whole = unit.whole, ends = unit.ends, alone = unit.alone;
    const UnitPositions positions = {unit.position, box_shift MASKED(, begin)};
    if (number == NO_MORE) {
      pass_on(smem, parts, {NO_MORE, 0});
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
      clear_rows<UNIT_KEYS>(smem.v[slot], CONSUMER_BARRIER, [&](int i) { return positions.at(i) >= length; });
    wgmma_fence();
    multiply_p_v(o, p, v_ring.at(slot * UNIT_BYTES), true);
    wgmma_commit();
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(&smem.v_empty[slot]);
    TRACE(if (has_rows) stages.accum(page, o);)
    if (!ends) continue;

    float row_sum[2] = {quad_sum(softmax.row_sum[0]), quad_sum(softmax.row_sum[1])};
    if (alone) {
      if (has_rows)
        store_alone(params, Head(params, decode, number), row, lane, o, softmax.reference, row_sum MASKED(, masks));
      continue;
    }
    if (has_rows) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + 8 * r >= tile_rows) continue;
        // Shares lie end to end as heads do: a part is numbered by its head and its block, one added to the other.
        const int part = number + static_cast<int>(blockIdx.x);
        PartRow& part_row = decode.parts_gmem[Index(part) * tile_rows + row + 8 * r];
        if (lane % 4 == 0) __stcg(&part_row.softmax, make_float2(softmax.reference[r], row_sum[r]));
#pragma unroll
        for (int i = 2 * r; i < OUTPUTS; i += 4)
          __stcg(reinterpret_cast<float2*>(&part_row.o[column_of(i, lane)]), make_float2(o[i], o[i + 1]));
      }
    }
    pass_on(smem, parts++, {number, taken});
  }
}

// ---------------------------------------------------------------------------------------------------- the combiner

// out = sum of w * O over the parts of a head, by the sum of w * l; w = exp2(m - largest m)
//
// A thread has a piece of a row. As many rows as there are threads for are combined at a time; some of their parts are on chip,
// and the next ones on their way.
__device__ __forceinline__ void combine(SharedMemory& smem, const AttentionParams& params, const DecodeParams& decode,
                                        const Shares& shares, int number, int thread MASKED(, const MaskParams& masks)) {
  constexpr int PIECE = 8;  // columns of a thread: 16 bytes of output
  constexpr int PIECES = HEAD_DIM / PIECE, MOST_ROWS = COMBINER_THREADS / PIECES;
  static_assert(MOST_ROWS <= FETCHED_ROWS, "the rows of one part fit");
  const Head head(params, decode, number);
  const int all_rows = head.heads * params.seqlen_q, tile_rows = decode.heads_a_tile * params.seqlen_q;
  // Shares lie end to end as heads do, so that a head's parts do too.
  const int first_part = number + shares.block_of(smem.first_unit[number]);
  const int num_parts = number + shares.block_of(smem.first_unit[number + 1] - 1) + 1 - first_part;
  const PartRow* parts_gmem = decode.parts_gmem + Index(first_part) * tile_rows;

  for (int first_row = 0; first_row < all_rows; first_row += MOST_ROWS) {
    const int rows = min(MOST_ROWS, all_rows - first_row), at_once = FETCHED_ROWS / rows;
    const int nth = thread / PIECES, column = thread % PIECES * PIECE;
    const auto fetch = [&](int first, int half) {
      const int parts = nth < rows ? min(at_once, num_parts - first) : 0;
      for (int j = 0; j < parts; ++j) {
        const PartRow& row_gmem = parts_gmem[Index(first + j) * tile_rows + first_row + nth];
        PartRow& row_smem = smem.fetched[half][j * rows + nth];
#pragma unroll
        for (int c = 0; c < PIECE; c += 4) cp_async_16(&row_smem.o[column + c], &row_gmem.o[column + c], 16);
        if (column == 0) cp_async_16(&row_smem.softmax, &row_gmem.softmax, 16);
      }
      cp_async_commit();
    };
    float reference = -INFINITY, row_sum = 0.f, out[PIECE] = {};
    fetch(0, 0);
    fetch(at_once, 1);
    for (int first = 0, half = 0; first < num_parts; first += at_once, half ^= 1) {
      const int parts = min(at_once, num_parts - first);
      cp_async_wait<1>();
      barrier_sync(COMBINER_BARRIER, COMBINER_THREADS);  // what all threads fetched is there
      if (nth < rows) {
        const PartRow* row_smem = &smem.fetched[half][nth];
        float highest = reference;
        for (int j = 0; j < parts; ++j) {
          const float2 softmax = row_smem[j * rows].softmax;
          if (softmax.y != 0.f) highest = fmaxf(highest, softmax.x);  // else it saw no key of this row
        }
        const float before = row_sum == 0.f ? 0.f : ex2_approx(reference - highest);
        reference = highest;
        row_sum *= before;
#pragma unroll
        for (int c = 0; c < PIECE; ++c) out[c] *= before;
        for (int j = 0; j < parts; ++j) {
          const PartRow& part = row_smem[j * rows];
          const float weight = part.softmax.y == 0.f ? 0.f : ex2_approx(part.softmax.x - highest);
          row_sum += part.softmax.y * weight;
#pragma unroll
          for (int c = 0; c < PIECE; ++c) out[c] += part.o[column + c] * weight;
        }
      }
      barrier_sync(COMBINER_BARRIER, COMBINER_THREADS);  // nobody reads this half any more
      fetch(first + 2 * at_once, half);
    }
    if (nth >= rows) continue;
    const int row = first_row + nth;
    float lse = row_sum == 0.f ? -INFINITY : reference * LN_2 + logf(row_sum);
#ifdef FLASHCORE_MASKS
    if (HAS_SINK) {
      const float sink = masks.sink_gmem[head.first_head + row / params.seqlen_q] * LOG2_E;
      lse = join_sink(fmaxf(sink, UNSEEN), reference, row_sum);
    }
#endif
    const float inverse = row_sum == 0.f ? 0.f : __fdividef(1.f, row_sum);
    unsigned packed[PIECE / 2];
#pragma unroll
    for (int c = 0; c < PIECE; c += 2) packed[c / 2] = pack_pair(out[c] * inverse, out[c + 1] * inverse);
    const ResultRow result(params, head, row);
    *reinterpret_cast<uint4*>(result.out_gmem + column) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    if (column == 0) *result.lse_gmem = lse;
  }
}

// Three warps: each part that the warpgroups complete.
__device__ __forceinline__ void combine_parts(SharedMemory& smem, const AttentionParams& params, const DecodeParams& decode,
                                              const Shares& shares 
                                                  MASKED(, const MaskParams& masks)) {
  const int thread = threadIdx.x - CONSUMER_THREADS - WARP;
  for (int nth = 0;; ++nth) {
    const int entry = nth % PARTS_UNDER_WAY;
    mbarrier_wait(&smem.part_full[entry], nth / PARTS_UNDER_WAY % 2);
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
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_A_MULTIPROCESSOR)
    attention_decode_paired(const __grid_constant__ AttentionParams params, const __grid_constant__ CUtensorMap k_map,
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
      combine_parts(smem, params, decode, shares  MASKED(, masks));
  }
}
