// The readable truth: attention on plain floating-point units, one warp a query row.
//
// Adds to nothing: this is the first rung. Every stage of the online softmax stands below as one line of maths, and
// each lane's part in it is plain: for Q K^T a lane owns a key of the page, for P V it owns columns of the head.
// Slow at: everything. One multiply-add needs one shared-memory read, and the Tensor Cores are idle.
//
// Variants: head_dim 64 128, dtype float16 bfloat16
#include "attention.cuh"
#include "ptx.cuh"
#include "trace.cuh"

constexpr int WARP = 32;
constexpr int TILE_M = 8;                     // query rows a block, one warp each
constexpr int TILE_N = WARP;                  // keys a page, one lane each
constexpr int COLUMNS = HEAD_DIM / WARP;      // columns of the head that a lane accumulates
constexpr int K_STRIDE = HEAD_DIM + 2;        // an odd number of 4-byte banks, so that lanes read 32 different ones

extern "C" __device__ const LaunchShape attention_scalar_shape = {TILE_M, TILE_N, TILE_M * WARP, 0};

__device__ __forceinline__ float warp_max(float x) {
  for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

extern "C" __global__ void __launch_bounds__(TILE_M* WARP) attention_scalar(const AttentionParams params TRACE_PARAM) {
  __shared__ float q_smem[TILE_M][HEAD_DIM];
  __shared__ Element k_smem[TILE_N][K_STRIDE];
  __shared__ Element v_smem[TILE_N][HEAD_DIM];

  const int warp = threadIdx.x / WARP;
  const int lane = threadIdx.x % WARP;
  const Tile tile = tile_by_number(params, TILE_M, blockIdx.x);
  const int row = tile.first_row + warp;
  const bool row_exists = row < params.seqlen_q;
  const int keys = row_exists ? visible_keys(params, row) : 0;
  const int last_row = min(tile.first_row + TILE_M, params.seqlen_q) - 1;
  const int pages = (visible_keys(params, last_row) + TILE_N - 1) / TILE_N;
  TRACE(const TraceRow stage(trace, params, tile, row);)

  const Element* q_row = params.q_gmem + tile.batch * params.q.batch + tile.head * params.q.head + row * params.q.row;
  const Element* k_head = params.k_gmem + tile.batch * params.k.batch + tile.head_kv * params.k.head;
  const Element* v_head = params.v_gmem + tile.batch * params.v.batch + tile.head_kv * params.v.head;

  for (int d = lane; d < HEAD_DIM; d += WARP) q_smem[warp][d] = row_exists ? to_float(q_row[d]) : 0.f;

  float row_max = -INFINITY;
  float row_sum = 0.f;
  float accum[COLUMNS] = {};

  for (int page = 0; page < pages; ++page) {
    const int first_key = page * TILE_N;

    __syncthreads();  // the page before is done with
    for (int i = threadIdx.x; i < TILE_N * HEAD_DIM; i += blockDim.x) {
      const int key = i / HEAD_DIM, d = i % HEAD_DIM;
      const bool key_exists = first_key + key < params.seqlen_k;
      const Element zero = from_float<Element>(0.f);
      k_smem[key][d] = key_exists ? k_head[(first_key + key) * params.k.row + d] : zero;
      v_smem[key][d] = key_exists ? v_head[(first_key + key) * params.v.row + d] : zero;
    }
    __syncthreads();

    // S = scale * Q @ K^T, masked
    float score = 0.f;
    for (int d = 0; d < HEAD_DIM; ++d) score += q_smem[warp][d] * to_float(k_smem[lane][d]);
    score = first_key + lane < keys ? score * params.softmax_scale : -INFINITY;

    // m = max(m, rowmax(S)); while a row has seen no key, 0 stands in for -inf, since -inf - (-inf) is NaN
    const float new_max = fmaxf(row_max, warp_max(score));
    const float reference = new_max == -INFINITY ? 0.f : new_max;
    const float rescale = ex2_approx((row_max - reference) * LOG2_E);
    row_max = new_max;

    // P = exp(S - m), rounded as the product with V takes it
    const float prob = ex2_approx((score - reference) * LOG2_E);
    const float prob_rounded = to_float(from_float<Element>(prob));

    // l = rescale * l + rowsum(P)
    row_sum = rescale * row_sum + warp_sum(prob);

    // O = rescale * O + P @ V
    for (int c = 0; c < COLUMNS; ++c) accum[c] *= rescale;
    for (int key = 0; key < TILE_N; ++key) {
      const float p = __shfl_sync(~0u, prob_rounded, key);
      for (int c = 0; c < COLUMNS; ++c) accum[c] += p * to_float(v_smem[key][c * WARP + lane]);
    }

    TRACE(if (row_exists) {
      if (first_key + lane < params.seqlen_k) {
        stage.score(first_key + lane, score);
        stage.prob(first_key + lane, prob_rounded);
      }
      if (lane == 0) {
        stage.row_max(page, row_max);
        stage.rescale(page, rescale);
        stage.row_sum(page, row_sum);
      }
      for (int c = 0; c < COLUMNS; ++c) stage.accum_row(page)[c * WARP + lane] = accum[c];
    })
  }

  if (!row_exists) return;
  // O / l; a row that saw no key gives 0, and lse -inf
  const float inverse_sum = row_sum == 0.f ? 0.f : 1.f / row_sum;
  Element* out_row =
      params.out_gmem + tile.batch * params.out.batch + tile.head * params.out.head + row * params.out.row;
  for (int c = 0; c < COLUMNS; ++c) out_row[c * WARP + lane] = from_float<Element>(accum[c] * inverse_sum);
  if (lane == 0) {
    const Index lse_row = (Index(tile.batch) * params.num_heads_q + tile.head) * params.seqlen_q + row;
    params.lse_gmem[lse_row] = row_sum == 0.f ? -INFINITY : row_max + logf(row_sum);
  }
}
