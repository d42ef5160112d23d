// Writes the next tokens of each sequence into its pages, keeps the pages' key bounds, and advances the lengths.
//
// The device's side of `append_tokens`, in two launches. `paged_append`: one block for each page that a row of new
// tokens touches and each KV head. `paged_append_advance`: one block a row, after all of those, since they read the
// lengths that it changes.
// Slow at: prompts of many thousand tokens in small pages, since every block looks up all pages of its row, to write
// all tokens or none.
//
// Variants: head_dim 64 128, dtype float16 bfloat16
#include "attention.cuh"
#include "warp.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int VECTOR = 16 / sizeof(Element);  // elements a thread copies at a time
constexpr int VECTORS = HEAD_DIM / VECTOR;    // in a key: one lane each
constexpr int TOKENS = THREADS / VECTORS;     // tokens a block copies at a time
constexpr int STEPS = 4;                      // times it loads before it stores
static_assert(VECTORS <= WARP, "a key lies within one warp, so that bounds are combined by shuffles");
static_assert(2 * VECTORS <= THREADS, "one thread for each vector of both bounds");

// Bounds of a page lie in this order.
constexpr int LEAST = 0, LARGEST = 1;

// The order and types of these fields are the launch contract; the host packs a struct of the same layout.
struct AppendParams {
  const Element* k_new_gmem;   // [rows, num_heads_kv, tokens, HEAD_DIM]
  const Element* v_new_gmem;   // [rows, num_heads_kv, tokens, HEAD_DIM]
  Element* k_pool_gmem;        // [num_pages, num_heads_kv, page_size, HEAD_DIM]
  Element* v_pool_gmem;        // [num_pages, num_heads_kv, page_size, HEAD_DIM]
  Element* bounds_gmem;        // [num_pages, num_heads_kv, 2, HEAD_DIM], least and largest key; or null
  const int* page_table_gmem;  // [batch, max_pages]
  int* lengths_gmem;           // [batch]
  const int* rows_gmem;        // [rows], which sequence each row is of; null for all in order
  const int* counts_gmem;      // [rows], tokens of each row that are real; null for all of them
  Strides k_new, v_new;        // of row, head, token
  Strides k_pool, v_pool;      // of page, head, token
  Strides bounds;              // of page, head, and from least to largest
  Index table_row;             // entries from one row of the page table to the next
  int rows_step, counts_step;  // ints from one number to the next: the low half is read of 64-bit ones
  int batch, max_pages, num_pages, page_size, tokens;
};

extern "C" __device__ const LaunchShape paged_append_shape = {1, TOKENS * STEPS, THREADS, 0};

// Two elements at a time; a NaN on either side gives NaN.
#if FLASHCORE_BF16
using Pair = __nv_bfloat162;
constexpr unsigned PAIR_OF_INFINITIES = 0x7f807f80;
#else
using Pair = __half2;
constexpr unsigned PAIR_OF_INFINITIES = 0x7c007c00;
#endif
constexpr unsigned PAIR_OF_SIGNS = 0x80008000;

struct Least {
  static constexpr unsigned OF_NOTHING = PAIR_OF_INFINITIES;
  static __device__ __forceinline__ Pair of(Pair a, Pair b) { return __hmin2_nan(a, b); }
};
struct Largest {
  static constexpr unsigned OF_NOTHING = PAIR_OF_INFINITIES | PAIR_OF_SIGNS;
  static __device__ __forceinline__ Pair of(Pair a, Pair b) { return __hmax2_nan(a, b); }
};

// The least or the largest of some keys, in one vector of their elements.
template <typename Which>
struct Bound {
  uint4 bits = {Which::OF_NOTHING, Which::OF_NOTHING, Which::OF_NOTHING, Which::OF_NOTHING};

  __device__ __forceinline__ void take(const uint4& other) {
    bits = {of(bits.x, other.x), of(bits.y, other.y), of(bits.z, other.z), of(bits.w, other.w)};
  }

  // Over the lanes of the warp that hold the same vector of other keys.
  __device__ __forceinline__ void take_other_lanes() {
#pragma unroll
    for (int step = VECTORS; step < WARP; step *= 2) {
      take({__shfl_xor_sync(~0u, bits.x, step), __shfl_xor_sync(~0u, bits.y, step),
            __shfl_xor_sync(~0u, bits.z, step), __shfl_xor_sync(~0u, bits.w, step)});
    }
  }

 private:
  static __device__ __forceinline__ unsigned of(unsigned a, unsigned b) {
    const Pair found = Which::of(*reinterpret_cast<const Pair*>(&a), *reinterpret_cast<const Pair*>(&b));
    return *reinterpret_cast<const unsigned*>(&found);
  }
};

__device__ __forceinline__ uint4 load(const Element* src_gmem) { return *reinterpret_cast<const uint4*>(src_gmem); }
__device__ __forceinline__ void store(Element* dst_gmem, uint4 vector) { *reinterpret_cast<uint4*>(dst_gmem) = vector; }

// Where the first row of one head of a page lies, or of one row of new tokens.
__device__ __forceinline__ Index head_of(const Strides& strides, Index which, int head) {
  return which * strides.batch + head * strides.head;
}

// What one row of new tokens is to change.
struct Row {
  int sequence;         // its row of the page table
  int count;            // what its length grows by
  unsigned first, end;  // positions that it writes
  bool fits;            // each of them has a page; otherwise nothing is changed

  // Asks all threads of the block.
  __device__ __forceinline__ Row(const AppendParams& params, int row) {
    sequence = params.rows_gmem ? params.rows_gmem[Index(row) * params.rows_step] : row;
    count = params.counts_gmem ? params.counts_gmem[Index(row) * params.counts_step] : params.tokens;
    const bool known = sequence >= 0 && sequence < params.batch;
    const int length = known ? params.lengths_gmem[sequence] : -1;
    first = length;
    end = first + max(0, min(count, params.tokens));
    bool mine_fit = length >= 0;
    if (length >= 0) {
      const unsigned columns = (end + params.page_size - 1) / params.page_size;
      for (unsigned column = first / params.page_size + threadIdx.x; column < columns; column += THREADS)
        mine_fit = mine_fit && column < params.max_pages && page_in_pool(params, page_of(params, column));
    }
    fits = __syncthreads_and(mine_fit);
  }

  __device__ __forceinline__ int page_of(const AppendParams& params, unsigned column) const {
    return params.page_table_gmem[sequence * params.table_row + column];
  }

 private:
  static __device__ __forceinline__ bool page_in_pool(const AppendParams& params, int page) {
    return page >= 0 && page < params.num_pages;
  }
};

// grid: (pages that `tokens` tokens touch at most, num_heads_kv, rows)
extern "C" __global__ void __launch_bounds__(THREADS) paged_append(const AppendParams params) {
  const Row row(params, blockIdx.z);
  const unsigned column = row.first / params.page_size + blockIdx.x;
  const unsigned page_begin = column * params.page_size;
  const unsigned from = max(row.first, page_begin);
  const unsigned to = min(row.end, page_begin + params.page_size);
  if (!row.fits || from >= to) return;

  const int head = blockIdx.y;
  const int vector = threadIdx.x % VECTORS;
  const Index page = row.page_of(params, column);
  const Element* k_new = params.k_new_gmem + head_of(params.k_new, blockIdx.z, head) + vector * VECTOR;
  const Element* v_new = params.v_new_gmem + head_of(params.v_new, blockIdx.z, head) + vector * VECTOR;
  Element* k_page = params.k_pool_gmem + head_of(params.k_pool, page, head) + vector * VECTOR;
  Element* v_page = params.v_pool_gmem + head_of(params.v_pool, page, head) + vector * VECTOR;

  Bound<Least> least;
  Bound<Largest> largest;
  for (unsigned first = from + threadIdx.x / VECTORS; first < to; first += STEPS * TOKENS) {
    uint4 key[STEPS], value[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const unsigned position = first + step * TOKENS;
      if (position < to) {
        key[step] = load(k_new + Index(position - row.first) * params.k_new.row);
        value[step] = load(v_new + Index(position - row.first) * params.v_new.row);
      }
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const unsigned position = first + step * TOKENS;
      if (position < to) {
        store(k_page + Index(position - page_begin) * params.k_pool.row, key[step]);
        store(v_page + Index(position - page_begin) * params.v_pool.row, value[step]);
        least.take(key[step]);
        largest.take(key[step]);
      }
    }
  }
  if (params.bounds_gmem == nullptr) return;

  // The page's bounds take the new keys in; its first key begins them anew.
  __shared__ uint4 least_smem[WARPS][VECTORS], largest_smem[WARPS][VECTORS];
  least.take_other_lanes();
  largest.take_other_lanes();
  if (threadIdx.x % WARP < VECTORS) {
    least_smem[threadIdx.x / WARP][vector] = least.bits;
    largest_smem[threadIdx.x / WARP][vector] = largest.bits;
  }
  __syncthreads();
  Element* bounds = params.bounds_gmem + head_of(params.bounds, page, head) + vector * VECTOR;
  const bool begins = from == page_begin;
  if (threadIdx.x / VECTORS == LEAST) {
    Bound<Least> bound;
    if (!begins) bound.take(load(bounds));
    for (int warp = 0; warp < WARPS; ++warp) bound.take(least_smem[warp][vector]);
    store(bounds, bound.bits);
  } else if (threadIdx.x / VECTORS == LARGEST) {
    bounds += params.bounds.row;
    Bound<Largest> bound;
    if (!begins) bound.take(load(bounds));
    for (int warp = 0; warp < WARPS; ++warp) bound.take(largest_smem[warp][vector]);
    store(bounds, bound.bits);
  }
}

// grid: (rows)
extern "C" __global__ void __launch_bounds__(THREADS) paged_append_advance(const AppendParams params) {
  const Row row(params, blockIdx.x);
  if (row.fits && threadIdx.x == 0) params.lengths_gmem[row.sequence] = row.first + row.count;
}
