// Attention for Hopper: tensor copies feed warpgroup products, and softmax of one warpgroup runs under products of others.
//
// Adds to attention_wmma: TMA, wgmma, scores and probabilities that never leave registers, and a reference maximum that
// goes stale (online_softmax.cuh).
// Slow at: problems with few tiles, which leave nothing to overlap with; for those there is hopper_split.cuh.
//
// Roles: the producer, one thread, deals out tiles, and copies Q, and pages of K and V into two rings. NUM_CONSUMERS
// warpgroups own 64 query rows of a tile each; a step is
//   S = Q @ K^T of this page and O += P @ V of the last one, then P = softmax(S).
// The warpgroups issue their products in turn (`Turn`), so that they stay out of phase: one on Tensor Cores, the others in
// their exponentials. O leaves by tensor copy, from the half of Q that its tile no longer needs.
//
// With FLASHCORE_PAGED the keys lie in pages, and each sequence has its own length (paged.cuh). With FLASHCORE_MASKS there are
// other masks than the causal one (masks.cuh). With FLASHCORE_INVARIANT the bits of a row are those that it has in any other
// call (chunks.cuh).
//
// Variants: head_dim 64 128, dtype float16 bfloat16
#include "online_softmax.cuh"
#include "paged.cuh"
#include "warpgroup_tile.cuh"

#ifdef FLASHCORE_NUM_CONSUMERS  // the host asks for another shape where that is faster
constexpr int NUM_CONSUMERS = FLASHCORE_NUM_CONSUMERS;
constexpr int TILE_N = FLASHCORE_TILE_N;
#else
constexpr int NUM_CONSUMERS = HEAD_DIM == 64 ? 4 : 3;
constexpr int TILE_N = 64;
#endif
constexpr int TILE_M = NUM_CONSUMERS * WARPGROUP_ROWS;
constexpr int CONSUMER_THREADS = NUM_CONSUMERS * WARPGROUP;
constexpr int CONSUMER_WARPS = CONSUMER_THREADS / WARP;
constexpr int THREADS = CONSUMER_THREADS + WARPGROUP;
// Registers a thread. A block starts with the same for all; then the producer gives up what the consumers take.
constexpr int LAUNCH_REGISTERS = 64 * 1024 / THREADS / 8 * 8;
constexpr int PRODUCER_REGISTERS = 32;
constexpr int CONSUMER_REGISTERS =
    (LAUNCH_REGISTERS * THREADS - PRODUCER_REGISTERS * WARPGROUP) / CONSUMER_THREADS / 8 * 8;
// How many steps of Q @ K^T find their part of Q in registers, of those that scores, probabilities, O and the rest leave.
constexpr int REST_REGISTERS = 28 MASKED(+ MASK_REGISTERS) INVARIANT(+ (HEAD_DIM == 64 ? 4 : 12));
constexpr int SPARE_STEPS = (CONSUMER_REGISTERS - TILE_N / 2 - TILE_N / 4 - OUTPUTS - REST_REGISTERS) / 4;
constexpr int HELD_STEPS = SPARE_STEPS < HEAD_DIM / DEPTH ? SPARE_STEPS : HEAD_DIM / DEPTH;
constexpr int PAGE_BYTES = TILE_N * HEAD_DIM * sizeof(Element);
constexpr int Q_BYTES = TILE_M * HEAD_DIM * sizeof(Element);
constexpr int SLOTS_THAT_FIT = (SHARED_LIMIT - 2 * Q_BYTES - 1024) / (2 * PAGE_BYTES);
constexpr int NUM_SLOTS = SLOTS_THAT_FIT < 8 ? SLOTS_THAT_FIT : 8;  // pages of K, and of V, under way
// Pages that the last warpgroup of a tile sees under a causal mask and the first does not.
constexpr int MOST_PAGES_AHEAD = ((NUM_CONSUMERS - 1) * WARPGROUP_ROWS + TILE_N - 1) / TILE_N;
static_assert(NUM_SLOTS >= 2 && NUM_SLOTS > MOST_PAGES_AHEAD, "a warpgroup may keep a page of V while others go on");
static_assert(TILE_N % DEPTH == 0 && TILE_N <= 256, "P @ V runs over whole steps of 16 keys");

#ifdef FLASHCORE_PAGED
#define PAGED_PARAM , const PagedParams& paged
#define PAGED(...) __VA_ARGS__
constexpr int PRODUCER_THREADS = WARP;
#else
constexpr int PRODUCER_THREADS = 1;
#define PAGED_PARAM
#define PAGED(...)
#endif

// Rows [first_row, end_row) of a flat head: a tile, or a narrower piece of one. They may reach beyond both ends of the queries.
struct Rows {
  int batch_head, first_row, end_row;
  MASKED(Sequence sequence;)
};

// What the producer tells the consumers of a tile.
struct Work {
  struct alignas(16) {
    int first_row;    // beyond the last row for a warpgroup that has none
    int pages;        // that its rows see
    int whole_pages;  // and how many of those need no mask
    MASKED(int pages_before, whole_from;)  // pages of the tile ahead of its own, and which of its own is the first whole one
  } of[NUM_CONSUMERS];
  Tile tile;
  int pages;  // that any of its rows sees; NO_MORE after the last tile
  PAGED(int seqlen_k;)
  MASKED(Sequence sequence; int first_page; float sink;)
};
constexpr int NO_MORE = -1;

struct SharedMemory {
  alignas(1024) unsigned char q[2][Q_BYTES];  // [column block][row][64 columns], swizzled, as K and V are
  alignas(1024) unsigned char k[NUM_SLOTS][PAGE_BYTES];
  alignas(1024) unsigned char v[NUM_SLOTS][PAGE_BYTES];
  Work work[2];
  PAGED(unsigned present[NUM_SLOTS];)  // which boxes of a page are there, a bit each
  Mbarrier q_full[2], q_empty[2];
  Mbarrier k_full[NUM_SLOTS], k_empty[NUM_SLOTS];
  Mbarrier v_full[NUM_SLOTS], v_empty[NUM_SLOTS];
};
static_assert(sizeof(SharedMemory) <= SHARED_LIMIT, "a block has 227 KB of shared memory");

extern "C" __device__ const LaunchShape attention_hopper_shape = {TILE_M, TILE_N, THREADS,
                                                                sizeof(SharedMemory) MASKED(, 1, HAS_LENGTHS)};

// Where a ring of slots stands: which slot, and in which round.
struct RingPosition {
  int slot = 0;
  unsigned parity = 0;

  __device__ RingPosition next() const {
    RingPosition after = {slot + 1, parity};
    if (after.slot == NUM_SLOTS) after = {0, parity ^ 1};
    return after;
  }
};

// Keys of a sequence.
__device__ __forceinline__ int keys_of(const AttentionParams& params, int batch PAGED_PARAM) {
  PAGED(return paged.lengths_gmem[batch];)
  return params.seqlen_k;
}

#ifdef FLASHCORE_MASKS
#include "sequences.cuh"
#endif

#ifdef FLASHCORE_INVARIANT
static_assert(TILE_N == LAW_TILE, "a page of keys is a tile of the law");
#include "chunk_totals.cuh"
#endif

#ifdef FLASHCORE_PAGED
constexpr int CLEARING_BARRIER = 1 + NUM_CONSUMERS;  // named barriers, after those of `Turn`

// No row sees the keys of boxes that are not there.
__device__ __forceinline__ void mask_absent(float (&s)[TILE_N / 2], unsigned present, int page_shift, int lane) {
#pragma unroll
  for (int i = 0; i < TILE_N / 2; ++i)
    if (!(present >> (column_of(i, lane) >> page_shift) & 1)) s[i] = -INFINITY;
}
#endif

// Of tiles [first, end), numbered head by head, the one at `position` from heavy to light: the first tile of every head, then
// the second of every head. The first head may lack tiles at its beginning, the last one at its end.
__device__ __forceinline__ int heavy_to_light(int position, int first, int end, int tiles_a_head) {
  const int first_head = first / tiles_a_head, last_head = (end - 1) / tiles_a_head, others = last_head - first_head;
  const int from = first - first_head * tiles_a_head, to = end - last_head * tiles_a_head;
  // Between the two ends both heads have their tile, or neither has.
  const int low = min(from, to), high = max(from, to), between = from < to ? others + 1 : others - 1;
  const int at_low = low * others, at_high = at_low + (high - low) * between;
  int nth = 0, heads = others;
  if (position >= at_high) {
    nth = high;
    position -= at_high;
  } else if (position >= at_low) {
    nth = low;
    heads = between;
    position -= at_low;
  }
  nth += position / heads;
  const int head = first_head + position % heads + (nth < from);
  return head * tiles_a_head + nth;
}

// The block's tile `step`: its head and rows; false when the block has no more. Tiles are dealt out head by head, forth and
// back. With sections, two rounds of all blocks make one, and the last one is all that is left over; the tiles of a section go
// from heavy to light, so that each block gets a heavy one and the light one that makes up for it. Few heads' K and V are in
// use at a time either way. Tiles of the last round, when there are too few for all blocks, are cut into narrower ones.
__device__ __forceinline__ bool deal(const AttentionParams& params, int sections, int step, Rows& rows MASKED(, const MaskParams& masks, int& listed)) {
  MASKED(if (HAS_LENGTHS) return deal_listed(params, masks, listed, rows);)
  const int blocks = gridDim.x;
  const int tiles = (params.seqlen_q + TILE_M - 1) / TILE_M;  // a head
  const int heads = params.num_heads_q * params.batch;
  const int last_round = tiles * heads / blocks, left = tiles * heads - last_round * blocks;
  int place = step % 2 == 0 ? blockIdx.x : blocks - 1 - blockIdx.x;
  int piece = 0, piece_rows = TILE_M;
  if (step >= last_round) {
    if (step > last_round || left == 0) return false;
    const int at_most = min(NUM_CONSUMERS, blocks / left);
    const int warpgroups = (NUM_CONSUMERS + at_most - 1) / at_most;
    const int pieces = (NUM_CONSUMERS + warpgroups - 1) / warpgroups;
    piece = place % pieces;
    piece_rows = warpgroups * WARPGROUP_ROWS;
    place /= pieces;
    if (place >= left) return false;
  }
  int number = step * blocks + place;
  if (sections > 0) {
    const int section = min(step / 2, sections - 1), first = section * 2 * blocks;
    const int end = section == sections - 1 ? tiles * heads : first + 2 * blocks;
    number = heavy_to_light(number - first, first, end, tiles);
  }
  rows.batch_head = number / tiles;
  const int nth = number - rows.batch_head * tiles;
  // Under a causal mask the last rows see most keys: whole tiles for them, and what is left over for the first rows.
  // They end with a whole warp, so that no warp begins before row 0 and ends after it: a tensor copy could not store that.
  const int whole_warps = (params.seqlen_q + WARP_ROWS - 1) / WARP_ROWS;
  const int first_row = params.causal ? whole_warps * WARP_ROWS - (nth + 1) * TILE_M : nth * TILE_M;
  rows.first_row = first_row + piece * piece_rows;
  rows.end_row = min(first_row + TILE_M, rows.first_row + piece_rows);
  MASKED(rows.sequence = {rows.batch_head / params.num_heads_q, 0, params.seqlen_q, 0, params.seqlen_k};)
  return true;
}

// ---------------------------------------------------------------------------------------------------- the producer

#ifdef FLASHCORE_PAGED
constexpr int TILE_SHIFT = TILE_N == 64 ? 6 : 7;
static_assert(TILE_N == 1 << TILE_SHIFT, "a page of the kernel's is a page of the pool, or part of one, or several");

// The pages of K and V that a tile sees, box by box: as many keys as lie in one page of the pool. Each lane looks up one box
// of those to come, and copies one of those at hand. Where there is none its page is -1, and it is filled with zeros.
__device__ __forceinline__ void load_pages(SharedMemory& smem, RingPosition& at, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map, const Tile& tile, int pages, int seqlen_k,
                                           const PagedParams& paged MASKED(, int first_page)) {
  const int lane = threadIdx.x % WARP;
  const int keys_shift = min(TILE_SHIFT, paged.page_shift), boxes_shift = TILE_SHIFT - keys_shift;  // logarithms
  const int boxes_a_page = 1 << boxes_shift, pages_a_look = WARP >> boxes_shift;
  const int own_block = lane >> boxes_shift, own_box = lane & (boxes_a_page - 1), own_key = own_box << keys_shift;
  const int* table_gmem = paged.page_table_gmem + Index(tile.batch) * paged.table_stride;
  const auto look = [&](int page) {
    const int key = page * TILE_N + (lane << keys_shift);
    return key < seqlen_k ? max(-1, table_gmem[key >> paged.page_shift]) : -1;
  };
  const auto load = [&](unsigned char* dst_smem, const CUtensorMap& map, Mbarrier* full, int row, int pool_page) {
    if (lane == 0) mbarrier_arrive_expect_tx(full, PAGE_BYTES);
    __syncwarp();
    if (own_block < COLUMN_BLOCKS)
      tma_load_4d(dst_smem + (own_block * TILE_N + own_key) * ROW_BYTES, map, full, own_block * BLOCK_COLUMNS, row,
                  tile.head_kv, pool_page);
  };
  int looked;
#pragma unroll 1
  for (int page = 0 MASKED(+ first_page); page < pages; ++page, at = at.next()) {
    const int first_box = (page & (pages_a_look - 1)) << boxes_shift;  // of the look
    if (first_box == 0 MASKED(|| page == first_page)) looked = look(page MASKED(& ~(pages_a_look - 1)));
    const int pool_page = __shfl_sync(~0u, looked, first_box + own_box);
    const unsigned present = __ballot_sync(~0u, pool_page >= 0) & ((1u << boxes_a_page) - 1);
    const int row = (page * TILE_N + own_key) & ~(-1 << paged.page_shift);
    mbarrier_wait(&smem.k_empty[at.slot], at.parity ^ 1);
    if (lane == 0) smem.present[at.slot] = present;
    load(smem.k[at.slot], k_map, &smem.k_full[at.slot], row, pool_page);
    mbarrier_wait(&smem.v_empty[at.slot], at.parity ^ 1);
    load(smem.v[at.slot], v_map, &smem.v_full[at.slot], row, pool_page);
  }
}
#else
// The pages of K and V that a tile sees.
__device__ __forceinline__ void load_pages(SharedMemory& smem, RingPosition& at, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map, const Tile& tile,
                                           int pages MASKED(, int first_page, int first_key)) {
#pragma unroll 1
  for (int page = 0 MASKED(+ first_page); page < pages; ++page, at = at.next()) {
    mbarrier_wait(&smem.k_empty[at.slot], at.parity ^ 1);
    load_rows<TILE_N>(smem.k[at.slot], k_map, &smem.k_full[at.slot], page * TILE_N MASKED(+ first_key), tile.head_kv,
                      tile.batch);
    mbarrier_wait(&smem.v_empty[at.slot], at.parity ^ 1);
    load_rows<TILE_N>(smem.v[at.slot], v_map, &smem.v_full[at.slot], page * TILE_N MASKED(+ first_key), tile.head_kv,
                      tile.batch);
  }
}
#endif

// One thread, or one warp where there are pages to look up: each tile's Q, and every page of K and V that it sees, as room
// becomes free.
__device__ __forceinline__ void produce(SharedMemory& smem, const AttentionParams& params, const CUtensorMap& q_map,
                                        const CUtensorMap& k_map, const CUtensorMap& v_map,
                                        int sections PAGED_PARAM MASKED(, const MaskParams& masks)) {
  RingPosition at;
  MASKED(int listed = blockIdx.x;)
  MASKED(if (HAS_LENGTHS) wait_for_kernel_ahead();)
  for (int step = 0;; ++step) {
    const int half = step % 2;
    Rows rows;
    if (!deal(params, sections, step, rows MASKED(, masks, listed))) {
      mbarrier_wait(&smem.q_empty[half], step / 2 % 2 ^ 1);
      if (threadIdx.x == CONSUMER_THREADS) {
        smem.work[half].pages = NO_MORE;
        for (auto& of : smem.work[half].of) of.pages = 0 MASKED(, of.pages_before = 0);
        mbarrier_arrive(&smem.q_full[half]);
      }
      return;
    }
    const Tile tile(params, rows.batch_head, rows.first_row);
    const int seqlen_k = keys_of(params, tile.batch PAGED(, paged));
#ifdef FLASHCORE_MASKS
    const Sequence& sequence = rows.sequence;
    const int keys = HAS_LENGTHS ? sequence.seqlen_k : seqlen_k;
    const PageSpan span(masks, rows.first_row, rows.end_row - rows.first_row, TILE_N, sequence.seqlen_q, keys);
    const int pages = span.end - span.first;
#else
    const int pages = pages_of(params, rows.first_row, rows.end_row - rows.first_row, TILE_N, seqlen_k);
#endif
    mbarrier_wait(&smem.q_empty[half], step / 2 % 2 ^ 1);
    if (threadIdx.x == CONSUMER_THREADS) {
      copy_rows<TILE_M>(smem.q[half], q_map, &smem.q_full[half], rows.first_row MASKED(+ sequence.first_q), tile.head,
                        tile.batch);
      Work& work = smem.work[half];
      work.tile = tile;
      work.pages = pages;
      PAGED(work.seqlen_k = seqlen_k;)
#ifdef FLASHCORE_MASKS
      work.sequence = sequence;
      work.first_page = span.first;
      if (HAS_SINK) work.sink = fmaxf(masks.sink_gmem[tile.head] * LOG2_E, UNSEEN);
#pragma unroll
      for (int consumer = 0; consumer < NUM_CONSUMERS; ++consumer) {
        const int first_row = rows.first_row + consumer * WARPGROUP_ROWS;
        const int own_rows = max(0, min(WARPGROUP_ROWS, rows.end_row - first_row));
        const PageSpan own(masks, first_row, own_rows, TILE_N, sequence.seqlen_q, keys);
        const bool as_they_are = HAS_SOFTCAP || params.softmax_scale >= 0.f;
        work.of[consumer].first_row = own_rows > 0 ? first_row : sequence.seqlen_q;
        work.of[consumer].pages = own.end - own.first;
        work.of[consumer].whole_pages = as_they_are ? own.whole_end - own.first : 0;
        work.of[consumer].pages_before = own.end > own.first ? own.first - span.first : 0;
        work.of[consumer].whole_from = own.whole_from - own.first;
      }
#else
#pragma unroll
      for (int consumer = 0; consumer < NUM_CONSUMERS; ++consumer) {
        const int first_row = rows.first_row + consumer * WARPGROUP_ROWS;
        const bool any = first_row < rows.end_row;
        work.of[consumer].first_row = any ? first_row : params.seqlen_q;
        work.of[consumer].pages = any ? pages_of(params, first_row, WARPGROUP_ROWS, TILE_N, seqlen_k) : 0;
        work.of[consumer].whole_pages = pages_as_they_are(params, first_row, TILE_N, seqlen_k);
      }
#endif
      mbarrier_arrive_expect_tx(&smem.q_full[half], Q_BYTES);
    }
#if defined(FLASHCORE_MASKS) && defined(FLASHCORE_PAGED)
    load_pages(smem, at, k_map, v_map, tile, span.end, seqlen_k, paged, span.first);
#elif defined(FLASHCORE_MASKS)
    load_pages(smem, at, k_map, v_map, tile, span.end, span.first, sequence.first_k);
#else
    load_pages(smem, at, k_map, v_map, tile, pages PAGED(, seqlen_k, paged));
#endif
  }
}

// ---------------------------------------------------------------------------------------------------- the consumers

// Warpgroups issue products in turn: each waits for the one before it, and lets the next one go once it has issued.
struct Turn {
  static constexpr int FIRST_BARRIER = 1;
  int own, next;

  __device__ explicit Turn(int consumer)
      : own(FIRST_BARRIER + consumer), next(FIRST_BARRIER + (consumer + 1) % NUM_CONSUMERS) {
    if (consumer == NUM_CONSUMERS - 1) pass();  // the first one need not wait
  }
  __device__ void wait() const { if (NUM_CONSUMERS > 1) barrier_sync(own, 2 * WARPGROUP); }
  __device__ void pass() const { if (NUM_CONSUMERS > 1) barrier_arrive(next, 2 * WARPGROUP); }
};

// One warpgroup: 64 rows of each of the block's tiles. The last product of a tile is issued with the first of the next.
// Lanes take no branch apart here: after one, slots and descriptors would no longer be kept in uniform registers.
__device__ __forceinline__ void consume(SharedMemory& smem, const AttentionParams& params,
                                        const CUtensorMap& out_map PAGED_PARAM MASKED(, const MaskParams& masks)
                                            INVARIANT(, float4* totals_gmem) TRACE_PARAM) {
  const int consumer = uniform(threadIdx.x / WARPGROUP);
  const int warp = uniform(threadIdx.x / WARP % 4);
  const int lane = threadIdx.x % WARP;
  const MatrixDescriptor q_halves(smem.q[0] + consumer * WARPGROUP_ROWS * ROW_BYTES, 0);
  const MatrixDescriptor k_ring(smem.k[0], 0), v_ring(smem.v[0], TILE_N * ROW_BYTES);
  const Turn turn(consumer);
  const auto release = [&](Mbarrier* empty) { if (lane == 0) mbarrier_arrive(empty); };
  // What was written of the last tile has been read from its half of Q by now: the copies had a page's softmax of time.
  const auto release_q = [&](int half) {
    tma_store_wait_read();
    __syncwarp();
    release(&smem.q_empty[half]);
  };
  const auto keys_in = [&](const Work& work) {
    MASKED(if (HAS_LENGTHS) return uniform(work.sequence.seqlen_k);)
    PAGED(return uniform(work.seqlen_k);)
    return params.seqlen_k;
  };
  PAGED(const unsigned all_present = (1u << max(1, TILE_N >> paged.page_shift)) - 1;)

#ifdef FLASHCORE_MASKS
  // Pages that only earlier rows of a tile see: this warpgroup lets them pass. It takes no turn for them: in a window all
  // warpgroups have as many pages, each a little later than the one before it, and all of them always have something to do.
  const auto let_pass = [&](RingPosition from, int pages) {
#pragma unroll 1
    for (int page = 0; page < pages; ++page, from = from.next()) {
      mbarrier_wait(&smem.k_full[from.slot], from.parity);
      mbarrier_wait(&smem.v_full[from.slot], from.parity);
      release(&smem.k_empty[from.slot]);
      release(&smem.v_empty[from.slot]);
    }
    return from;
  };
#endif

  RingPosition at;  // of the page whose V comes next
  float s[TILE_N / 2], o[OUTPUTS];
  unsigned p[TILE_N / 4];
  HeldQ<HELD_STEPS> held_q;
  const int warp_row = consumer * WARPGROUP_ROWS + warp * WARP_ROWS;
  INVARIANT(ChunkTotals totals(totals_gmem);)

  // S = Q @ K^T of the first page of the first tile. Where there is none, S is not used.
  mbarrier_wait(&smem.q_full[0], 0);
  held_q.template load<TILE_M>(smem.q[0], warp_row, lane);
  const bool any = uniform(smem.work[0].of[consumer].pages) > 0;
  MASKED(at = let_pass(at, uniform(smem.work[0].of[consumer].pages_before));)
  if (any) mbarrier_wait(&smem.k_full[0 MASKED(+ at.slot)], 0 MASKED(+ at.parity));
  PAGED(unsigned present = smem.present[0 MASKED(+ at.slot)];)
  turn.wait();
  wgmma_fence();
  multiply_q_k<TILE_M, TILE_N>(s, q_halves, k_ring MASKED(.at(at.slot * PAGE_BYTES)), held_q);
  wgmma_commit();
  turn.pass();
  wgmma_wait<0>();
  if (any) release(&smem.k_empty[0 MASKED(+ at.slot)]);

  INVARIANT(int from = 0;)  // a tile goes chunk by chunk, as if each were a tile: the first page of this one
  for (int step = 0;; ++step) {
    const int half = step % 2, other_half = half ^ 1;
    const Work& work = smem.work[half];
    const int tile_pages = uniform(work.pages) MASKED(- uniform(work.of[consumer].pages_before)) INVARIANT(- from);
    if (tile_pages == NO_MORE) break;
#ifdef FLASHCORE_INVARIANT
    const int first_of_tile = 0 MASKED(+ uniform(work.first_page) + uniform(work.of[consumer].pages_before));
    const int chunk_end = first_tile_of(chunk_of(first_of_tile + from) + 1) - first_of_tile;
    const int later_pages = max(0, uniform(work.of[consumer].pages) - chunk_end);  // of the tile, in later chunks
    const bool ends_tile = later_pages == 0;
#endif
    const int first_row = uniform(work.of[consumer].first_row),
              pages = uniform(work.of[consumer].pages) INVARIANT(- from - later_pages);
    const int whole_pages = uniform(work.of[consumer].whole_pages) INVARIANT(- from);
    const int seqlen_k = keys_in(work);
#ifdef FLASHCORE_MASKS
    const int seqlen_q = HAS_LENGTHS ? uniform(work.sequence.seqlen_q) : params.seqlen_q;
    const int first_page = uniform(work.first_page) + uniform(work.of[consumer].pages_before) INVARIANT(+ from);
    const int first_key = first_page * TILE_N, whole_from = uniform(work.of[consumer].whole_from) INVARIANT(- from);
#endif
    CHUNKED(const int first_page = from, first_key = first_page * TILE_N;)
    const MatrixDescriptor q = q_halves.at(half * Q_BYTES);
    const int row = first_row + warp * WARP_ROWS + lane / 4;  // a thread's other row is row + 8
    at = {uniform(at.slot), static_cast<unsigned>(uniform(at.parity))};
#ifndef FLASHCORE_INVARIANT
    MASKED(bool small = true;)  // the scores, by what the softcap does to them
#endif
    Softmax softmax(MASKED(HAS_SOFTCAP ? masks.softcap :) params.softmax_scale);
#ifdef FLASHCORE_MASKS
    TRACE(const AccumulatorTrace stages(trace, params, masks, work.tile, row, lane, seqlen_q, seqlen_k);)
#else
    TRACE(const AccumulatorTrace stages(trace, params, work.tile, row, lane);)
#endif
    INVARIANT(if (from == 0) totals.begin();)

    if (pages > 0) {
      MASKED(if (HAS_SOFTCAP) cap(s, masks.scale_by_cap);)
      if (whole_pages == 0 INVARIANT(|| whole_pages < 0) MASKED(|| whole_from > 0))
        sign_and_mask(s, params MASKED(, masks), row, 0 CHUNKED(+ first_key) MASKED(+ first_key, seqlen_q), seqlen_k, lane);
      PAGED(if (present != all_present) mask_absent(s, present, paged.page_shift, lane);)
      softmax.first(s, p);
      TRACE(stages.page(0 CHUNKED(+ first_page) MASKED(+ first_page), TILE_N, s, p, softmax);)
    }
    if (step > 0 INVARIANT(&& from == 0)) release_q(other_half);
#pragma unroll 1
    for (int page = 1; page < pages; ++page) {
      // S = Q @ K^T of this page, O += P @ V of the last one
      const RingPosition k_at = at.next();
      mbarrier_wait(&smem.k_full[k_at.slot], k_at.parity);
      mbarrier_wait(&smem.v_full[at.slot], at.parity);
      PAGED(present = smem.present[k_at.slot];)
      turn.wait();
      wgmma_fence();
      multiply_q_k<TILE_M, TILE_N>(s, q, k_ring.at(k_at.slot * PAGE_BYTES), held_q);
      multiply_p_v(o, p, v_ring.at(at.slot * PAGE_BYTES), page > 1);
      wgmma_commit();
      turn.pass();
      wgmma_wait<0>();
      release(&smem.k_empty[k_at.slot]);
      release(&smem.v_empty[at.slot]);
      at = k_at;
#ifdef FLASHCORE_MASKS
      const bool whole = page >= whole_from && page < whole_pages PAGED(&& present == all_present);
      if (HAS_SOFTCAP && (INVARIANT(true ||) !whole)) cap(s, masks.scale_by_cap);
#endif
      if (page >= whole_pages MASKED(|| page < whole_from))
        sign_and_mask(s, params MASKED(, masks), row, page * TILE_N CHUNKED(+ first_key) MASKED(+ first_key, seqlen_q), seqlen_k, lane);
      PAGED(if (present != all_present) mask_absent(s, present, paged.page_shift, lane);)
      TRACE(stages.accum(page - 1 CHUNKED(+ first_page) MASKED(+ first_page), o);)
#if defined(FLASHCORE_MASKS) && !defined(FLASHCORE_INVARIANT)
      if (HAS_SOFTCAP && whole)
        softmax.next_capped(s, p, o, masks, small);
      else
#endif
        softmax.next(s, p, o);
      TRACE(stages.page(page CHUNKED(+ first_page) MASKED(+ first_page), TILE_N, s, p, softmax);)
    }

    // Pages that only later rows of the tile see: this warpgroup lets them pass, and takes its turns.
    RingPosition after = pages > 0 ? at.next() : at;
#ifdef FLASHCORE_MASKS
    int turns = tile_pages;
    if (HAS_WINDOW) {
      turns = 0;
#pragma unroll
      for (const auto& of : work.of) turns = max(turns, of.pages);
      turns = uniform(turns) INVARIANT(- from);
    }
#endif
#pragma unroll 1
    for (int page = pages INVARIANT(+ (ends_tile ? 0 : tile_pages)); page < tile_pages; ++page, after = after.next()) {
      if (page > 0 MASKED(&& page < turns)) {
        turn.wait();
        turn.pass();
      }
      mbarrier_wait(&smem.k_full[after.slot], after.parity);
      mbarrier_wait(&smem.v_full[after.slot], after.parity);
      release(&smem.k_empty[after.slot]);
      release(&smem.v_empty[after.slot]);
    }

#ifdef FLASHCORE_MASKS
#pragma unroll 1
    for (int page = max(1, tile_pages) INVARIANT(+ (ends_tile ? 0 : turns)); page < turns; ++page) {
      turn.wait();
      turn.pass();
    }
#endif

    // O += P @ V of the last page, S = Q @ K^T of the next tile's first.
    INVARIANT(if (ends_tile))
    mbarrier_wait(&smem.q_full[other_half], (step + 1) / 2 % 2);
    const int next_pages = uniform(smem.work[INVARIANT(!ends_tile ? half :) other_half].of[consumer].pages);
    held_q.template load<TILE_M>(smem.q[INVARIANT(!ends_tile ? half :) other_half], warp_row, lane);
    MASKED(INVARIANT(if (ends_tile)) after = let_pass(after, uniform(smem.work[other_half].of[consumer].pages_before));)
    if (next_pages > 0) mbarrier_wait(&smem.k_full[after.slot], after.parity);
    if (pages > 0) mbarrier_wait(&smem.v_full[at.slot], at.parity);
    PAGED(present = smem.present[after.slot];)
    PAGED(const int left = seqlen_k - (pages - 1) * TILE_N CHUNKED(- first_key) MASKED(- first_key);)
    PAGED(if (pages > 0 && left < TILE_N)
            clear_rows<TILE_N>(smem.v[at.slot], CLEARING_BARRIER + consumer, [&](int i) { return i >= left; });)
    MASKED(if (HAS_LENGTHS && pages > 0)
             clear_after(smem.v[at.slot], seqlen_k - first_key - (pages - 1) * TILE_N, consumer);)
    turn.wait();
    wgmma_fence();
    multiply_q_k<TILE_M, TILE_N>(s, q_halves.at(INVARIANT(!ends_tile ? half * Q_BYTES :) other_half * Q_BYTES),
                                 k_ring.at(after.slot * PAGE_BYTES), held_q);
    multiply_p_v(o, p, v_ring.at(at.slot * PAGE_BYTES), pages > 1);
    wgmma_commit();
    turn.pass();
    wgmma_wait<0>();
    if (next_pages > 0) release(&smem.k_empty[after.slot]);
    if (pages > 0) release(&smem.v_empty[at.slot]);
    TRACE(if (pages > 0) stages.accum(pages - 1 CHUNKED(+ first_page) MASKED(+ first_page), o);)
    at = after;
#ifdef FLASHCORE_INVARIANT
    if (!ends_tile) {
      totals.add(o, softmax);
      from += pages;
      --step;
      continue;
    }
    from = 0;
#endif

    // O / l; a row that saw no key gives 0, and lse -inf
    if (pages == 0) {
#pragma unroll
      for (int i = 0; i < OUTPUTS; ++i) o[i] = 0.f;
      asm volatile("");  // a branch, not a choice for each
    }
#if defined(FLASHCORE_MASKS) || defined(FLASHCORE_INVARIANT)
    float row_sum[2], lse[2];
    INVARIANT(totals.finish(o, softmax);)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#ifdef FLASHCORE_INVARIANT
      row_sum[r] = softmax.row_sum[r];
#else
      row_sum[r] = quad_sum(softmax.row_sum[r]);
#endif
      lse[r] = MASKED(HAS_SINK ? join_sink(work.sink, softmax.reference[r], row_sum[r]) :)
                   log_sum_exp(softmax.reference[r], row_sum[r]);
    }
#else
    const float row_sum[2] = {quad_sum(softmax.row_sum[0]), quad_sum(softmax.row_sum[1])};
    const float lse[2] = {log_sum_exp(softmax.reference[0], row_sum[0]), log_sum_exp(softmax.reference[1], row_sum[1])};
#endif
    // A tensor copy writes whole warps alone: what comes after a sequence is another one's.
    MASKED(const bool whole_warp = !HAS_LENGTHS || first_row + (warp + 1) * WARP_ROWS <= seqlen_q;)
    stage_out<TILE_M>(smem.q[half], warp_row, lane, o, row_sum);
    __syncwarp();
#pragma unroll
    for (int block = 0; block < COLUMN_BLOCKS; ++block)
      tma_store_4d(lane == 0 && first_row + warp * WARP_ROWS >= 0 MASKED(&& whole_warp), out_map,
                   smem.q[half] + (block * TILE_M + warp_row) * ROW_BYTES, block * BLOCK_COLUMNS,
                   first_row + warp * WARP_ROWS MASKED(+ work.sequence.first_q), work.tile.head, work.tile.batch);
    tma_store_commit();
#ifdef FLASHCORE_MASKS
    if (!whole_warp)
      store_out_rows(params, work, smem.q[half], warp_row, first_row + warp * WARP_ROWS, lane);
    if (HAS_LENGTHS)
      store_lse_rows(params, work.tile, uniform(work.sequence.first_q), seqlen_q, row, lane, lse);
    else
      store_lse(params, work.tile, row, lane, lse);
#else
    store_lse(params, work.tile, row, lane, lse);
#endif
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_hopper(const __grid_constant__ AttentionParams params, const __grid_constant__ CUtensorMap q_map,
                     const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                     const __grid_constant__ CUtensorMap out_map,
                     const int sections PAGED(, const __grid_constant__ PagedParams paged)
                         MASKED(, const __grid_constant__ MaskParams masks) INVARIANT(, float4* totals_gmem) TRACE_PARAM) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  SharedMemory& smem = *reinterpret_cast<SharedMemory*>(shared_bytes);

  if (threadIdx.x == 0) {
    prefetch_tensormap(q_map);
    prefetch_tensormap(k_map);
    prefetch_tensormap(v_map);
    prefetch_tensormap(out_map);
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&smem.q_full[i], 1);
      mbarrier_init(&smem.q_empty[i], CONSUMER_WARPS);  // each warp says that it is done
    }
    for (int i = 0; i < NUM_SLOTS; ++i) {
      mbarrier_init(&smem.k_full[i], 1);
      mbarrier_init(&smem.v_full[i], 1);
      mbarrier_init(&smem.k_empty[i], CONSUMER_WARPS);
      mbarrier_init(&smem.v_empty[i], CONSUMER_WARPS);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  if (threadIdx.x >= CONSUMER_THREADS) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    if (threadIdx.x < CONSUMER_THREADS + PRODUCER_THREADS)
      produce(smem, params, q_map, k_map, v_map, sections PAGED(, paged) MASKED(, masks));
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume(smem, params, out_map PAGED(, paged) MASKED(, masks) INVARIANT(, totals_gmem) TRACE(, trace));
    tma_store_wait_read();  // the copies still read the block's shared memory
  }
}

#ifndef FLASHCORE_MASKS
#ifndef FLASHCORE_INVARIANT
#ifndef FLASHCORE_PAGED
#include "hopper_split.cuh"
#endif
#endif
#endif
