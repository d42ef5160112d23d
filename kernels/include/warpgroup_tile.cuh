// The two products of attention for the 64 query rows of a warpgroup, and the way of the result to global memory.
//
// Tiles lie in shared memory as the tensor copies leave them: [column block][row][64 columns], swizzled.
#pragma once
#include "tma.cuh"
#include "wgmma.cuh"

constexpr int WARP = 32;
constexpr int WARPGROUP = 4 * WARP;
constexpr int WARPGROUP_ROWS = 64;  // the M of wgmma
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
__device__ __forceinline__ void load_rows(unsigned char* dst_smem, const CUtensorMap& map, Mbarrier* full, int first_row,
                                          int head, int batch) {
  mbarrier_arrive_expect_tx(full, ROWS * HEAD_DIM * sizeof(Element));
#pragma unroll
  for (int block = 0; block < COLUMN_BLOCKS; ++block)
    tma_load_4d(dst_smem + block * ROWS * ROW_BYTES, map, full, block * BLOCK_COLUMNS, first_row, head, batch);
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

// The outcome of a thread's two rows: O / l to `out`, m + ln(l) to `lse`. A row that saw no key gives 0, and -inf.
// reference: what was subtracted, of the base-2 logarithm; row_sum: over this thread's columns.
__device__ __forceinline__ void store_rows(const AttentionParams& params, const Tile& tile, int row, int lane,
                                           const float (&o)[OUTPUTS], const float (&reference)[2],
                                           const float (&row_sum)[2]) {
  float inverse[2];
  Element* row_gmem[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(row_sum[r]);
    inverse[r] = sum == 0.f ? 0.f : __fdividef(1.f, sum);
    const int out_row = row + 8 * r;
    const bool exists = row_exists(params, out_row);
    row_gmem[r] = exists ? params.out_gmem + tile.batch * params.out.batch + tile.head * params.out.head +
                               out_row * params.out.row
                         : nullptr;
    if (exists && lane % 4 == 0) {
      const Index lse_row = (Index(tile.batch) * params.num_heads_q + tile.head) * params.seqlen_q + out_row;
      params.lse_gmem[lse_row] = sum == 0.f ? -INFINITY : reference[r] * LN_2 + logf(sum);
    }
  }
  store_out(o, inverse, row_gmem, lane);
}
