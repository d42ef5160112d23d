// What every attention kernel here is told: tensors with their strides, lengths, mask and scale.
//
// Compiled with
//   FLASHCORE_HEAD_DIM   elements in a head: 64 or 128
//   FLASHCORE_BF16       1 for __nv_bfloat16 tensors, 0 for __half
//   FLASHCORE_TRACE      defined in the second compilation only, which stores every stage (trace.cuh)
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef FLASHCORE_HEAD_DIM
#error "FLASHCORE_HEAD_DIM must be defined: the elements in a head, 64 or 128"
#endif
#ifndef FLASHCORE_BF16
#error "FLASHCORE_BF16 must be defined: 1 for bfloat16 tensors, 0 for float16"
#endif

constexpr int HEAD_DIM = FLASHCORE_HEAD_DIM;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "head_dim is 64 or 128: tile shapes are chosen for these two");

#if FLASHCORE_BF16
using Element = __nv_bfloat16;
#else
using Element = __half;
#endif

using Index = long long;  // offsets in elements: tensors may hold more than 2^31 of them

// Offsets in elements; the last dimension is contiguous.
struct Strides {
  Index batch, head, row;
};

// The order and types of these fields are the launch contract; the host fills a struct of the same layout.
struct AttentionParams {
  const Element* q_gmem;  // [batch, num_heads_q,  seqlen_q, HEAD_DIM]
  const Element* k_gmem;  // [batch, num_heads_kv, seqlen_k, HEAD_DIM]
  const Element* v_gmem;  // [batch, num_heads_kv, seqlen_k, HEAD_DIM]
  Element* out_gmem;      // [batch, num_heads_q,  seqlen_q, HEAD_DIM]
  float* lse_gmem;        // [batch, num_heads_q,  seqlen_q], contiguous
  Strides q, k, v, out;
  int batch, num_heads_q, num_heads_kv, seqlen_q, seqlen_k;
  int causal;
  float softmax_scale;
};

// How a kernel wants to be launched. Each kernel exports one as `<kernel>_shape`, and the host reads it from the cubin,
// so that tile sizes are written down once.
struct LaunchShape {
  int tile_m;        // query rows a block
  int tile_n;        // keys a page
  int threads;       // a block
  int shared_bytes;  // dynamic shared memory a block
  int num_splits = 1;  // chains of pages, each with a softmax of its own: page j continues page j - num_splits
  int overlaps_launch = 0;  // 1: it waits by itself for the kernel ahead of it in the stream, and may start before
};

#define INFINITY __int_as_float(0x7f800000)  // NVRTC brings no <math.h>
constexpr float SMALLEST_NORMAL = 1.17549435e-38f;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// A tile of query rows: what a block works on.
struct Tile {
  int batch, head, head_kv, first_row;

  Tile() = default;
  __device__ Tile(const AttentionParams& params, int batch_head, int first_row) : first_row(first_row) {
    batch = batch_head / params.num_heads_q;
    head = batch_head - batch * params.num_heads_q;
    head_kv = head / (params.num_heads_q / params.num_heads_kv);
  }
};

// Tile `number` of the problem. Row tiles of one head are neighbours, so that they share K and V in L2; with a causal mask
// the tiles with most keys come first, so that none of them is left for last.
__device__ __forceinline__ Tile tile_by_number(const AttentionParams& params, int tile_m, int number) {
  const int tiles = (params.seqlen_q + tile_m - 1) / tile_m;
  const int tile = number % tiles;
  return Tile(params, number / tiles, (params.causal ? tiles - 1 - tile : tile) * tile_m);
}

// Whether a row is there: tiles may reach beyond either end.
__device__ __forceinline__ bool row_exists(const AttentionParams& params, int row) {
  return static_cast<unsigned>(row) < static_cast<unsigned>(params.seqlen_q);
}

// A query row sees key columns [0, visible_keys(row)), of the seqlen_k that there are. Causal masks are aligned bottom right.
__device__ __forceinline__ int visible_keys(const AttentionParams& params, int row, int seqlen_k) {
  if (!params.causal) return seqlen_k;
  return max(0, min(seqlen_k, row + 1 + seqlen_k - params.seqlen_q));
}
__device__ __forceinline__ int visible_keys(const AttentionParams& params, int row) {
  return visible_keys(params, row, params.seqlen_k);
}

// How many pages of `tile_n` keys rows [first_row, first_row + rows) see.
__device__ __forceinline__ int pages_of(const AttentionParams& params, int first_row, int rows, int tile_n, int seqlen_k) {
  if (first_row >= params.seqlen_q || first_row + rows <= 0) return 0;
  return (visible_keys(params, min(first_row + rows, params.seqlen_q) - 1, seqlen_k) + tile_n - 1) / tile_n;
}

// Of those, how many need neither a mask nor another sign: the others are the last ones, or all.
__device__ __forceinline__ int pages_as_they_are(const AttentionParams& params, int first_row, int tile_n, int seqlen_k) {
  return params.softmax_scale < 0.f ? 0 : visible_keys(params, first_row, seqlen_k) / tile_n;
}

__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Two floats rounded and packed into one 32-bit register, the first in the low half.
__device__ __forceinline__ unsigned pack_pair(float low, float high) {
#if FLASHCORE_BF16
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
#else
  const __half2 pair = __floats2half2_rn(low, high);
#endif
  return *reinterpret_cast<const unsigned*>(&pair);
}
