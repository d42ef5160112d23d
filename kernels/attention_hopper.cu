// Attention for Hopper: tensor copies feed warpgroup products, and softmax of one warpgroup runs under products of others.
//
// Adds to attention_wmma: TMA, wgmma, scores and probabilities that never leave registers, and a reference maximum that
// goes stale. Softmax does not care which reference is subtracted, so each row takes the maximum of its first page and
// keeps it; no maximum is computed after that. The sum of a page's probabilities is the guard: while it is small every
// probability is finite in 16 bits. When it is not, the warp takes a new maximum and does the page's softmax again.
// Slow at: short problems, where one tile a block leaves nothing to overlap with.
//
// Roles: one warp copies K and V into two rings of pages. NUM_CONSUMERS warpgroups own 64 query rows each; a step is
//   S = Q @ K^T of this page and O += P @ V of the last one, then P = softmax(S).
// The warpgroups issue their products in turn (barriers TURN), so that they stay out of phase: one on Tensor Cores, the
// others in their exponentials.
//
// Variants: head_dim 64 128, dtype float16 bfloat16
#include "attention.cuh"
#include "tma.cuh"
#include "trace.cuh"
#include "wgmma.cuh"

#ifndef NUM_CONSUMERS
#define NUM_CONSUMERS (HEAD_DIM == 64 ? 4 : 3)
#endif
#ifndef TILE_N
#define TILE_N (HEAD_DIM == 64 ? 64 : 80)
#endif

constexpr int WARP = 32;
constexpr int WARPGROUP = 4 * WARP;
constexpr int WARPGROUP_ROWS = 64;  // query rows a warpgroup: the M of wgmma
constexpr int TILE_M = NUM_CONSUMERS * WARPGROUP_ROWS;
constexpr int CONSUMER_THREADS = NUM_CONSUMERS * WARPGROUP;
constexpr int THREADS = CONSUMER_THREADS + WARPGROUP;
// Registers a thread. A block starts with the same for all; then the producer gives up what the consumers take.
constexpr int LAUNCH_REGISTERS = 64 * 1024 / THREADS / 8 * 8;
constexpr int PRODUCER_REGISTERS = 32;
constexpr int CONSUMER_REGISTERS =
    (LAUNCH_REGISTERS * THREADS - PRODUCER_REGISTERS * WARPGROUP) / CONSUMER_THREADS / 8 * 8;
constexpr int BLOCK_COLUMNS = 64;  // elements in 128 bytes, the widest swizzle
constexpr int COLUMN_BLOCKS = HEAD_DIM / BLOCK_COLUMNS;
constexpr int DEPTH = 16;  // the K of wgmma
constexpr int ROW_BYTES = 128;
constexpr int PAGE_BYTES = TILE_N * HEAD_DIM * sizeof(Element);
constexpr int Q_BYTES = WARPGROUP_ROWS * HEAD_DIM * sizeof(Element);
constexpr int SHARED_LIMIT = 227 * 1024;
constexpr int SLOTS_THAT_FIT = (SHARED_LIMIT - NUM_CONSUMERS * Q_BYTES - 1024) / (2 * PAGE_BYTES);
constexpr int NUM_SLOTS = SLOTS_THAT_FIT < 6 ? SLOTS_THAT_FIT : 6;  // pages of K, and of V, under way
static_assert(NUM_SLOTS >= 2, "a warpgroup holds the V of one page and the K of the next at once");
static_assert(TILE_N % DEPTH == 0 && TILE_N <= 256, "P @ V runs over whole steps of 16 keys");

// A probability above this would not be finite in 16 bits: the page's sum, which bounds each, has to stay below.
// bfloat16 has float's range; there the accumulator is what has to stay finite.
constexpr float LARGEST_PAGE_SUM = FLASHCORE_BF16 ? 1.8446744e19f : 32768.f;

struct SharedMemory {
  alignas(1024) unsigned char q[NUM_CONSUMERS][Q_BYTES];  // [column block][row][64 columns], swizzled, as K and V are
  alignas(1024) unsigned char k[NUM_SLOTS][PAGE_BYTES];
  alignas(1024) unsigned char v[NUM_SLOTS][PAGE_BYTES];
  Mbarrier q_full[NUM_CONSUMERS];
  Mbarrier k_full[NUM_SLOTS], k_empty[NUM_SLOTS];
  Mbarrier v_full[NUM_SLOTS], v_empty[NUM_SLOTS];
};
static_assert(sizeof(SharedMemory) <= SHARED_LIMIT, "a block has 227 KB of shared memory");

extern "C" __device__ const LaunchShape attention_hopper_shape = {TILE_M, TILE_N, THREADS, sizeof(SharedMemory)};

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

// The number of a block's tile `step`, or -1 when it has no more; `step` moves on. Tiles of a head are neighbours, and
// share its K and V in L2. Causal tiles are taken in pairs of a heavy and a light one, so that every pair weighs the same.
__device__ __forceinline__ int next_tile(const AttentionParams& params, int& step) {
  const int tiles = (params.seqlen_q + TILE_M - 1) / TILE_M;  // a head
  const int total = tiles * params.num_heads_q * params.batch;
  if (!params.causal || total <= gridDim.x) {
    const int number = blockIdx.x + step++ * gridDim.x;
    return number < total ? number : -1;
  }
  const int pairs = (tiles + 1) / 2;
  const int pair = blockIdx.x + step / 2 * gridDim.x;
  const int heavy = pair % pairs, light = tiles - 1 - heavy;
  const int first = pair / pairs * tiles;
  if (first >= total) return -1;
  const bool second = step % 2 == 1;
  step += heavy == light ? 2 : 1;  // the middle one has no partner
  return first + (second ? light : heavy);
}

// How many pages rows [first_row, first_row + rows) see.
__device__ __forceinline__ int pages_of(const AttentionParams& params, int first_row, int rows) {
  if (first_row >= params.seqlen_q) return 0;
  return (visible_keys(params, min(first_row + rows, params.seqlen_q) - 1) + TILE_N - 1) / TILE_N;
}

// ---------------------------------------------------------------------------------------------------- the producer

__device__ __forceinline__ void load_page(unsigned char* dst_smem, const CUtensorMap& map, Mbarrier* full, int first_key,
                                          const Tile& tile) {
  mbarrier_arrive_expect_tx(full, PAGE_BYTES);
#pragma unroll
  for (int block = 0; block < COLUMN_BLOCKS; ++block)
    tma_load_4d(dst_smem + block * TILE_N * ROW_BYTES, map, full, block * BLOCK_COLUMNS, first_key, tile.head_kv,
                tile.batch);
}

// One thread: every page of K and V that the block's tiles see, as slots become free.
__device__ __forceinline__ void produce(SharedMemory& smem, const AttentionParams& params, const CUtensorMap& k_map,
                                        const CUtensorMap& v_map) {
  RingPosition at;
  int step = 0;
  for (int number; (number = next_tile(params, step)) >= 0;) {
    const Tile tile(params, TILE_M, number);
    const int pages = pages_of(params, tile.first_row, TILE_M);
#pragma unroll 1
    for (int page = 0; page < pages; ++page, at = at.next()) {
      mbarrier_wait(&smem.k_empty[at.slot], at.parity ^ 1);
      load_page(smem.k[at.slot], k_map, &smem.k_full[at.slot], page * TILE_N, tile);
      mbarrier_wait(&smem.v_empty[at.slot], at.parity ^ 1);
      load_page(smem.v[at.slot], v_map, &smem.v_full[at.slot], page * TILE_N, tile);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- the consumers

// A warpgroup's tile of Q; by one thread.
__device__ __forceinline__ void load_q(SharedMemory& smem, const CUtensorMap& q_map, int consumer, const Tile& tile) {
  mbarrier_arrive_expect_tx(&smem.q_full[consumer], Q_BYTES);
#pragma unroll
  for (int block = 0; block < COLUMN_BLOCKS; ++block)
    tma_load_4d(smem.q[consumer] + block * WARPGROUP_ROWS * ROW_BYTES, q_map, &smem.q_full[consumer],
                block * BLOCK_COLUMNS, tile.first_row + consumer * WARPGROUP_ROWS, tile.head, tile.batch);
}

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

constexpr int SCORES = TILE_N / 2;    // of a thread: of every eight columns two neighbours, in row 0 and in row 1
constexpr int OUTPUTS = HEAD_DIM / 2; // laid out likewise

// Which of a thread's two rows an accumulator element belongs to, and its column.
__device__ constexpr int row_of(int i) { return i / 2 % 2; }
__device__ __forceinline__ int column_of(int i, int lane) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// The four lanes that share a row combine.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The softmax of a thread's two rows, over the pages so far.
struct Softmax {
  float scale_log2;
  float reference[2];     // what is subtracted from scale_log2 * score
  float row_sum[2];       // of this thread's columns alone
  float rescale[2];       // what the last page multiplied the sums before it by

  __device__ explicit Softmax(float softmax_scale) {
    // Never quite zero: a scale of zero must leave masked scores at minus infinity, and infinity times zero is NaN.
    scale_log2 = copysignf(fmaxf(fabsf(softmax_scale) * LOG2_E, SMALLEST_NORMAL), softmax_scale);
    reference[0] = reference[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.f;
  }

  // A score that, scaled, is minus infinity.
  __device__ float masked() const { return copysignf(INFINITY, -scale_log2); }

  // P = exp2(scale_log2 * S - reference), and its sums over the page
  __device__ __forceinline__ void exponentials(const float (&s)[SCORES], unsigned (&p)[SCORES / 2],
                                               float (&page_sum)[2]) const {
    page_sum[0] = page_sum[1] = 0.f;
#pragma unroll
    for (int i = 0; i < SCORES; i += 2) {
      const int row = row_of(i);
      const float even = ex2_approx(fmaf(s[i], scale_log2, -reference[row]));
      const float odd = ex2_approx(fmaf(s[i + 1], scale_log2, -reference[row]));
      page_sum[row] += even;
      page_sum[row] += odd;
      p[i / 2] = pack_pair(even, odd);
    }
  }

  // reference = max(reference, rowmax(S)), and everything before is brought to it
  template <typename Rescale>
  __device__ __forceinline__ void raise_reference(const float (&s)[SCORES], Rescale&& rescale_outputs) {
    float row_max[2] = {reference[0], reference[1]};
#pragma unroll
    for (int i = 0; i < SCORES; ++i) row_max[row_of(i)] = fmaxf(row_max[row_of(i)], s[i] * scale_log2);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float highest = quad_max(row_max[row]);
      // A row that has seen no key subtracts 0, since -inf - (-inf) is NaN.
      const float raised = highest == -INFINITY ? 0.f : highest;
      rescale[row] = ex2_approx(reference[row] - raised);
      reference[row] = raised;
      row_sum[row] *= rescale[row];
    }
    rescale_outputs();
  }

  // The softmax of the first page, with its own maximum for a reference.
  __device__ __forceinline__ void first(const float (&s)[SCORES], unsigned (&p)[SCORES / 2]) {
    raise_reference(s, [] {});
    exponentials(s, p, row_sum);
  }

  // The softmax of a later page: with the reference as it is, or a new one should a row of the warp outgrow it.
  __device__ __forceinline__ void next(const float (&s)[SCORES], unsigned (&p)[SCORES / 2], float (&o)[OUTPUTS]) {
    float page_sum[2];
    exponentials(s, p, page_sum);
    TRACE(rescale[0] = rescale[1] = 1.f;)
    const bool fits = page_sum[0] < LARGEST_PAGE_SUM && page_sum[1] < LARGEST_PAGE_SUM;  // NaN does not
    if (!__all_sync(~0u, fits)) {
      raise_reference(s, [&] {
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) o[i] *= rescale[row_of(i)];
      });
      exponentials(s, p, page_sum);
    }
    row_sum[0] += page_sum[0];
    row_sum[1] += page_sum[1];
  }
};

// Keys that a row does not see get `masked`.
__device__ __forceinline__ void mask(float (&s)[SCORES], const AttentionParams& params, int first_row, int first_key,
                                     int lane, float masked) {
  const int keys[2] = {visible_keys(params, first_row) - first_key, visible_keys(params, first_row + 8) - first_key};
#pragma unroll
  for (int i = 0; i < SCORES; ++i) s[i] = column_of(i, lane) < keys[row_of(i)] ? s[i] : masked;
}

// S = Q @ K^T
__device__ __forceinline__ void multiply_q_k(float (&s)[SCORES], const MatrixDescriptor& q, const MatrixDescriptor& k) {
#pragma unroll
  for (int step = 0; step < HEAD_DIM / DEPTH; ++step) {
    const int block = step / (BLOCK_COLUMNS / DEPTH), bytes = step % (BLOCK_COLUMNS / DEPTH) * DEPTH * 2;
    Wgmma<TILE_N>::shared(s, q.at(block * WARPGROUP_ROWS * ROW_BYTES + bytes), k.at(block * TILE_N * ROW_BYTES + bytes),
                          step > 0);
  }
}

// O += P @ V; O = P @ V unless `add`
__device__ __forceinline__ void multiply_p_v(float (&o)[OUTPUTS], const unsigned (&p)[SCORES / 2],
                                             const MatrixDescriptor& v, bool add) {
#pragma unroll
  for (int step = 0; step < TILE_N / DEPTH; ++step)
    Wgmma<HEAD_DIM>::registers(o, &p[4 * step], v.at(step * DEPTH * ROW_BYTES), add || step > 0);
}

// O / l to global memory. The four lanes of a row transpose four groups of eight columns among themselves, so that each
// stores 16 bytes.
__device__ __forceinline__ void store_out(const float (&o)[OUTPUTS], const float (&inverse)[2], Element* const (&row_gmem)[2],
                                          int lane) {
  const bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int first = 0; first < HEAD_DIM / 8; first += 4) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      unsigned piece[4];  // of group `first + g`: columns 2 * (lane % 4) and the next
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const int i = (first + g) * 4 + row * 2;
        piece[g] = pack_pair(o[i] * inverse[row], o[i + 1] * inverse[row]);
      }
#pragma unroll
      for (int g = 0; g < 4; g += 2) {
        const unsigned other = __shfl_xor_sync(~0u, odd ? piece[g] : piece[g + 1], 1);
        (odd ? piece[g] : piece[g + 1]) = other;
      }
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const unsigned other = __shfl_xor_sync(~0u, high ? piece[g] : piece[g + 2], 2);
        (high ? piece[g] : piece[g + 2]) = other;
      }
      if (row_gmem[row] != nullptr)
        *reinterpret_cast<uint4*>(row_gmem[row] + (first + lane % 4) * 8) = make_uint4(piece[0], piece[1], piece[2], piece[3]);
    }
  }
}

// One warpgroup: 64 rows of each of the block's tiles.
__device__ __forceinline__ void consume(SharedMemory& smem, const AttentionParams& params,
                                        const CUtensorMap& q_map TRACE_PARAM) {
  const int consumer = threadIdx.x / WARPGROUP;
  const int warp = threadIdx.x / WARP % 4;
  const int lane = threadIdx.x % WARP;
  const int thread = threadIdx.x % WARPGROUP;
  const int own_barrier = Turn::FIRST_BARRIER + NUM_CONSUMERS + consumer;
  const MatrixDescriptor q(smem.q[consumer], 0), k_ring(smem.k[0], 0), v_ring(smem.v[0], TILE_N * ROW_BYTES);
  const Turn turn(consumer);
  const auto release = [&](Mbarrier* empty) { if (lane == 0) mbarrier_arrive(empty); };

  RingPosition at;  // of the oldest page whose V is still to come
  unsigned q_parity = 0;
  int step = 0;
  int number = next_tile(params, step);
  if (number >= 0 && thread == 0) load_q(smem, q_map, consumer, Tile(params, TILE_M, number));

  while (number >= 0) {
    const Tile tile(params, TILE_M, number);
    number = next_tile(params, step);
    const int first_row = tile.first_row + consumer * WARPGROUP_ROWS;
    const int row = first_row + warp * 16 + lane / 4;  // a thread's other row is row + 8
    const int block_pages = pages_of(params, tile.first_row, TILE_M);
    const int pages = pages_of(params, first_row, WARPGROUP_ROWS);  // of this warpgroup
    const int whole_pages = visible_keys(params, first_row) / TILE_N;  // those that no row of it masks

    Softmax softmax(params.softmax_scale);
    float s[SCORES], o[OUTPUTS];
    unsigned p[SCORES / 2];
    TRACE(
      const TraceRow stage[2] = {TraceRow(trace, params, tile, row), TraceRow(trace, params, tile, row + 8)};
      const auto trace_scores = [&](int page) {
        for (int i = 0; i < SCORES; ++i) {
          const int r = row_of(i), key = page * TILE_N + column_of(i, lane);
          if (row + 8 * r < params.seqlen_q && key < params.seqlen_k)
            stage[r].score(key, s[i] == softmax.masked() ? -INFINITY : s[i] * params.softmax_scale);
        }
      };
      const auto trace_softmax = [&](int page) {
        for (int i = 0; i < SCORES; ++i) {
          const int r = row_of(i), key = page * TILE_N + column_of(i, lane);
          const unsigned short bits = p[i / 2] >> (i % 2 * 16);
          if (row + 8 * r < params.seqlen_q && key < params.seqlen_k)
            stage[r].prob(key, to_float(reinterpret_cast<const Element&>(bits)));
        }
        for (int r = 0; r < 2; ++r) {
          const float row_sum = quad_sum(softmax.row_sum[r]);
          if (row + 8 * r >= params.seqlen_q || lane % 4 != 0) continue;
          stage[r].row_max(page, visible_keys(params, row + 8 * r) == 0 ? -INFINITY : softmax.reference[r] * LN_2);
          stage[r].rescale(page, softmax.rescale[r]);
          stage[r].row_sum(page, row_sum);
        }
      };
      const auto trace_accum = [&](int page) {
        for (int i = 0; i < OUTPUTS; ++i)
          if (row + 8 * row_of(i) < params.seqlen_q) stage[row_of(i)].accum_row(page)[column_of(i, lane)] = o[i];
      };
    )

    const auto next_q = [&] {  // this tile's Q is read: the next tile's may come
      barrier_sync(own_barrier, WARPGROUP);
      if (number >= 0 && thread == 0) load_q(smem, q_map, consumer, Tile(params, TILE_M, number));
    };

    mbarrier_wait(&smem.q_full[consumer], q_parity);
    q_parity ^= 1;
    if (pages > 0) {
      // S = Q @ K^T of the first page
      mbarrier_wait(&smem.k_full[at.slot], at.parity);
      turn.wait();
      wgmma_fence();
      multiply_q_k(s, q, k_ring.at(at.slot * PAGE_BYTES));
      wgmma_commit();
      turn.pass();
      wgmma_wait<0>();
      release(&smem.k_empty[at.slot]);
      if (whole_pages == 0) mask(s, params, row, 0, lane, softmax.masked());
      TRACE(trace_scores(0);)
      softmax.first(s, p);
      TRACE(trace_softmax(0);)

#pragma unroll 1
      for (int page = 1; page < pages; ++page) {
        // S = Q @ K^T of this page, O += P @ V of the last one
        const RingPosition k_at = at.next();
        mbarrier_wait(&smem.k_full[k_at.slot], k_at.parity);
        mbarrier_wait(&smem.v_full[at.slot], at.parity);
        turn.wait();
        wgmma_fence();
        multiply_q_k(s, q, k_ring.at(k_at.slot * PAGE_BYTES));
        multiply_p_v(o, p, v_ring.at(at.slot * PAGE_BYTES), page > 1);
        wgmma_commit();
        turn.pass();
        wgmma_wait<0>();
        release(&smem.k_empty[k_at.slot]);
        release(&smem.v_empty[at.slot]);
        at = k_at;
        if (page >= whole_pages) mask(s, params, row, page * TILE_N, lane, softmax.masked());
        TRACE(trace_scores(page); trace_accum(page - 1);)
        softmax.next(s, p, o);
        TRACE(trace_softmax(page);)
      }
      next_q();

      // O += P @ V of the last page
      mbarrier_wait(&smem.v_full[at.slot], at.parity);
      turn.wait();
      wgmma_fence();
      multiply_p_v(o, p, v_ring.at(at.slot * PAGE_BYTES), pages > 1);
      wgmma_commit();
      turn.pass();
      wgmma_wait<0>();
      release(&smem.v_empty[at.slot]);
      at = at.next();
      TRACE(trace_accum(pages - 1);)
    } else {
      next_q();
      turn.wait();
      turn.pass();
#pragma unroll
      for (int i = 0; i < OUTPUTS; ++i) o[i] = 0.f;
    }
    // Pages that only later rows of the block see: this warpgroup lets them pass, and takes its turns.
    for (int page = pages; page < block_pages; ++page, at = at.next()) {
      turn.wait();
      turn.pass();
      mbarrier_wait(&smem.k_full[at.slot], at.parity);
      mbarrier_wait(&smem.v_full[at.slot], at.parity);
      release(&smem.k_empty[at.slot]);
      release(&smem.v_empty[at.slot]);
    }

    // O / l; a row that saw no key gives 0, and lse -inf
    float inverse[2];
    Element* row_gmem[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float row_sum = quad_sum(softmax.row_sum[r]);
      inverse[r] = row_sum == 0.f ? 0.f : 1.f / row_sum;
      const int out_row = row + 8 * r;
      const bool exists = out_row < params.seqlen_q;
      row_gmem[r] = exists ? params.out_gmem + tile.batch * params.out.batch + tile.head * params.out.head +
                                 out_row * params.out.row
                           : nullptr;
      if (exists && lane % 4 == 0) {
        const Index lse_row = (Index(tile.batch) * params.num_heads_q + tile.head) * params.seqlen_q + out_row;
        params.lse_gmem[lse_row] = row_sum == 0.f ? -INFINITY : softmax.reference[r] * LN_2 + logf(row_sum);
      }
    }
    store_out(o, inverse, row_gmem, lane);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_hopper(const __grid_constant__ AttentionParams params, const __grid_constant__ CUtensorMap q_map,
                     const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map TRACE_PARAM) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  SharedMemory& smem = *reinterpret_cast<SharedMemory*>(shared_bytes);

  if (threadIdx.x == 0) {
    prefetch_tensormap(q_map);
    prefetch_tensormap(k_map);
    prefetch_tensormap(v_map);
    for (int i = 0; i < NUM_CONSUMERS; ++i) mbarrier_init(&smem.q_full[i], 1);
    for (int i = 0; i < NUM_SLOTS; ++i) {
      mbarrier_init(&smem.k_full[i], 1);
      mbarrier_init(&smem.v_full[i], 1);
      mbarrier_init(&smem.k_empty[i], 4 * NUM_CONSUMERS);  // each warp says that it is done
      mbarrier_init(&smem.v_empty[i], 4 * NUM_CONSUMERS);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  if (threadIdx.x >= CONSUMER_THREADS) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    if (threadIdx.x == CONSUMER_THREADS) produce(smem, params, k_map, v_map);
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume(smem, params, q_map TRACE(, trace));
  }
}
