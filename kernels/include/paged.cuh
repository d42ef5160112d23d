// Keys and values in pages: where the pages of a sequence lie, and which of them are to be attended to.
#pragma once
#include "warpgroup_tile.cuh"

// The order and types of these fields are the launch contract; the host fills a struct of the same layout.
struct PagedParams {
  const int* page_table_gmem;  // [batch, table_stride]: pool page of each page of a sequence; negative where it was dropped
  const int* lengths_gmem;     // [batch]: tokens of each sequence
  const int* selected_gmem;    // [batch, num_heads_kv, max_selected]: pages to attend to, ascending; null for all
  const int* counts_gmem;      // [batch, num_heads_kv]: how many of them there are
  int table_stride, max_selected;
  int page_shift;  // a page holds 1 << page_shift keys
};
constexpr int SMALLEST_PAGE = 16;
constexpr int NO_POSITION = 1 << 30;  // of keys that are not there: after every position a query sees

// How many keys one head of K and V of a sequence is attended at: those of its pages, or of the pages selected, end to end.
__device__ __forceinline__ int listed_keys(const PagedParams& paged, int num_heads_kv, int batch, int head_kv) {
  const int length = paged.lengths_gmem[batch];
  if (paged.selected_gmem == nullptr) return length;
  const Index row = Index(batch) * num_heads_kv + head_kv;
  const int count = paged.counts_gmem[row];
  if (count == 0) return 0;
  // Only the sequence's own last page may be a partial one, and pages ascend.
  const int last = paged.selected_gmem[row * paged.max_selected + count - 1];
  return ((count - 1) << paged.page_shift) + min(1 << paged.page_shift, length - (last << paged.page_shift));
}

// The page of the sequence that holds key `key` of that list; -1 past the list's end, if the list is a selection.
__device__ __forceinline__ int listed_page(const PagedParams& paged, int num_heads_kv, int batch, int head_kv, int key) {
  const int nth = key >> paged.page_shift;
  if (paged.selected_gmem == nullptr) return nth;
  const Index row = Index(batch) * num_heads_kv + head_kv;
  return nth < paged.max_selected ? paged.selected_gmem[row * paged.max_selected + nth] : -1;
}

// How many positions, from 0 on, the query `token` of the last `tokens` sees.
__device__ __forceinline__ int visible_positions(const AttentionParams& params, int length, int token) {
  return params.causal ? max(0, length - params.seqlen_q + token + 1) : length;
}

// Rows of V past the end of a sequence hold whatever a page held before: zeros in their place, since 0 * NaN is NaN. By all
// threads of a warpgroup; `is_past` says of a row whether it is one.
template <int ROWS, typename IsPast>
__device__ __forceinline__ void clear_rows(unsigned char* v_smem, int barrier, IsPast&& is_past) {
  constexpr int PIECES = ROW_BYTES / 16;
  for (int i = threadIdx.x % WARPGROUP; i < ROWS * COLUMN_BLOCKS * PIECES; i += WARPGROUP)
    if (is_past(i / PIECES % ROWS)) reinterpret_cast<uint4*>(v_smem)[i] = make_uint4(0, 0, 0, 0);
  fence_proxy_async();
  barrier_sync(barrier, WARPGROUP);
}
