// The softmax of scores that arrive page by page, on the accumulators of wgmma, with a reference that goes stale.
//
// Softmax does not care which reference is subtracted. Each row takes the maximum of its first page and keeps it, and no
// maximum is computed after that. The sum of a page's probabilities is the guard: while it is small, every probability is
// finite in 16 bits. When it is not, the warp takes a new maximum and does the page again.
#pragma once
#include "trace.cuh"
#include "wgmma.cuh"
#ifdef FLASHCORE_MASKS
#include "masks.cuh"
#else
#define MASKED(...)
#endif
#ifdef FLASHCORE_INVARIANT
#include "chunks.cuh"
#else
#define INVARIANT(...)
#define CHUNKED(...)
#endif

// A probability above this would not be finite in 16 bits: the page's sum, which bounds each, has to stay below.
// bfloat16 has float's range; there the accumulator is what has to stay finite.
constexpr float LARGEST_PAGE_SUM = FLASHCORE_BF16 ? 1.8446744e19f : 32768.f;

// Scores as the softmax wants them: the sign of the scale in them, and minus infinity where a row does not see the key.
template <int SCORES>
__device__ __forceinline__ void sign_and_mask(float (&s)[SCORES], const AttentionParams& params, int row, int first_key,
                                              int seqlen_k, int lane) {
  const int keys[2] = {visible_keys(params, row, seqlen_k) - first_key, visible_keys(params, row + 8, seqlen_k) - first_key};
#pragma unroll
  for (int i = 0; i < SCORES; ++i) {
    const float score = params.softmax_scale < 0.f ? -s[i] : s[i];
    s[i] = column_of(i, lane) < keys[row_of(i)] ? score : -INFINITY;
  }
}

#if defined(FLASHCORE_MASKS) || defined(FLASHCORE_INVARIANT)
// The reference of a row that has seen no key yet: below every score, so that the first one it sees outgrows it.
constexpr float UNSEEN = -1e37f;
#endif

#ifdef FLASHCORE_MASKS
// The same for all masks; the sign is in scores that have a cap already.
template <int SCORES>
__device__ __forceinline__ void sign_and_mask(float (&s)[SCORES], const AttentionParams& params, const MaskParams& masks,
                                              int row, int first_key, int seqlen_q, int seqlen_k, int lane) {
  const Span spans[2] = {seen_by(masks, row, seqlen_q, seqlen_k), seen_by(masks, row + 8, seqlen_q, seqlen_k)};
#pragma unroll
  for (int i = 0; i < SCORES; ++i) {
    const float score = !HAS_SOFTCAP && params.softmax_scale < 0.f ? -s[i] : s[i];
    const int key = first_key + column_of(i, lane);
    s[i] = key >= spans[row_of(i)].begin && key < spans[row_of(i)].end ? score : -INFINITY;
  }
}

// A sink joins the sum of a row as one more key; returns the lse of them all. sink: the score in the units of the reference.
__device__ __forceinline__ float join_sink(float sink, float reference, float& row_sum) {
  constexpr float LARGEST_EXPONENT = 126.f;  // against an O that is finite, all of them are a weight of nothing
  const float highest = fmaxf(reference, sink);
  const float sum = row_sum * ex2_approx(reference - highest) + ex2_approx(sink - highest);
  row_sum += ex2_approx(fminf(sink - reference, LARGEST_EXPONENT));
  return highest <= UNSEEN ? -INFINITY : (highest + lg2_approx(sum)) * LN_2;
}
#endif

// The softmax of a thread's two rows, over the pages so far.
struct Softmax {
  float scale_log2;
  float reference[2];     // what is subtracted from scale_log2 * score
  float row_sum[2];       // of this thread's columns alone
  float rescale[2];       // what the last page multiplied the sums before it by

  __device__ explicit Softmax(float softmax_scale) {
    // Never quite zero: a scale of zero must leave masked scores at minus infinity, and infinity times zero is NaN.
    scale_log2 = fmaxf(fabsf(softmax_scale) * LOG2_E, SMALLEST_NORMAL);
    reference[0] = reference[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.f;
  }

  // P = exp2(scale_log2 * S - reference), and its sums over the page
  template <int SCORES>
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
  template <int SCORES, typename Rescale>
  __device__ __forceinline__ void raise_reference(const float (&s)[SCORES],
                                                  Rescale&& rescale_outputs INVARIANT(, const bool (&raises)[2])) {
    float row_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < SCORES; ++i) row_max[row_of(i)] = fmaxf(row_max[row_of(i)], s[i]);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float highest = fmaxf(reference[row], quad_max(row_max[row]) * scale_log2);
#ifdef FLASHCORE_INVARIANT
      const float raised = raises[row] ? fmaxf(highest, UNSEEN) : reference[row];
#else
      // A row that has seen no key subtracts 0, since -inf - (-inf) is NaN.
      const float raised = highest == -INFINITY ? 0.f MASKED(+ UNSEEN) : highest;
#endif
      rescale[row] = ex2_approx(reference[row] - raised);
      reference[row] = raised;
      row_sum[row] *= rescale[row];
    }
    rescale_outputs();
  }

#ifdef FLASHCORE_INVARIANT
  // Whether a row outgrows its reference on this page, in the columns of any of the four lanes that have it.
  __device__ __forceinline__ static bool outgrown(float page_sum) {
    const unsigned lanes = __ballot_sync(~0u, !(page_sum < LARGEST_PAGE_SUM));
    return lanes >> (threadIdx.x & 28) & 15;
  }
#endif

  // The softmax of the first page, with its own maximum for a reference.
  template <int SCORES>
  __device__ __forceinline__ void first(const float (&s)[SCORES], unsigned (&p)[SCORES / 2]) {
    raise_reference(s, [] {} INVARIANT(, {true, true}));
    exponentials(s, p, row_sum);
  }

#ifdef FLASHCORE_MASKS
  template <int TERMS>
  __device__ __forceinline__ static float slope_of(float square, const float (&series)[TERMS]) {
    float slope = series[TERMS - 1];
#pragma unroll
    for (int term = TERMS - 2; term >= 0; --term) slope = fmaf(square, slope, series[term]);
    return slope;
  }

  // P = exp2(softcap * log2(e) * tanh(scale * S / softcap) - reference) of scores without a mask, by a series for tanh. Largest
  // square among the scores.
  template <int SCORES, int TERMS>
  __device__ __forceinline__ float capped_exponentials(const float (&s)[SCORES], unsigned (&p)[SCORES / 2], float (&sums)[2],
                                                       const float (&series)[TERMS]) const {
    sums[0] = sums[1] = 0.f;
    int largest = 0;  // of squares, whose bits are in the order of their values
#pragma unroll
    for (int i = 0; i < SCORES; i += 2) {
      const int row = row_of(i);
      const float squares[2] = {s[i] * s[i], s[i + 1] * s[i + 1]};
      largest = __vimax3_s32(largest, __float_as_int(squares[0]), __float_as_int(squares[1]));
      const float left = ex2_approx(fmaf(s[i], slope_of(squares[0], series), -reference[row]));
      const float right = ex2_approx(fmaf(s[i + 1], slope_of(squares[1], series), -reference[row]));
      sums[row] += left;
      sums[row] += right;
      p[i / 2] = pack_pair(left, right);
    }
    return __int_as_float(largest);
  }

  // The softmax of a later page whose scores have no cap yet. `small` says whether the warp's scores were all small so far: it is
  // the products' registers that softmax waits for, so each instruction a score counts (kernels/README.md).
  template <int SCORES, int OUTPUTS>
  __device__ __forceinline__ void next_capped(float (&s)[SCORES], unsigned (&p)[SCORES / 2], float (&o)[OUTPUTS],
                                              const MaskParams& masks, bool& small) {
    float page_sum[2];
    bool near = true;
    if (small) small = __all_sync(~0u, capped_exponentials(s, p, page_sum, masks.small_series) <= masks.small_square);
    if (!small) near = capped_exponentials(s, p, page_sum, masks.series) <= masks.near_square;
    TRACE(rescale[0] = rescale[1] = 1.f;)
    const bool fits = page_sum[0] < LARGEST_PAGE_SUM && page_sum[1] < LARGEST_PAGE_SUM;  // NaN does not
    if (!__all_sync(~0u, near && fits)) {
      cap(s, masks.scale_by_cap);
      next(s, p, o);
      return;
    }
#ifdef FLASHCORE_TRACE
    for (float& score : s) {
      const float square = score * score;
      score *= (small ? slope_of(square, masks.small_series) : slope_of(square, masks.series)) * LN_2 / masks.softcap;
    }
#endif
    row_sum[0] += page_sum[0];
    row_sum[1] += page_sum[1];
  }
#endif

  // The softmax of a later page: with the reference as it is, or a new one should a row of the warp outgrow it.
  template <int SCORES, int OUTPUTS>
  __device__ __forceinline__ void next(const float (&s)[SCORES], unsigned (&p)[SCORES / 2], float (&o)[OUTPUTS]) {
    float page_sum[2];
    exponentials(s, p, page_sum);
    TRACE(rescale[0] = rescale[1] = 1.f;)
    const bool fits = page_sum[0] < LARGEST_PAGE_SUM && page_sum[1] < LARGEST_PAGE_SUM;  // NaN does not
    if (!__all_sync(~0u, fits)) {
      raise_reference(s, [&] {
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) o[i] *= rescale[row_of(i)];
      } INVARIANT(, {outgrown(page_sum[0]), outgrown(page_sum[1])}));
      exponentials(s, p, page_sum);
    }
    row_sum[0] += page_sum[0];
    row_sum[1] += page_sum[1];
  }
};

#ifdef FLASHCORE_TRACE
// The stages of the two rows of a thread, as they lie in the accumulators of wgmma.
struct AccumulatorTrace {
  const AttentionParams& params;
  TraceRow stage[2];
  bool exists[2];
  int visible[2];  // keys that the rows see
  int lane;
  int first_key;  // of the chain of pages that the softmax runs over
  MASKED(int begins[2] = {0, 0};)  // the first key that the rows see
  MASKED(float by_scale = 1.f;)    // what scores are stored multiplied by, besides the scale

  __device__ AccumulatorTrace(const TraceRow& row, const TraceRow& other, const bool (&exists)[2], const int (&visible)[2],
                              int lane, int first_key)
      : params(row.params), stage{row, other}, exists{exists[0], exists[1]}, visible{visible[0], visible[1]}, lane(lane),
        first_key(first_key) {}
  __device__ AccumulatorTrace(const TraceBuffers& trace, const AttentionParams& params, const Tile& tile, int row, int lane,
                              int first_key = 0)
      : AccumulatorTrace(TraceRow(trace, params, tile, row), TraceRow(trace, params, tile, row + 8),
                         {row_exists(params, row), row_exists(params, row + 8)},
                         {visible_keys(params, row), visible_keys(params, row + 8)}, lane, first_key) {}

#ifdef FLASHCORE_MASKS
  __device__ AccumulatorTrace(const TraceBuffers& trace, const AttentionParams& params, const MaskParams& masks,
                              const Tile& tile, int row, int lane, int seqlen_q, int seqlen_k)
      : AccumulatorTrace(TraceRow(trace, params, tile, row), TraceRow(trace, params, tile, row + 8),
                         {row >= 0 && row < seqlen_q, row + 8 >= 0 && row + 8 < seqlen_q}, {0, 0}, lane, 0) {
    for (int r = 0; r < 2; ++r) {
      const Span span = seen_by(masks, row + 8 * r, seqlen_q, seqlen_k);
      begins[r] = span.begin;
      visible[r] = span.begin < span.end ? span.end : 0;
    }
    if (HAS_SOFTCAP && params.softmax_scale != 0.f) by_scale = masks.softcap / fabsf(params.softmax_scale);
  }
#endif

  template <int SCORES>
  __device__ void page(int page, int tile_n, const float (&s)[SCORES], const unsigned (&p)[SCORES / 2],
                       const Softmax& softmax) const {
    for (int i = 0; i < SCORES; ++i) {
      const int r = row_of(i), key = page * tile_n + column_of(i, lane);
      const unsigned short bits = p[i / 2] >> (i % 2 * 16);
      if (!exists[r] || key >= params.seqlen_k) continue;
      stage[r].score(key, s[i] == -INFINITY ? -INFINITY : s[i] MASKED(* by_scale) * fabsf(params.softmax_scale));
      stage[r].prob(key, to_float(reinterpret_cast<const Element&>(bits)));
    }
    for (int r = 0; r < 2; ++r) {
      const float row_sum = quad_sum(softmax.row_sum[r]);
      if (!exists[r] || lane % 4 != 0) continue;
      const bool seen = visible[r] > first_key MASKED(&& begins[r] < (page + 1) * tile_n);
      stage[r].row_max(page, seen ? softmax.reference[r] * LN_2 : -INFINITY);
      stage[r].rescale(page, MASKED(!seen ? 0.f :) softmax.rescale[r]);
      stage[r].row_sum(page, row_sum);
    }
  }
  __device__ void accum(int page, const float (&o)[HEAD_DIM / 2]) const {
    for (int i = 0; i < HEAD_DIM / 2; ++i)
      if (exists[row_of(i)]) stage[row_of(i)].accum_row(page)[column_of(i, lane)] = o[i];
  }
};
#endif
