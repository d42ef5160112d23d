// Masks that models use besides the causal one: a window, a cap on scores, a sink, and sequences of their own lengths.
//
//   FLASHCORE_MASKS   which of them are compiled in, a bit each; where it is not defined MASKED(...) is nothing
//
// The query in row i of a sequence stands at position i + seqlen_k - seqlen_q, and sees keys from `window_left` before it to
// `window_right` after it. Scores become softcap * tanh(scale * q k / softcap) before that. A sink is one more key of each
// head, with a score of its own and a value of 0. Sequences with lengths lie end to end, or at either end of padded rows.
#pragma once

constexpr bool HAS_WINDOW = FLASHCORE_MASKS & 1;
constexpr bool HAS_SOFTCAP = FLASHCORE_MASKS & 2;
constexpr bool HAS_SINK = FLASHCORE_MASKS & 4;
constexpr bool HAS_LENGTHS = FLASHCORE_MASKS & 8;
#define MASKED(...) __VA_ARGS__
#ifdef FLASHCORE_PAGED
constexpr bool OVER_PAGES = true;
#else
constexpr bool OVER_PAGES = false;
#endif
// Registers that masks take of a consumer in the Hopper kernel, whose Q takes what is left.
constexpr int MASK_REGISTERS = !HAS_SOFTCAP ? 0 : HAS_WINDOW || HAS_LENGTHS || OVER_PAGES ? 8 : 4;

// Where the real rows of a sequence lie: those of Q from row first_q of `batch` on, those of K and V from first_k on.
struct Sequence {
  int batch, first_q, seqlen_q, first_k, seqlen_k;
};

// Tile `nth` of query rows of a sequence, for one head.
struct alignas(8) ListedTile {
  int sequence;
  unsigned head : 12, nth : 20;
};

// The order and types of these fields are the launch contract; the host fills a struct of the same layout.
struct MaskParams {
  const float* sink_gmem;        // [num_heads_q], natural units
  // What the lengths are given as: the ends of sequences that lie end to end, or the real rows of padded ones (null: all).
  const int* cu_seqlens_q_gmem;  // [sequences + 1], or null
  const int* cu_seqlens_k_gmem;
  const int* seqlens_q_gmem;     // [sequences], or null
  const int* seqlens_k_gmem;
  ListedTile* tiles_gmem;        // [most_tiles]
  int* num_tiles_gmem;           // [2]: how many there are, and how many blocks have taken by now
  int sequences, most_tiles;
  int padded_left;               // the real rows are the last ones
  int window_left, window_right; // negative: no limit
  float softcap, scale_by_cap;
  // softcap * log2(e) * tanh(scale * s / softcap) = s * (series[0] + series[1] * s^2 + ...), as long as s^2 is no larger than
  // `near_square`; and a shorter series for what is no larger than `small_square`.
  float series[4], near_square;
  float small_series[2], small_square;
};

// Keys [begin, end) of a sequence.
struct Span {
  int begin, end;
};

// The keys that a query row sees.
__device__ __forceinline__ Span seen_by(const MaskParams& masks, int row, int seqlen_q, int seqlen_k) {
  const int position = row + seqlen_k - seqlen_q;
  Span span = {0, seqlen_k};
  if (masks.window_right >= 0) span.end = max(0, min(seqlen_k, position + masks.window_right + 1));
  if (HAS_WINDOW && masks.window_left >= 0) span.begin = max(0, min(seqlen_k, position - masks.window_left));
  return span;
}

// The pages of `tile_n` keys that some rows see: [first, end), of which [whole_from, whole_end) need no mask. Rows below 0 and
// from seqlen_q on are not there.
struct PageSpan {
  int first, end, whole_from, whole_end;

  __device__ __forceinline__ PageSpan(const MaskParams& masks, int first_row, int rows, int tile_n, int seqlen_q, int seqlen_k) {
    const int from = max(first_row, 0), to = min(first_row + rows, seqlen_q);
    const Span of_first = seen_by(masks, from, seqlen_q, seqlen_k), of_last = seen_by(masks, to - 1, seqlen_q, seqlen_k);
    const bool any = from < to && of_first.begin < of_last.end;
    first = of_first.begin / tile_n;
    end = any ? (of_last.end + tile_n - 1) / tile_n : first;
    whole_from = (of_last.begin + tile_n - 1) / tile_n;
    whole_end = of_first.end / tile_n;
  }
};

// S = tanh(scale * S / softcap), by exponentials: the cap itself is left to the softmax, which multiplies by it.
template <int SCORES>
__device__ __forceinline__ void cap(float (&s)[SCORES], float scale_by_cap) {
#pragma unroll
  for (int i = 0; i < SCORES; ++i)
    s[i] = 1.f - 2.f * rcp_approx(1.f + ex2_approx(2.f * LOG2_E * scale_by_cap * s[i]));
}
