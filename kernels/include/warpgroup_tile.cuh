// The two products of attention for the 64 query rows of a warpgroup, and the way of the result to global memory.
//
// Tiles lie in shared memory as the tensor copies leave them: [column block][row][64 columns], swizzled.
#pragma once
#include "tma.cuh"
#include "wgmma.cuh"

constexpr int WARP = 32;
constexpr int WARPGROUP = 4 * WARP;
constexpr int WARPGROUP_ROWS = 64;  // the M of wgmma
constexpr int WARP_ROWS = WARPGROUP_ROWS / 4;
constexpr int DEPTH = 16;           // the K of wgmma
constexpr int BLOCK_COLUMNS = 64;   // elements in 128 bytes, the widest swizzle
constexpr int ROW_BYTES = 128;
constexpr int COLUMN_BLOCKS = HEAD_DIM / BLOCK_COLUMNS;
constexpr int OUTPUTS = HEAD_DIM / 2;  // accumulator elements of a thread
constexpr int SHARED_LIMIT = 227 * 1024;

// griddepcontrol.launch_dependents (PTX ISA, Parallel Synchronization: griddepcontrol): the next kernel of the stream may
// start, if it was launched so that it may.
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// griddepcontrol.wait: until the kernel ahead has ended and all it wrote can be seen; at once where there is none.
__device__ __forceinline__ void wait_for_kernel_ahead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// What lane 0 has, for all lanes. The compiler then knows that it is the same for all, and keeps it and what depends on it
// in uniform registers.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// `ROWS` rows of one head, from `first_row` on, to shared memory; by one thread.
template <int ROWS>
__device__ __forceinline__ void copy_rows(unsigned char* dst_smem, const CUtensorMap& map, Mbarrier* full, int first_row,
                                          int head, int batch) {
#pragma unroll
  for (int block = 0; block < COLUMN_BLOCKS; ++block)
    tma_load_4d(dst_smem + block * ROWS * ROW_BYTES, map, full, block * BLOCK_COLUMNS, first_row, head, batch);
}

// The same, with its arrival at the barrier.
template <int ROWS>
__device__ __forceinline__ void load_rows(unsigned char* dst_smem, const CUtensorMap& map, Mbarrier* full, int first_row,
                                          int head, int batch) {
  mbarrier_arrive_expect_tx(full, ROWS * HEAD_DIM * sizeof(Element));
  copy_rows<ROWS>(dst_smem, map, full, first_row, head, batch);
}

// The first steps' columns of a warpgroup's rows of Q, as wgmma takes its left operand from registers.
template <int STEPS>
struct HeldQ {
  unsigned pairs[STEPS > 0 ? STEPS * 4 : 1];

  // From a tile with TILE_M rows, of which the warp's begin at `first_row`.
  template <int TILE_M>
  __device__ __forceinline__ void load(const unsigned char* q_smem, int first_row, int lane) {
    const int row = first_row + lane % 16;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int block = step / (BLOCK_COLUMNS / DEPTH), piece = step % (BLOCK_COLUMNS / DEPTH) * 2 + lane / 16;
      load_matrices(&pairs[step * 4], q_smem + (block * TILE_M + row) * ROW_BYTES + (piece ^ row % 8) * 16);
    }
  }
};

// S = Q @ K^T, of tiles with TILE_M and TILE_N rows. What is held of Q need not be read from shared memory once a page.
template <int TILE_M, int TILE_N, int HELD_STEPS = 0>
__device__ __forceinline__ void multiply_q_k(float (&s)[TILE_N / 2], const MatrixDescriptor& q, const MatrixDescriptor& k,
                                             const HeldQ<HELD_STEPS>& held = {}) {
#pragma unroll
  for (int step = 0; step < HEAD_DIM / DEPTH; ++step) {
    const int block = step / (BLOCK_COLUMNS / DEPTH), bytes = step % (BLOCK_COLUMNS / DEPTH) * DEPTH * 2;
    const MatrixDescriptor k_step = k.at(block * TILE_N * ROW_BYTES + bytes);
    if (step < HELD_STEPS)
      Wgmma<TILE_N>::template registers<true>(s, &held.pairs[step * 4], k_step, step > 0);
    else
      Wgmma<TILE_N>::shared(s, q.at(block * TILE_M * ROW_BYTES + bytes), k_step, step > 0);
  }
}

// O += P @ V; O = P @ V unless `add`
template <int PAIRS>
__device__ __forceinline__ void multiply_p_v(float (&o)[OUTPUTS], const unsigned (&p)[PAIRS],
                                             const MatrixDescriptor& v, bool add) {
#pragma unroll
  for (int step = 0; step < PAIRS / 4; ++step)
    Wgmma<HEAD_DIM>::registers(o, &p[4 * step], v.at(step * DEPTH * ROW_BYTES), add || step > 0);
}

// O / l of a warp's rows to shared memory, where the same rows of Q stood in a tile of TILE_M, for a tensor copy to take from
// there. A row that saw no key gives 0.
template <int TILE_M>
__device__ __forceinline__ void stage_out(unsigned char* out_smem, int warp_row, int lane, const float (&o)[OUTPUTS],
                                          const float (&row_sum)[2]) {
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) inverse[r] = row_sum[r] == 0.f ? 0.f : rcp_approx(row_sum[r]);
  int own_row = warp_row + lane % 16;
  asm volatile("" : "+r"(own_row));  // addresses are worked out here, and kept in no register before
#pragma unroll
  for (int step = 0; step < HEAD_DIM / DEPTH; ++step) {
    unsigned pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#ifdef FLASHCORE_INVARIANT
      pairs[i] = pack_pair(normalised(o[step * 8 + 2 * i], inverse[i % 2]), normalised(o[step * 8 + 2 * i + 1], inverse[i % 2]));
#else
      pairs[i] = pack_pair(o[step * 8 + 2 * i] * inverse[i % 2], o[step * 8 + 2 * i + 1] * inverse[i % 2]);
#endif
    const int block = step / (BLOCK_COLUMNS / DEPTH), piece = step % (BLOCK_COLUMNS / DEPTH) * 2 + lane / 16;
    store_matrices(out_smem + (block * TILE_M + own_row) * ROW_BYTES + (piece ^ own_row % 8) * 16, pairs);
  }
  fence_proxy_async();  // waits for all that the thread has written anywhere: so nothing goes to global memory before
}

// m + ln(l) of a row; minus infinity where it saw no key. reference: what was subtracted, of the base-2 logarithm.
__device__ __forceinline__ float log_sum_exp(float reference, float row_sum) {
  return (reference + lg2_approx(row_sum)) * LN_2;
}

// The lse of a thread's two rows to global memory.
__device__ __forceinline__ void store_lse(const AttentionParams& params, const Tile& tile, int row, int lane,
                                          const float (&lse)[2]) {
  float* head_gmem = params.lse_gmem + (Index(tile.batch) * params.num_heads_q + tile.head) * params.seqlen_q;
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (row_exists(params, row + 8 * r) && lane % 4 == 0) head_gmem[row + 8 * r] = lse[r];
}
