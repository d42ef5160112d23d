// The stages between the two products of the cuBLASLt path ('Phase 3B'): mask, online softmax, and the last division.
//
// Not a rung of the ladder but the other design: cuBLASLt makes Q K^T of a page and P V of a page, and these kernels do
// what lies between, on scores that went through memory. One warp a query row, a row of the page in its registers.
// Slow at: being there at all. A score is written, read, and written again as a probability, and read once more.
//
// Variants: head_dim 64 128, dtype float16 bfloat16
#include "attention.cuh"
#include "ptx.cuh"
#include "trace.cuh"

constexpr int WARP = 32;
constexpr int ROWS = 8;                          // query rows a block, one warp each
constexpr int VECTOR = 16 / sizeof(Element);     // keys a lane takes at a time
constexpr int STEP = WARP * VECTOR;              // keys a warp takes at a time

// The order and types of these fields are the launch contract; the host packs a struct of the same layout.
struct PageParams {
  const void* scores_gmem;  // [heads, seqlen_q, row_stride]: softmax_scale * Q @ K^T of this page, not masked
  Element* probs_gmem;      // [heads, seqlen_q, row_stride]; may lie over 16-bit scores
  float* row_max_gmem;      // [heads, seqlen_q]
  float* row_sum_gmem;      // [heads, seqlen_q]
  float* accum_gmem;        // [heads, seqlen_q, HEAD_DIM]
  Index row_stride;         // elements from one row of scores or probabilities to the next, a multiple of 8
  int first_head;           // the flat query head (batch * num_heads_q + head) that head 0 of these arrays is
  int first_row;            // rows before it see no key of this page
  int page;                 // number of the page in order of visit; 0 starts the softmax
  int first_key;
  int keys;                 // in this page
  int num_heads;            // in this launch
};

extern "C" __device__ const LaunchShape page_softmax_shape = {ROWS, STEP, ROWS * WARP, 0};

__device__ __forceinline__ float warp_max(float x) {
  for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Eight scores as floats, from 16-bit or 32-bit memory.
__device__ __forceinline__ void load_scores(const Element* src_gmem, float (&dst)[VECTOR]) {
  const uint4 packed = *reinterpret_cast<const uint4*>(src_gmem);
  const Element* elements = reinterpret_cast<const Element*>(&packed);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) dst[i] = to_float(elements[i]);
}
__device__ __forceinline__ void load_scores(const float* src_gmem, float (&dst)[VECTOR]) {
#pragma unroll
  for (int i = 0; i < VECTOR; i += 4)
    *reinterpret_cast<float4*>(&dst[i]) = *reinterpret_cast<const float4*>(src_gmem + i);
}

// One row of one page: STEPS * STEP keys at most, all of them in the warp's registers.
template <typename Score, int STEPS>
__device__ __forceinline__ void softmax_row(const AttentionParams& params, const PageParams& page TRACE_PARAM) {
  const int warp = threadIdx.x / WARP;
  const int lane = threadIdx.x % WARP;
  const int blocks = (params.seqlen_q - page.first_row + ROWS - 1) / ROWS;  // a head
  const int row = page.first_row + blockIdx.x % blocks * ROWS + warp;
  if (row >= params.seqlen_q) return;
  const int head = blockIdx.x / blocks;
  const int keys_here = min(visible_keys(params, row) - page.first_key, page.keys);
  const Index row_here = Index(head) * params.seqlen_q + row;
  const Index row_in_page = row_here * page.row_stride;
  const Score* scores_row = static_cast<const Score*>(page.scores_gmem) + row_in_page;

  // S, masked
  float s[STEPS][VECTOR];
  float page_max = -INFINITY;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const int first = step * STEP + lane * VECTOR;
    if (first < keys_here) {
      load_scores(scores_row + first, s[step]);
    }
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      s[step][i] = first + i < keys_here ? s[step][i] : -INFINITY;
      page_max = fmaxf(page_max, s[step][i]);
    }
  }

  // m = max(m, rowmax(S)); while a row has seen no key, 0 stands in for -inf, since -inf - (-inf) is NaN
  const float old_max = page.page == 0 ? -INFINITY : page.row_max_gmem[row_here];
  const float new_max = fmaxf(old_max, warp_max(page_max));
  const float reference = new_max == -INFINITY ? 0.f : new_max;
  const float rescale = ex2_approx((old_max - reference) * LOG2_E);

  // P = exp(S - m)
  // l = rescale * l + rowsum(P)
  Element* probs_row = page.probs_gmem + row_in_page;
  float page_sum = 0.f;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const int first = step * STEP + lane * VECTOR;
    unsigned packed[VECTOR / 2];
#pragma unroll
    for (int i = 0; i < VECTOR; i += 2) {
      const float even = ex2_approx((s[step][i] - reference) * LOG2_E);
      const float odd = ex2_approx((s[step][i + 1] - reference) * LOG2_E);
      page_sum += even + odd;
      packed[i / 2] = pack_pair(even, odd);
    }
    if (first < page.keys) *reinterpret_cast<uint4*>(probs_row + first) = *reinterpret_cast<const uint4*>(packed);
  }
  const float old_sum = page.page == 0 ? 0.f : page.row_sum_gmem[row_here];
  const float row_sum = rescale * old_sum + warp_sum(page_sum);
  if (lane == 0) {
    page.row_max_gmem[row_here] = new_max;
    page.row_sum_gmem[row_here] = row_sum;
  }

  // O = rescale * O; the product with V adds to it. Page 0 has nothing to rescale: its product starts from zero.
  if (page.page > 0 && rescale != 1.f) {
    float* accum_row = page.accum_gmem + row_here * HEAD_DIM;
    for (int d = lane; d < HEAD_DIM; d += WARP) accum_row[d] *= rescale;
  }

  TRACE({
    const Index trace_row = (Index(page.first_head) * params.seqlen_q + row_here) * params.seqlen_k + page.first_key;
    for (int step = 0; step < STEPS; ++step) {
      for (int i = 0; i < VECTOR; ++i) {
        const int key = step * STEP + lane * VECTOR + i;
        if (key < page.keys) {
          trace.scores[trace_row + key] = s[step][i];
          trace.probs[trace_row + key] = to_float(probs_row[key]);
        }
      }
    }
    if (lane == 0) {
      const Index page_row =
          (Index(page.first_head + head) * trace.pages + page.page) * params.seqlen_q + row;
      trace.row_max[page_row] = new_max;
      trace.rescale[page_row] = rescale;
      trace.row_sum[page_row] = row_sum;
    }
  })
}

#ifdef FLASHCORE_TRACE
#define TRACE_ARGUMENT , trace
#else
#define TRACE_ARGUMENT
#endif

// One entry for each kind of scores and each most number of keys: page_softmax_<16 or 32 bits>_<keys>.
#define PAGE_SOFTMAX(BITS, SCORE, KEYS)                                              \
  extern "C" __global__ void __launch_bounds__(ROWS* WARP) page_softmax_##BITS##_##KEYS( \
      const AttentionParams params, const PageParams page TRACE_PARAM) {             \
    softmax_row<SCORE, KEYS / STEP>(params, page TRACE_ARGUMENT);                    \
  }
PAGE_SOFTMAX(16, Element, 256)
PAGE_SOFTMAX(16, Element, 512)
PAGE_SOFTMAX(16, Element, 1024)
PAGE_SOFTMAX(16, Element, 2048)
PAGE_SOFTMAX(32, float, 256)
PAGE_SOFTMAX(32, float, 512)
PAGE_SOFTMAX(32, float, 1024)
PAGE_SOFTMAX(32, float, 2048)

// O / l and lse, one warp a row; a row that saw no key gives 0, and lse -inf
extern "C" __global__ void __launch_bounds__(ROWS* WARP)
    page_finish(const AttentionParams params, const PageParams page TRACE_PARAM) {
  const int lane = threadIdx.x % WARP;
  const Index row_here = Index(blockIdx.x) * ROWS + threadIdx.x / WARP;
  if (row_here >= Index(page.num_heads) * params.seqlen_q) return;
  const Index flat_head = page.first_head + row_here / params.seqlen_q;
  const Index row = row_here % params.seqlen_q;
  const float row_sum = page.row_sum_gmem[row_here];
  const float inverse_sum = row_sum == 0.f ? 0.f : 1.f / row_sum;
  const float* accum_row = page.accum_gmem + row_here * HEAD_DIM;
  Element* out_row = params.out_gmem + flat_head / params.num_heads_q * params.out.batch +
                     flat_head % params.num_heads_q * params.out.head + row * params.out.row;
  for (int d = 2 * lane; d < HEAD_DIM; d += 2 * WARP) {
    const float2 pair = *reinterpret_cast<const float2*>(accum_row + d);
    *reinterpret_cast<unsigned*>(out_row + d) = pack_pair(pair.x * inverse_sum, pair.y * inverse_sum);
  }
  if (lane == 0)
    params.lse_gmem[flat_head * params.seqlen_q + row] =
        row_sum == 0.f ? -INFINITY : page.row_max_gmem[row_here] + logf(row_sum);
}
