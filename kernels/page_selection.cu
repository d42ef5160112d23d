// Chooses the pages that each sequence and KV head attends to: those that promise the highest scores, or the first ones
// and the last.
//
// `page_selection` is the device's side of `TopK`, in one launch: one block a sequence and KV head scores its pages by
// their key bounds, finds the score that as many pages reach as are asked for, and writes those pages in order.
// Slow at: one long sequence by itself, whose few heads leave most of the chip idle.
// `page_window` is that of `SinkWindow`: one warp a sequence and KV head writes the first pages and the last ones. It
// looks at no key, so that it is the same in every variant.
// Slow at: windows of thousands of pages, which a warp goes over by itself.
//
// Variants: head_dim 64 128, dtype float16 bfloat16
#include "attention.cuh"
#include "warp.cuh"

constexpr int MOST_THREADS = 512;             // a block; the host asks for fewer where there are many blocks
constexpr int MOST_PAGES = 32768;             // of a sequence
constexpr int MOST_ROWS = 128;                // query rows of a KV head: heads of its group times query tokens
constexpr int VECTOR = 16 / sizeof(Element);  // elements a lane takes at a time
constexpr int LANES = HEAD_DIM / VECTOR;      // that share a page
constexpr int STEPS = 4;                      // times a warp loads before it computes
constexpr int PAGES_A_STEP = WARP / LANES;
constexpr int PAGES_A_WARP = STEPS * PAGES_A_STEP;
static_assert(LANES <= WARP, "a page's bounds lie within one warp, so that scores are summed by shuffles");

// Logical pages that a sequence's tokens lie in, dropped ones included.
__device__ __forceinline__ int columns_of(int length, int page_size, int max_pages) {
  return min(max(length + page_size - 1, 0) / page_size, max_pages);
}

// The page that the first query's position lies in: this one and those after it are chosen whatever lies in them.
__device__ __forceinline__ int first_query_page(int length, int q_tokens, int page_size) {
  return max(length - q_tokens, 0) / page_size;
}

// ---------------------------------------------------------------------------------------------------- the highest scores

// The order and types of these fields are the launch contract; the host packs a struct of the same layout.
struct SelectionParams {
  const Element* q_gmem;       // [batch, num_heads_q, q_tokens, HEAD_DIM]
  const Element* bounds_gmem;  // [num_pages, num_heads_kv, 2, HEAD_DIM], least and largest key
  const int* page_table_gmem;  // [batch, max_pages]
  const int* lengths_gmem;     // [batch]
  int* pages_gmem;             // [batch, num_heads_kv, width]: the pages chosen, ascending, then -1
  int* counts_gmem;            // [batch, num_heads_kv]
  Strides q;
  Strides bounds;    // of page, head, and from least to largest
  Index table_row;   // entries from one row of the page table to the next
  double share;      // of a sequence's pages that may be chosen, rounded up
  int most;          // pages that may be chosen
  int sink_pages;    // first pages that are always chosen
  int group;         // query heads of a KV head
  int q_tokens, num_pages, page_size, max_pages, width;
};

// Dynamic shared memory: query rows, then a word for each page.
extern "C" __device__ const LaunchShape page_selection_shape = {
    MOST_ROWS, PAGES_A_WARP, MOST_THREADS, MOST_ROWS * HEAD_DIM * int(sizeof(Element)) + MOST_PAGES * int(sizeof(int))};

// Of each page one word is kept. Before the page is scored: which page of the pool it is, or that it needs no score.
// After: its rank. A higher score has a higher rank, no score has that of either mark.
constexpr unsigned NO_PAGE = 0x80000000;  // dropped; more than any page of the pool
constexpr unsigned LOWEST = 0;            // the rank of no page
constexpr unsigned ALWAYS = 0xffffffff;   // chosen whatever it scores; the highest rank
constexpr float LARGEST_FLOAT = 3.402823466e38f;

// Floats in the order of integers. Minus zero is zero.
__device__ __forceinline__ unsigned rank_of(float score) {
  const unsigned bits = __float_as_uint(score + 0.f);
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

// Scores of infinite or NaN keys: as high as a score can be, or as low.
__device__ __forceinline__ float finite(float score) {
  return score < INFINITY ? fmaxf(score, -LARGEST_FLOAT) : LARGEST_FLOAT;
}

__device__ __forceinline__ void unpack(const uint4& vector, float (&dst)[VECTOR]) {
  const Element* elements = reinterpret_cast<const Element*>(&vector);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) dst[i] = to_float(elements[i]);
}

// Query rows of this block's heads, into shared memory.
__device__ __forceinline__ void load_rows(const SelectionParams& params, int rows, uint4* q_smem) {
  const Element* q_heads =
      params.q_gmem + blockIdx.y * params.q.batch + Index(blockIdx.x) * params.group * params.q.head;
  for (int i = threadIdx.x; i < rows * LANES; i += blockDim.x) {
    const int row = i / LANES;
    const Element* q_row = q_heads + row / params.q_tokens * params.q.head + row % params.q_tokens * params.q.row;
    q_smem[i] = *reinterpret_cast<const uint4*>(q_row + i % LANES * VECTOR);
  }
}

// Where each page lies, or how it ranks without a score.
__device__ __forceinline__ void look_up_pages(const SelectionParams& params, int length, int columns,
                                              unsigned* words_smem) {
  const int always_from = first_query_page(length, params.q_tokens, params.page_size);
  const int* table = params.page_table_gmem + blockIdx.y * params.table_row;
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    const int page = min(table[column], params.num_pages - 1);
    const bool always = column < params.sink_pages || column >= always_from;
    words_smem[column] = page < 0 ? NO_PAGE : always ? ALWAYS : page;
  }
}

// Scores of pages, one of their bounds' vectors a lane, and their ranks into the place of the pages.
__device__ __forceinline__ void rank_pages(const SelectionParams& params, int rows, int columns, const uint4* q_smem,
                                           unsigned* words_smem) {
  const int lane = threadIdx.x % WARP;
  const Element* bounds_head = params.bounds_gmem + blockIdx.x * params.bounds.head + lane % LANES * VECTOR;
  for (int first = threadIdx.x / WARP * PAGES_A_WARP; first < columns; first += blockDim.x / WARP * PAGES_A_WARP) {
    unsigned word[STEPS];
    uint4 least_bits[STEPS] = {}, largest_bits[STEPS] = {};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int column = first + step * PAGES_A_STEP + lane / LANES;
      word[step] = column < columns ? words_smem[column] : NO_PAGE;
      if (word[step] < NO_PAGE) {
        const Element* bounds = bounds_head + word[step] * params.bounds.batch;
        least_bits[step] = *reinterpret_cast<const uint4*>(bounds);
        largest_bits[step] = *reinterpret_cast<const uint4*>(bounds + params.bounds.row);
      }
    }
    float least[STEPS][VECTOR], largest[STEPS][VECTOR], best[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      unpack(least_bits[step], least[step]);
      unpack(largest_bits[step], largest[step]);
      best[step] = -LARGEST_FLOAT;
    }
    for (int row = 0; row < rows; ++row) {
      float q[VECTOR];
      unpack(q_smem[row * LANES + lane % LANES], q);
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        // score = sum_d max(q_d, 0) * largest_d + min(q_d, 0) * least_d; a NaN is kept in both
        float score = 0.f;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          score = fmaf(q[i] < 0.f ? 0.f : q[i], largest[step][i], score);
          score = fmaf(q[i] > 0.f ? 0.f : q[i], least[step][i], score);
        }
        best[step] = fmaxf(best[step], finite(warp_sum<LANES>(score)));
      }
    }
    if (lane % LANES == 0) {
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const int column = first + step * PAGES_A_STEP + lane / LANES;
        const unsigned rank = word[step] < NO_PAGE ? rank_of(best[step]) : word[step] == ALWAYS ? ALWAYS : LOWEST;
        if (column < columns) words_smem[column] = rank;
      }
    }
  }
}

// How many pages rank at least so high. Asks all threads of the block.
__device__ __forceinline__ int reaching(unsigned rank, int columns, const unsigned* ranks_smem) {
  int count = 0;
  for (int first = 0; first < columns; first += blockDim.x) {
    const int column = first + threadIdx.x;
    count += __syncthreads_count(column < columns && ranks_smem[column] >= rank);
  }
  return count;
}

// The highest rank that at least `wanted` pages reach, or a lower one that exactly so many do.
__device__ __forceinline__ unsigned rank_that_reach(int wanted, int columns, const unsigned* ranks_smem) {
  unsigned rank = 0;
  for (unsigned bit = 1u << 31; bit > 0; bit /= 2) {
    const int count = reaching(rank | bit, columns, ranks_smem);
    if (count >= wanted) rank |= bit;
    if (count == wanted) break;
  }
  return rank;
}

// Pages above the lowest rank chosen, and level with it.
struct Chosen {
  int above, level;
};

// The pages above `rank`, and as many level with it, the lower first, as there is room for. Each warp has a stretch of
// pages, and begins to write where those of the warps before it end.
__device__ __forceinline__ void write_pages(unsigned rank, int wanted, int columns, const unsigned* ranks_smem,
                                            int* pages) {
  __shared__ Chosen chosen_smem[MOST_THREADS / WARP];
  const int warp = threadIdx.x / WARP;
  const int warps = blockDim.x / WARP;
  const int stretch = (columns + blockDim.x - 1) / blockDim.x * WARP;
  const int first = warp * stretch + threadIdx.x % WARP;

  Chosen mine = {0, 0};
  for (int i = 0; i < stretch; i += WARP) {
    const unsigned here = first + i < columns ? ranks_smem[first + i] : LOWEST;
    mine.above += Votes(here > rank).all;
    mine.level += Votes(here == rank).all;
  }
  if (threadIdx.x % WARP == 0) chosen_smem[warp] = mine;
  __syncthreads();
  Chosen before = {0, 0};
  int room = wanted;
  for (int other = 0; other < warps; ++other) {
    room -= chosen_smem[other].above;
    if (other < warp) {
      before.above += chosen_smem[other].above;
      before.level += chosen_smem[other].level;
    }
  }
  for (int i = 0; i < stretch; i += WARP) {
    const unsigned here = first + i < columns ? ranks_smem[first + i] : LOWEST;
    const Votes above(here > rank), level(here == rank);
    const int level_before = before.level + level.before;
    const int place = before.above + above.before + min(level_before, room);
    if (here > rank || (here == rank && level_before < room)) pages[place] = first + i;
    before.above += above.all;
    before.level += level.all;
  }
}

// grid: (num_heads_kv, batch)
extern "C" __global__ void __launch_bounds__(MOST_THREADS) page_selection(const SelectionParams params) {
  extern __shared__ uint4 shared_smem[];
  const int rows = params.group * params.q_tokens;
  uint4* q_smem = shared_smem;                                                     // [rows][LANES]
  unsigned* words_smem = reinterpret_cast<unsigned*>(shared_smem + rows * LANES);  // [max_pages]
  const int length = params.lengths_gmem[blockIdx.y];
  const int columns = columns_of(length, params.page_size, params.max_pages);

  load_rows(params, rows, q_smem);
  look_up_pages(params, length, columns, words_smem);
  __syncthreads();
  rank_pages(params, rows, columns, q_smem, words_smem);
  __syncthreads();

  const int present = reaching(LOWEST + 1, columns, words_smem);
  const int always = reaching(ALWAYS, columns, words_smem);
  const int wanted = max(always, min(params.most, int(ceil(present * params.share))));
  const Index out_row = Index(blockIdx.y) * gridDim.x + blockIdx.x;
  int* pages = params.pages_gmem + out_row * params.width;
  if (wanted > 0) write_pages(rank_that_reach(wanted, columns, words_smem), wanted, columns, words_smem, pages);
  for (int place = wanted + threadIdx.x; place < params.width; place += blockDim.x) pages[place] = -1;
  if (threadIdx.x == 0) params.counts_gmem[out_row] = wanted;
}

// ---------------------------------------------------------------------------------------------------- first and last pages

constexpr int WINDOW_ROWS = 4;  // rows of the selection that a block writes, one a warp
constexpr int WINDOW_THREADS = WINDOW_ROWS * WARP;

// The order and types of these fields are the launch contract; the host packs a struct of the same layout.
struct WindowParams {
  const int* page_table_gmem;  // [batch, max_pages]
  const int* lengths_gmem;     // [batch]
  int* pages_gmem;             // [batch, num_heads_kv, width]: the pages chosen, ascending, then -1
  int* counts_gmem;            // [batch, num_heads_kv]
  Index table_row;             // entries from one row of the page table to the next
  int sink_pages;              // first pages that are chosen
  int window_pages;            // pages that are chosen up to that of the first query; those after it are as well
  int rows;                    // of the selection: batch times num_heads_kv
  int num_heads_kv, q_tokens, page_size, max_pages, width;
};

extern "C" __device__ const LaunchShape page_window_shape = {WINDOW_ROWS, STEPS * WARP, WINDOW_THREADS, 0};

// grid: (rows / WINDOW_ROWS, rounded up)
extern "C" __global__ void __launch_bounds__(WINDOW_THREADS) page_window(const WindowParams params) {
  const Index row = Index(blockIdx.x) * WINDOW_ROWS + threadIdx.x / WARP;
  if (row >= params.rows) return;
  const int lane = threadIdx.x % WARP;
  const int sequence = int(row) / params.num_heads_kv;
  const int length = params.lengths_gmem[sequence];
  const int* table = params.page_table_gmem + sequence * params.table_row;
  int* pages = params.pages_gmem + row * params.width;

  // Columns [0, sink_end), then [window_begin, columns): where the two meet or overlap, none comes twice.
  const int columns = columns_of(length, params.page_size, params.max_pages);
  const int sink_end = min(params.sink_pages, columns);
  const int query_page = first_query_page(length, params.q_tokens, params.page_size);
  const int window_begin = max(query_page - (params.window_pages - 1), sink_end);
  const int candidates = sink_end + max(columns - window_begin, 0);

  int count = 0;
  for (int first = 0; first < candidates; first += STEPS * WARP) {
    int column[STEPS];
    bool present[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int nth = first + step * WARP + lane;
      column[step] = nth < sink_end ? nth : nth - sink_end + window_begin;
      present[step] = nth < candidates && table[column[step]] >= 0;
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const Votes votes(present[step]);
      if (present[step]) pages[count + votes.before] = column[step];
      count += votes.all;
    }
  }
  for (int place = count + lane; place < params.width; place += WARP) pages[place] = -1;
  if (lane == 0) params.counts_gmem[row] = count;
}
