// Sequences of their own lengths in the Hopper kernel: a list of their tiles made on the GPU, and what a tile that ends in the
// middle of a tensor takes care not to touch. Part of attention_hopper.cu, whose tiles it uses.
#pragma once

constexpr int SEQUENCE_BARRIER = 1 + NUM_CONSUMERS;  // named barriers, after those of `Turn`

// Whatever the lengths hold, no sequence reaches beyond the tensors.
__device__ __forceinline__ void place(const int* ends_gmem, const int* seqlens_gmem, int nth, int rows, bool left, int& first,
                                      int& seqlen) {
  if (ends_gmem != nullptr) {
    first = max(0, min(rows, ends_gmem[nth]));
    seqlen = max(0, min(rows, ends_gmem[nth + 1]) - first);
  } else {
    seqlen = seqlens_gmem == nullptr ? rows : max(0, min(rows, seqlens_gmem[nth]));
    first = left ? rows - seqlen : 0;
  }
}
__device__ __forceinline__ Sequence sequence_at(const AttentionParams& params, const MaskParams& masks, int nth) {
  Sequence sequence;
  sequence.batch = masks.cu_seqlens_q_gmem != nullptr ? 0 : nth;
  place(masks.cu_seqlens_q_gmem, masks.seqlens_q_gmem, nth, params.seqlen_q, masks.padded_left, sequence.first_q,
        sequence.seqlen_q);
  place(masks.cu_seqlens_k_gmem, masks.seqlens_k_gmem, nth, params.seqlen_k, masks.padded_left, sequence.first_k,
        sequence.seqlen_k);
  return sequence;
}

// The first row of tile `nth`: under a causal mask the last tile, with most keys, is the first, and ends with a whole warp.
__device__ __forceinline__ int first_row_of(const AttentionParams& params, int seqlen_q, int nth) {
  const int whole_warps = (seqlen_q + WARP_ROWS - 1) / WARP_ROWS;
  return params.causal ? whole_warps * WARP_ROWS - (nth + 1) * TILE_M : nth * TILE_M;
}

// Tile `number` of the list, and then the number of the block's next one: whichever block is free takes it.
__device__ __forceinline__ bool deal_listed(const AttentionParams& params, const MaskParams& masks, int& number, Rows& rows) {
  if (number >= masks.num_tiles_gmem[0]) return false;
  const ListedTile listed = masks.tiles_gmem[number];
  number = gridDim.x + atomicAdd(&masks.num_tiles_gmem[1], 1);  // nobody waits for it until then
  rows.sequence = sequence_at(params, masks, listed.sequence);
  rows.batch_head = rows.sequence.batch * params.num_heads_q + listed.head;
  rows.first_row = first_row_of(params, rows.sequence.seqlen_q, listed.nth);
  rows.end_row = rows.first_row + TILE_M;
  return true;
}

// Of a page of V with `left` keys of its sequence: the rows after them hold another sequence, or padding, and NaN perhaps.
__device__ __forceinline__ void clear_after(unsigned char* v_smem, int left, int consumer) {
  constexpr int PIECES = ROW_BYTES / 16;
  if (left >= TILE_N) return;
#pragma unroll 1
  for (int first = 0; first < TILE_N * COLUMN_BLOCKS * PIECES; first += WARPGROUP) {
    const int i = first + threadIdx.x % WARPGROUP;
    store_16_shared(i / PIECES % TILE_N >= left, v_smem + i * 16, make_uint4(0, 0, 0, 0));
  }
  fence_proxy_async();
  barrier_sync(SEQUENCE_BARRIER + consumer, WARPGROUP);
}

// The rows of a warp that are there, from where `stage_out` left them; for a warp whose last rows are not.
__device__ __forceinline__ void store_out_rows(const AttentionParams& params, const Work& work, const unsigned char* out_smem,
                                               int warp_row, int first_row, int lane) {
  constexpr int PIECE = 16 / sizeof(Element), PIECES = BLOCK_COLUMNS / PIECE;
  Element* head_gmem = params.out_gmem + work.tile.batch * params.out.batch + work.tile.head * params.out.head;
#pragma unroll 1
  for (int first = 0; first < WARP_ROWS * COLUMN_BLOCKS * PIECES; first += WARP) {
    const int i = first + lane;
    const int piece = i % PIECES, block = i / PIECES % COLUMN_BLOCKS, nth = i / (PIECES * COLUMN_BLOCKS);
    const int row = first_row + nth, own_row = warp_row + nth;
    const unsigned char* src_smem = out_smem + (block * TILE_M + own_row) * ROW_BYTES + (piece ^ own_row % 8) * 16;
    Element* dst_gmem = head_gmem + (work.sequence.first_q + row) * params.out.row + block * BLOCK_COLUMNS + piece * PIECE;
    store_16_global(row >= 0 && row < work.sequence.seqlen_q, dst_gmem, *reinterpret_cast<const uint4*>(src_smem));
  }
}

// The lse of a thread's two rows, where they are rows of the sequence.
__device__ __forceinline__ void store_lse_rows(const AttentionParams& params, const Tile& tile, int first_q, int seqlen_q,
                                               int row, int lane, const float (&lse)[2]) {
  float* head_gmem = params.lse_gmem + (Index(tile.batch) * params.num_heads_q + tile.head) * params.seqlen_q + first_q;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int own = row + 8 * r;
    if (static_cast<unsigned>(own) < static_cast<unsigned>(seqlen_q) && lane % 4 == 0) head_gmem[own] = lse[r];
  }
}

// ---------------------------------------------------------------------------------------------------- the list

constexpr int PLAN_THREADS = 256;
constexpr int PLAN_WARPS = PLAN_THREADS / WARP;

// One of `shares` shares of the work of some warps.
struct Share {
  int nth, shares;
};

// Rows [first, end) of a batch, of all heads, become 0, and their lse -inf: a warp's share of them.
__device__ __forceinline__ void clear_outputs(const AttentionParams& params, int batch, int first, int end, Share share) {
  constexpr int PIECE = 16 / sizeof(Element), PIECES = HEAD_DIM / PIECE;
  const int rows = max(0, end - first);
  const Index pieces = Index(rows) * params.num_heads_q * PIECES;
  for (Index i = share.nth * WARP + threadIdx.x % WARP; i < pieces; i += share.shares * WARP) {
    const int piece = i % PIECES, row = first + i / PIECES % rows, head = i / PIECES / rows;
    Element* row_gmem = params.out_gmem + batch * params.out.batch + head * params.out.head + row * params.out.row;
    *reinterpret_cast<uint4*>(row_gmem + piece * PIECE) = make_uint4(0, 0, 0, 0);
    if (piece == 0)
      params.lse_gmem[(Index(batch) * params.num_heads_q + head) * params.seqlen_q + row] = -INFINITY;
  }
}

// The rows that belong to no sequence, before and after the nth.
__device__ __forceinline__ void clear_around(const AttentionParams& params, const MaskParams& masks, int nth, Share share) {
  const Sequence sequence = sequence_at(params, masks, nth);
  const bool end_to_end = masks.cu_seqlens_q_gmem != nullptr;
  if (!end_to_end || nth == 0) clear_outputs(params, sequence.batch, 0, sequence.first_q, share);
  if (!end_to_end || nth == masks.sequences - 1)
    clear_outputs(params, sequence.batch, sequence.first_q + sequence.seqlen_q, params.seqlen_q, share);
}

// The sum over the threads up to and with this one; `of_warp` is room for a number a warp.
__device__ __forceinline__ int sum_up_to(int x, int* of_warp) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    const int before = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += before;
  }
  if (lane == WARP - 1) of_warp[warp] = x;
  __syncthreads();
  for (int i = 0; i < warp; ++i) x += of_warp[i];
  __syncthreads();
  return x;
}

extern "C" __device__ const LaunchShape attention_hopper_plan_shape = {TILE_M, TILE_N, PLAN_THREADS, 0};

// Lists the tiles: sequence by sequence, head by head, so that few heads' K and V are in use at a time, and each section of the
// list from heavy to light. A block makes a section of as many tiles as the block has threads.
extern "C" __global__ void __launch_bounds__(PLAN_THREADS, 1)
    attention_hopper_plan(const __grid_constant__ AttentionParams params, const __grid_constant__ MaskParams masks) {
  __shared__ int ends[PLAN_THREADS];  // of some sequences' tiles, in the list
  __shared__ alignas(16) int weights[PLAN_THREADS];  // then the number, so that no two are alike
  __shared__ int of_warp[PLAN_WARPS];
  let_next_kernel_start();
  const int number = blockIdx.x * PLAN_THREADS + threadIdx.x;  // in the list
  ListedTile own = {0, 0, 0};
  int weight = -1, before = 0;
  for (int first = 0; first < masks.sequences; first += PLAN_THREADS) {
    const int nth = first + threadIdx.x;
    const int seqlen_q = nth < masks.sequences ? sequence_at(params, masks, nth).seqlen_q : 0;
    const int tiles = (seqlen_q + TILE_M - 1) / TILE_M * params.num_heads_q;
    ends[threadIdx.x] = before + sum_up_to(tiles, of_warp);
    __syncthreads();
    const int end = ends[PLAN_THREADS - 1];
    if (number >= before && number < end) {
      int low = 0, high = PLAN_THREADS - 1;  // the first sequence that ends after the number
      while (low < high) {
        const int middle = (low + high) / 2;
        if (ends[middle] > number) high = middle; else low = middle + 1;
      }
      const Sequence sequence = sequence_at(params, masks, first + low);
      const int tiles_a_head = (sequence.seqlen_q + TILE_M - 1) / TILE_M;
      const int within = number - (low > 0 ? ends[low - 1] : before), head = within / tiles_a_head;
      own.sequence = first + low;
      own.head = head;
      own.nth = within - head * tiles_a_head;
      const int first_row = first_row_of(params, sequence.seqlen_q, own.nth);
      const PageSpan span(masks, first_row, TILE_M, TILE_N, sequence.seqlen_q, sequence.seqlen_k);
      weight = span.end - span.first;
    }
    before = end;
    __syncthreads();
  }
  if (number == 0) {
    masks.num_tiles_gmem[0] = min(before, masks.most_tiles);
    masks.num_tiles_gmem[1] = 0;
  }

  const int own_weight = weight * PLAN_THREADS + (PLAN_THREADS - 1 - threadIdx.x);
  weights[threadIdx.x] = own_weight;
  __syncthreads();
  int heavier = 0;
#pragma unroll 8
  for (int i = 0; i < PLAN_THREADS / 4; ++i) {
    const int4 four = reinterpret_cast<const int4*>(weights)[i];
    heavier += (four.x > own_weight) + (four.y > own_weight) + (four.z > own_weight) + (four.w > own_weight);
  }
  const int place = blockIdx.x * PLAN_THREADS + heavier;
  if (weight >= 0 && place < masks.most_tiles) masks.tiles_gmem[place] = own;

  // The rows that belong to no sequence: all warps share out the sequences, and each of them where there are more warps.
  const int warps = gridDim.x * PLAN_WARPS, shares = max(1, warps / masks.sequences);
  for (int item = blockIdx.x * PLAN_WARPS + threadIdx.x / WARP; item < masks.sequences * shares; item += warps)
    clear_around(params, masks, item / shares, {item % shares, shares});
}
