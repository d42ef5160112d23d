// Attention on Tensor Cores through nvcuda::wmma, with an online softmax, in one kernel ('Phase 3A', right this time).
//
// Adds to attention_scalar: both products on Tensor Cores, K and V pages copied ahead with cp.async, and 32 query rows
// a warp, so that a fragment of K or V is used twice. The layout of a WMMA fragment is not specified, and the kernel
// needs none: scores pass through shared memory, where lane r owns row r of its warp, and the rows that a lane's
// accumulator elements belong to are read out of the hardware once, by loading a matrix that holds row numbers.
// Slow at: scores and probabilities cost 12 bytes of shared-memory traffic each, and a warp does its softmax and its
// products one after the other; only other warps fill the gaps.
//
// Variants: head_dim 64 128, dtype float16 bfloat16
#include <mma.h>

#include "attention.cuh"
#include "ptx.cuh"
#include "trace.cuh"

namespace wmma = nvcuda::wmma;

constexpr int WARP = 32;
constexpr int WARPS = 4;
constexpr int FRAGMENT = 16;                          // rows, columns and depth of a WMMA product
constexpr int WARP_ROWS = 32;                         // query rows a warp: one a lane
constexpr int TILE_M = WARPS * WARP_ROWS;             // query rows a block
constexpr int TILE_N = HEAD_DIM == 64 ? 64 : 32;      // keys a page: a row's scores have to fit a lane's registers
constexpr int NUM_SLOTS = 2;                          // pages of K and V in flight
constexpr int ROW_BLOCKS = WARP_ROWS / FRAGMENT;      // fragments down a warp's rows
constexpr int KEY_BLOCKS = TILE_N / FRAGMENT;         // fragments along a page's keys
constexpr int HEAD_BLOCKS = HEAD_DIM / FRAGMENT;      // fragments along the head
constexpr int COPY = 16 / sizeof(Element);            // elements in one 16-byte copy
constexpr int KV_STRIDE = HEAD_DIM + COPY;            // 16 bytes of padding: eight rows start in different banks
constexpr int SCORE_STRIDE = TILE_N + 4;              // floats; a row's probabilities overwrite its scores
constexpr int PROB_STRIDE = 2 * SCORE_STRIDE;         // the same rows, counted in elements
static_assert(WARP_ROWS == WARP, "lane r owns row r of its warp");
static_assert(HEAD_DIM % TILE_N == 0, "the output leaves through the score buffer, TILE_N columns at a time");

using FragmentQ = wmma::fragment<wmma::matrix_a, FRAGMENT, FRAGMENT, FRAGMENT, Element, wmma::row_major>;
using FragmentK = wmma::fragment<wmma::matrix_b, FRAGMENT, FRAGMENT, FRAGMENT, Element, wmma::col_major>;
using FragmentP = wmma::fragment<wmma::matrix_a, FRAGMENT, FRAGMENT, FRAGMENT, Element, wmma::row_major>;
using FragmentV = wmma::fragment<wmma::matrix_b, FRAGMENT, FRAGMENT, FRAGMENT, Element, wmma::row_major>;
using FragmentAccum = wmma::fragment<wmma::accumulator, FRAGMENT, FRAGMENT, FRAGMENT, float>;

struct SharedMemory {
  alignas(128) Element q[TILE_M][KV_STRIDE];
  alignas(128) Element k[NUM_SLOTS][TILE_N][KV_STRIDE];
  alignas(128) Element v[NUM_SLOTS][TILE_N][KV_STRIDE];
  alignas(128) float scores[WARPS][WARP_ROWS][SCORE_STRIDE];
};

extern "C" __device__ const LaunchShape attention_wmma_shape = {TILE_M, TILE_N, WARPS * WARP, sizeof(SharedMemory)};

// Start copying ROWS rows of Q, K or V; rows past `rows_left` become zeros.
template <int ROWS>
__device__ __forceinline__ void copy_rows(Element (*dst_smem)[KV_STRIDE], const Element* src_gmem, Index row_stride,
                                          int rows_left) {
  constexpr int COPIES = HEAD_DIM / COPY;  // a row
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * COPIES; i += WARPS * WARP) {
    const int row = i / COPIES, column = i % COPIES * COPY;
    const bool exists = row < rows_left;
    cp_async_16(&dst_smem[row][column], src_gmem + (exists ? row * row_stride + column : 0), exists ? 16 : 0);
  }
}

// The row within a 16 x 16 block that each of this lane's accumulator elements belongs to.
__device__ __forceinline__ void read_element_rows(float* scratch_smem, int lane, int (&element_row)[8]) {
  static_assert(FragmentAccum::num_elements == 8, "a warp holds 256 accumulator elements, eight a lane");
  for (int i = lane; i < FRAGMENT * FRAGMENT; i += WARP) scratch_smem[i] = i / FRAGMENT;
  __syncwarp();
  FragmentAccum rows;
  wmma::load_matrix_sync(rows, scratch_smem, FRAGMENT, wmma::mem_row_major);
#pragma unroll
  for (int i = 0; i < 8; ++i) element_row[i] = static_cast<int>(rows.x[i]);
  __syncwarp();
}

// Multiply each row of a fragment by the factor that its owning lane holds.
__device__ __forceinline__ void scale_rows(FragmentAccum (&accum)[ROW_BLOCKS][HEAD_BLOCKS],
                                           const int (&element_row)[8], float factor) {
#pragma unroll
  for (int r = 0; r < ROW_BLOCKS; ++r) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float row_factor = __shfl_sync(~0u, factor, r * FRAGMENT + element_row[i]);
#pragma unroll
      for (int h = 0; h < HEAD_BLOCKS; ++h) accum[r][h].x[i] *= row_factor;
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    attention_wmma(const AttentionParams params TRACE_PARAM) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  SharedMemory& smem = *reinterpret_cast<SharedMemory*>(shared_bytes);

  const int warp = threadIdx.x / WARP;
  const int lane = threadIdx.x % WARP;
  const Tile tile = tile_by_number(params, TILE_M, blockIdx.x);
  const int warp_first_row = tile.first_row + warp * WARP_ROWS;
  const int row = warp_first_row + lane;
  const bool row_exists = row < params.seqlen_q;
  const int keys = row_exists ? visible_keys(params, row) : 0;
  const int last_row = min(tile.first_row + TILE_M, params.seqlen_q) - 1;
  const int pages = (visible_keys(params, last_row) + TILE_N - 1) / TILE_N;
  // Never quite zero: a scale of zero must leave masked scores at -inf, and -inf * 0 is NaN.
  const float scale_log2 = fmaxf(fabsf(params.softmax_scale) * LOG2_E, SMALLEST_NORMAL);
  TRACE(const TraceRow stage(trace, params, tile, row);)

  const Element* q_tile =
      params.q_gmem + tile.batch * params.q.batch + tile.head * params.q.head + tile.first_row * params.q.row;
  const Element* k_head = params.k_gmem + tile.batch * params.k.batch + tile.head_kv * params.k.head;
  const Element* v_head = params.v_gmem + tile.batch * params.v.batch + tile.head_kv * params.v.head;
  float(*scores)[SCORE_STRIDE] = smem.scores[warp];

  copy_rows<TILE_M>(smem.q, q_tile, params.q.row, params.seqlen_q - tile.first_row);
  if (pages > 0) {
    copy_rows<TILE_N>(smem.k[0], k_head, params.k.row, params.seqlen_k);
    copy_rows<TILE_N>(smem.v[0], v_head, params.v.row, params.seqlen_k);
  }
  cp_async_commit();

  int element_row[8];
  read_element_rows(&scores[0][0], lane, element_row);
  if (params.softmax_scale < 0.f) {
    // The sign of the scale goes into Q, exactly, so that the largest product is the largest score.
    cp_async_wait<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < TILE_M * HEAD_DIM; i += WARPS * WARP)
      smem.q[i / HEAD_DIM][i % HEAD_DIM] = -smem.q[i / HEAD_DIM][i % HEAD_DIM];
  }

  float row_max = -INFINITY;  // of the unscaled products
  float row_sum = 0.f;
  FragmentAccum accum[ROW_BLOCKS][HEAD_BLOCKS];
#pragma unroll
  for (int r = 0; r < ROW_BLOCKS; ++r) {
#pragma unroll
    for (int h = 0; h < HEAD_BLOCKS; ++h) wmma::fill_fragment(accum[r][h], 0.f);
  }

  for (int page = 0; page < pages; ++page) {
    const int slot = page % NUM_SLOTS;
    const int first_key = page * TILE_N;

    cp_async_wait<0>();
    __syncthreads();  // this page has arrived, and everyone is done with the other slot
    if (page + 1 < pages) {
      const int next_key = first_key + TILE_N;
      copy_rows<TILE_N>(smem.k[1 - slot], k_head + next_key * params.k.row, params.k.row, params.seqlen_k - next_key);
      copy_rows<TILE_N>(smem.v[1 - slot], v_head + next_key * params.v.row, params.v.row, params.seqlen_k - next_key);
    }
    cp_async_commit();

    // S = Q @ K^T
    FragmentAccum s[ROW_BLOCKS][KEY_BLOCKS];
#pragma unroll
    for (int r = 0; r < ROW_BLOCKS; ++r) {
#pragma unroll
      for (int n = 0; n < KEY_BLOCKS; ++n) wmma::fill_fragment(s[r][n], 0.f);
    }
#pragma unroll
    for (int h = 0; h < HEAD_BLOCKS; ++h) {
      FragmentQ q[ROW_BLOCKS];
#pragma unroll
      for (int r = 0; r < ROW_BLOCKS; ++r)
        wmma::load_matrix_sync(q[r], &smem.q[warp * WARP_ROWS + r * FRAGMENT][h * FRAGMENT], KV_STRIDE);
#pragma unroll
      for (int n = 0; n < KEY_BLOCKS; ++n) {
        FragmentK k;
        wmma::load_matrix_sync(k, &smem.k[slot][n * FRAGMENT][h * FRAGMENT], KV_STRIDE);
#pragma unroll
        for (int r = 0; r < ROW_BLOCKS; ++r) wmma::mma_sync(s[r][n], q[r], k, s[r][n]);
      }
    }
#pragma unroll
    for (int r = 0; r < ROW_BLOCKS; ++r) {
#pragma unroll
      for (int n = 0; n < KEY_BLOCKS; ++n)
        wmma::store_matrix_sync(&scores[r * FRAGMENT][n * FRAGMENT], s[r][n], SCORE_STRIDE, wmma::mem_row_major);
    }
    __syncwarp();

    // From here to the next barrier of the warp, a lane works on its own row alone.
    float s_rmem[TILE_N];
#pragma unroll
    for (int n = 0; n < TILE_N; n += 4)
      *reinterpret_cast<float4*>(&s_rmem[n]) = *reinterpret_cast<const float4*>(&scores[lane][n]);

    // The mask: only the last pages of a row have keys that it does not see.
    const int keys_here = keys - first_key;
    if (keys_here < TILE_N) {
#pragma unroll
      for (int n = 0; n < TILE_N; ++n) s_rmem[n] = n < keys_here ? s_rmem[n] : -INFINITY;
    }
    TRACE(if (row_exists) {
      for (int n = 0; n < TILE_N && first_key + n < params.seqlen_k; ++n)
        stage.score(first_key + n, s_rmem[n] == -INFINITY ? -INFINITY : s_rmem[n] * fabsf(params.softmax_scale));
    })

    // m = max(m, rowmax(S)); while a row has seen no key, 0 stands in for -inf, since -inf - (-inf) is NaN
    float new_max = row_max;
#pragma unroll
    for (int n = 0; n < TILE_N; ++n) new_max = fmaxf(new_max, s_rmem[n]);
    const float reference = new_max == -INFINITY ? 0.f : new_max * scale_log2;
    const float rescale = ex2_approx(row_max * scale_log2 - reference);
    row_max = new_max;

    // P = exp(scale * S - m), written over the scores of the same row
    // l = rescale * l + rowsum(P)
    float page_sum = 0.f;
    unsigned* probs = reinterpret_cast<unsigned*>(&scores[lane][0]);
#pragma unroll
    for (int n = 0; n < TILE_N; n += 8) {
      unsigned packed[4];
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const float even = ex2_approx(s_rmem[n + i] * scale_log2 - reference);
        const float odd = ex2_approx(s_rmem[n + i + 1] * scale_log2 - reference);
        page_sum += even + odd;
        packed[i / 2] = pack_pair(even, odd);
      }
      *reinterpret_cast<uint4*>(&probs[n / 2]) = *reinterpret_cast<const uint4*>(packed);
    }
    row_sum = rescale * row_sum + page_sum;
    __syncwarp();

    // O = rescale * O, skipped while no row of the warp has a new maximum
    if (__any_sync(~0u, rescale != 1.f)) scale_rows(accum, element_row, rescale);

    // O += P @ V
#pragma unroll
    for (int n = 0; n < KEY_BLOCKS; ++n) {
      FragmentP p[ROW_BLOCKS];
#pragma unroll
      for (int r = 0; r < ROW_BLOCKS; ++r)
        wmma::load_matrix_sync(p[r], reinterpret_cast<const Element*>(&scores[r * FRAGMENT][0]) + n * FRAGMENT,
                               PROB_STRIDE);
#pragma unroll
      for (int h = 0; h < HEAD_BLOCKS; ++h) {
        FragmentV v;
        wmma::load_matrix_sync(v, &smem.v[slot][n * FRAGMENT][h * FRAGMENT], KV_STRIDE);
#pragma unroll
        for (int r = 0; r < ROW_BLOCKS; ++r) wmma::mma_sync(accum[r][h], p[r], v, accum[r][h]);
      }
    }
    TRACE(if (row_exists) {
      const Element* row_probs = reinterpret_cast<const Element*>(probs);
      for (int n = 0; n < TILE_N && first_key + n < params.seqlen_k; ++n)
        stage.prob(first_key + n, to_float(row_probs[n]));
      stage.row_max(page, row_max == -INFINITY ? -INFINITY : row_max * fabsf(params.softmax_scale));
      stage.rescale(page, rescale);
      stage.row_sum(page, row_sum);
    } for (int r = 0; r < ROW_BLOCKS; ++r) for (int h = 0; h < HEAD_BLOCKS; ++h) {
      const TraceRow first(trace, params, tile, warp_first_row + r * FRAGMENT);
      wmma::store_matrix_sync(first.accum_row(page) + h * FRAGMENT, accum[r][h], HEAD_DIM, wmma::mem_row_major);
    })
    __syncwarp();  // the probabilities are read; the next page's scores may overwrite them
  }

  // O / l; a row that saw no key gives 0, and lse -inf
  scale_rows(accum, element_row, row_sum == 0.f ? 0.f : 1.f / row_sum);
  if (row_exists) {
    const Index lse_row = (Index(tile.batch) * params.num_heads_q + tile.head) * params.seqlen_q + row;
    params.lse_gmem[lse_row] =
        row_sum == 0.f ? -INFINITY : row_max * fabsf(params.softmax_scale) + logf(row_sum);
  }

  // Fragments -> shared memory -> whole 16-byte pieces of rows
  Element* out_head = params.out_gmem + tile.batch * params.out.batch + tile.head * params.out.head;
  for (int first_column = 0; first_column < HEAD_DIM; first_column += TILE_N) {
#pragma unroll
    for (int r = 0; r < ROW_BLOCKS; ++r) {
#pragma unroll
      for (int h = 0; h < HEAD_BLOCKS; ++h) {
        const int column = h * FRAGMENT - first_column;
        if (column >= 0 && column < TILE_N)
          wmma::store_matrix_sync(&scores[r * FRAGMENT][column], accum[r][h], SCORE_STRIDE, wmma::mem_row_major);
      }
    }
    __syncwarp();
    constexpr int PIECES = TILE_N / COPY;  // a row
    for (int i = lane; i < WARP_ROWS * PIECES; i += WARP) {
      const int r = i / PIECES, column = i % PIECES * COPY;
      if (warp_first_row + r < params.seqlen_q) {
        unsigned packed[4];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair)
          packed[pair] = pack_pair(scores[r][column + 2 * pair], scores[r][column + 2 * pair + 1]);
        *reinterpret_cast<uint4*>(out_head + (warp_first_row + r) * params.out.row + first_column + column) =
            *reinterpret_cast<const uint4*>(packed);
      }
    }
    __syncwarp();
  }
}
