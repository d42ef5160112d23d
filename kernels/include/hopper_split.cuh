// The Hopper kernel for problems with few tiles: the warpgroups of a block share 64 query rows and split the keys.
//
// Where there are fewer tiles than multiprocessors, time goes by the steps that follow one another. Here a tile has as few
// rows as wgmma takes, its pages are dealt out to the warpgroups of the block, and the parts of the result are combined in
// shared memory at the end. A warpgroup loads its own pages into slots of its own, so that it waits for nobody. In a row of
// kernels it starts before the one ahead of it has ended, and waits for that one's results when it is ready itself.
#pragma once
#include "online_softmax.cuh"
#include "warpgroup_tile.cuh"

namespace split {

constexpr int TILE_ROWS = WARPGROUP_ROWS;
constexpr int PAGE_KEYS = 64;
constexpr int NUM_SPLITS = HEAD_DIM == 64 ? 4 : 3;  // warpgroups of a block
constexpr int BLOCK_THREADS = NUM_SPLITS * WARPGROUP;
constexpr int SLOT_BYTES = PAGE_KEYS * HEAD_DIM * sizeof(Element);
constexpr int Q_TILE_BYTES = TILE_ROWS * HEAD_DIM * sizeof(Element);
constexpr int SLOTS_THAT_FIT = (SHARED_LIMIT - Q_TILE_BYTES - 4096) / (2 * SLOT_BYTES * NUM_SPLITS);
constexpr int SLOTS = SLOTS_THAT_FIT < 3 ? SLOTS_THAT_FIT : 3;  // pages of K and V under way, of one warpgroup
constexpr int PART_STRIDE = HEAD_DIM + 8;  // floats: rows of a part start in different banks

// A warpgroup's pages, and once they are used up, its part of O.
union Room {
  struct {
    unsigned char k[SLOTS][SLOT_BYTES];
    unsigned char v[SLOTS][SLOT_BYTES];
  };
  float part[TILE_ROWS][PART_STRIDE];
};

struct Shared {
  alignas(1024) unsigned char q[Q_TILE_BYTES];
  alignas(1024) Room room[NUM_SPLITS];
  float reference[NUM_SPLITS][TILE_ROWS];
  float row_sum[NUM_SPLITS][TILE_ROWS];
  Mbarrier q_full;
  Mbarrier k_full[NUM_SPLITS][SLOTS], v_full[NUM_SPLITS][SLOTS];
};
static_assert(sizeof(Room) % 1024 == 0, "swizzled tiles start at multiples of 1024 bytes");
static_assert(SLOTS >= 2 && sizeof(Shared) <= SHARED_LIMIT, "a block has 227 KB of shared memory");

// One warpgroup: of the tile's pages every NUM_SPLITS-th. Leaves its part of O and its rows' softmax in `smem`.
__device__ __forceinline__ void run_split(Shared& smem, const AttentionParams& params, const CUtensorMap& q_map,
                                          const CUtensorMap& k_map, const CUtensorMap& v_map,
                                          const Tile& tile TRACE_PARAM) {
  const int split = uniform(threadIdx.x / WARPGROUP);
  const int warp = threadIdx.x / WARP % 4;
  const int lane = threadIdx.x % WARP;
  const bool loads = threadIdx.x % WARPGROUP == 0;
  const int own_barrier = 1 + split;
  Room& room = smem.room[split];
  const MatrixDescriptor q(smem.q, 0), k_slots(room.k[0], 0), v_slots(room.v[0], PAGE_KEYS * ROW_BYTES);
  const int tile_pages = pages_of(params, tile.first_row, TILE_ROWS, PAGE_KEYS, params.seqlen_k);
  const int pages = uniform((tile_pages + NUM_SPLITS - 1 - split) / NUM_SPLITS);  // of this warpgroup
  const int whole_pages = uniform(pages_as_they_are(params, tile.first_row, PAGE_KEYS, params.seqlen_k));
  const int row = tile.first_row + warp * 16 + lane / 4;  // a thread's other row is row + 8

  const auto load_page = [&](int i) {  // the warpgroup's i-th
    const int slot = i % SLOTS, first_key = (split + i * NUM_SPLITS) * PAGE_KEYS;
    load_rows<PAGE_KEYS>(room.k[slot], k_map, &smem.k_full[split][slot], first_key, tile.head_kv, tile.batch);
    load_rows<PAGE_KEYS>(room.v[slot], v_map, &smem.v_full[split][slot], first_key, tile.head_kv, tile.batch);
  };
  if (loads) {
    // Each warpgroup readies its own barriers, so that its copies start at once.
    prefetch_tensormap(q_map);
    prefetch_tensormap(k_map);
    prefetch_tensormap(v_map);
    if (split == 0) mbarrier_init(&smem.q_full, 1);
    for (int slot = 0; slot < SLOTS; ++slot) {
      mbarrier_init(&smem.k_full[split][slot], 1);
      mbarrier_init(&smem.v_full[split][slot], 1);
    }
    fence_mbarrier_init();
  }
  wait_for_kernel_ahead();
  if (loads) {
    if (split == 0) load_rows<TILE_ROWS>(smem.q, q_map, &smem.q_full, tile.first_row, tile.head, tile.batch);
    for (int i = 0; i < min(pages, SLOTS); ++i) load_page(i);
  }
  __syncthreads();

  Softmax softmax(params.softmax_scale);
  float s[PAGE_KEYS / 2], o[OUTPUTS];
  unsigned p[PAGE_KEYS / 4];
  TRACE(const AccumulatorTrace stages(trace, params, tile, row, lane, split * PAGE_KEYS);)

  // S = Q @ K^T of the first page; where there is none, S is not used
  mbarrier_wait(&smem.q_full, 0);
  if (pages > 0) mbarrier_wait(&smem.k_full[split][0], 0);
  wgmma_fence();
  multiply_q_k<TILE_ROWS, PAGE_KEYS>(s, q, k_slots);
  wgmma_commit();
  wgmma_wait<0>();
  if (pages > 0) {
    if (split >= whole_pages) sign_and_mask(s, params, row, split * PAGE_KEYS, params.seqlen_k, lane);
    softmax.first(s, p);
    TRACE(stages.page(split, PAGE_KEYS, s, p, softmax);)

#pragma unroll 1
    for (int i = 1; i < pages; ++i) {
      // S = Q @ K^T of this page, O += P @ V of the last one
      const int page = split + i * NUM_SPLITS, slot = i % SLOTS, last_slot = (i - 1) % SLOTS;
      mbarrier_wait(&smem.k_full[split][slot], i / SLOTS % 2);
      mbarrier_wait(&smem.v_full[split][last_slot], (i - 1) / SLOTS % 2);
      wgmma_fence();
      multiply_q_k<TILE_ROWS, PAGE_KEYS>(s, q, k_slots.at(slot * SLOT_BYTES));
      multiply_p_v(o, p, v_slots.at(last_slot * SLOT_BYTES), i > 1);
      wgmma_commit();
      wgmma_wait<0>();
      if (i - 1 + SLOTS < pages) {
        barrier_sync(own_barrier, WARPGROUP);  // all four warps are done with the last page
        if (loads) load_page(i - 1 + SLOTS);
      }
      if (page >= whole_pages) sign_and_mask(s, params, row, page * PAGE_KEYS, params.seqlen_k, lane);
      TRACE(stages.accum(page - NUM_SPLITS, o);)
      softmax.next(s, p, o);
      TRACE(stages.page(page, PAGE_KEYS, s, p, softmax);)
    }

    // O += P @ V of the last page
    mbarrier_wait(&smem.v_full[split][(pages - 1) % SLOTS], (pages - 1) / SLOTS % 2);
    wgmma_fence();
    multiply_p_v(o, p, v_slots.at((pages - 1) % SLOTS * SLOT_BYTES), pages > 1);
    wgmma_commit();
    wgmma_wait<0>();
    TRACE(stages.accum(split + (pages - 1) * NUM_SPLITS, o);)
    barrier_sync(own_barrier, WARPGROUP);  // the slots are read, and take the part of O
#pragma unroll
    for (int i = 0; i < OUTPUTS; i += 2) {
      float* part = &room.part[warp * 16 + lane / 4 + 8 * row_of(i)][column_of(i, lane)];
      *reinterpret_cast<float2*>(part) = make_float2(o[i], o[i + 1]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float row_sum = quad_sum(softmax.row_sum[r]);
    if (lane % 4 == 0) {
      smem.reference[split][row - tile.first_row + 8 * r] = row_sum == 0.f ? -INFINITY : softmax.reference[r];
      smem.row_sum[split][row - tile.first_row + 8 * r] = row_sum;
    }
  }
}

// out = sum of w * O over the splits, by the sum of w * l; w = exp2(m - largest m)
__device__ __forceinline__ void combine(const Shared& smem, const AttentionParams& params, const Tile& tile) {
  constexpr int PIECE = 8;  // columns of a thread: 16 bytes of output
  constexpr int PIECES = HEAD_DIM / PIECE;
  for (int i = threadIdx.x; i < TILE_ROWS * PIECES; i += BLOCK_THREADS) {
    const int row = i / PIECES, column = i % PIECES * PIECE, out_row = tile.first_row + row;
    if (out_row >= params.seqlen_q) break;
    float highest = -INFINITY;
#pragma unroll
    for (int split = 0; split < NUM_SPLITS; ++split) highest = fmaxf(highest, smem.reference[split][row]);
    float row_sum = 0.f, out[PIECE] = {};
#pragma unroll
    for (int split = 0; split < NUM_SPLITS; ++split) {
      const float sum = smem.row_sum[split][row];
      if (sum == 0.f) continue;  // it saw no key of this row, and may have left no part
      const float weight = ex2_approx(smem.reference[split][row] - highest);
      row_sum += weight * sum;
      const float* part = &smem.room[split].part[row][column];
#pragma unroll
      for (int c = 0; c < PIECE; ++c) out[c] += weight * part[c];
    }
    const float inverse = row_sum == 0.f ? 0.f : __fdividef(1.f, row_sum);
    unsigned packed[PIECE / 2];
#pragma unroll
    for (int c = 0; c < PIECE; c += 2) packed[c / 2] = pack_pair(out[c] * inverse, out[c + 1] * inverse);
    Element* out_gmem = params.out_gmem + tile.batch * params.out.batch + tile.head * params.out.head +
                        out_row * params.out.row + column;
    *reinterpret_cast<uint4*>(out_gmem) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    if (column == 0) {
      const Index lse_row = (Index(tile.batch) * params.num_heads_q + tile.head) * params.seqlen_q + out_row;
      params.lse_gmem[lse_row] = row_sum == 0.f ? -INFINITY : highest * LN_2 + logf(row_sum);
    }
  }
}

}  // namespace split

extern "C" __device__ const LaunchShape attention_hopper_split_shape = {
    split::TILE_ROWS, split::PAGE_KEYS, split::BLOCK_THREADS, sizeof(split::Shared), split::NUM_SPLITS, 1};

// Grid: (tiles, num_heads_q, batch), so that a block finds its tile without a division.
extern "C" __global__ void __launch_bounds__(split::BLOCK_THREADS, 1)
    attention_hopper_split(const __grid_constant__ AttentionParams params, const __grid_constant__ CUtensorMap q_map,
                           const __grid_constant__ CUtensorMap k_map,
                           const __grid_constant__ CUtensorMap v_map TRACE_PARAM) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  split::Shared& smem = *reinterpret_cast<split::Shared*>(shared_bytes);
  let_next_kernel_start();
  Tile tile;
  tile.batch = blockIdx.z;
  tile.head = blockIdx.y;
  tile.head_kv = blockIdx.y / (params.num_heads_q / params.num_heads_kv);
  tile.first_row = blockIdx.x * split::TILE_ROWS;
  split::run_split(smem, params, q_map, k_map, v_map, tile TRACE(, trace));
  __syncthreads();
  split::combine(smem, params, tile);
}
