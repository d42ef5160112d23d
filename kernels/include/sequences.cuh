// Sequences of their own lengths in the Hopper kernel: a list of their tiles made on the GPU, and what a tile that ends in the
// middle of a tensor takes care not to touch. Part of attention_hopper.cu, whose tiles it uses.
#pragma once

constexpr int SEQUENCE_BARRIER = 1 + NUM_CONSUMERS;  // named barriers, after those of `Turn`

// Tile `step` of the block, from the list: a tile of all heads comes before the next one, so that heads share out what is
// heavy, and blocks take turns forth and back.
__device__ __forceinline__ bool deal_listed(const AttentionParams& params, const MaskParams& masks, int step, Rows& rows) {
  const int blocks = gridDim.x;
  const int number = step * blocks + (step % 2 == 0 ? blockIdx.x : blocks - 1 - blockIdx.x);
  const int nth_tile = number / params.num_heads_q, head = number - nth_tile * params.num_heads_q;
  // In the last round the first block may have none where the last one has: only the number says.
  if (nth_tile >= *masks.num_tiles_gmem) return false;
  const ListedTile listed = masks.tiles_gmem[nth_tile];
  rows.sequence = masks.sequences_gmem[listed.sequence];
  rows.batch_head = rows.sequence.batch * params.num_heads_q + head;
  const int whole_warps = (rows.sequence.seqlen_q + WARP_ROWS - 1) / WARP_ROWS;
  rows.first_row = params.causal ? whole_warps * WARP_ROWS - (listed.nth + 1) * TILE_M : listed.nth * TILE_M;
  rows.end_row = rows.first_row + TILE_M;
  return true;
}

// Of a page of V with `left` keys of its sequence: the rows after them hold another sequence, or padding, and NaN perhaps.
__device__ __forceinline__ void clear_after(unsigned char* v_smem, int left, int consumer) {
  if (left < TILE_N) clear_rows<TILE_N>(v_smem, SEQUENCE_BARRIER + consumer, [&](int i) { return i >= left; });
}

// The rows of a warp that are there, from where `stage_out` left them; for a warp whose last rows are not.
__device__ __forceinline__ void store_out_rows(const AttentionParams& params, const Work& work, const unsigned char* out_smem,
                                               int warp_row, int first_row, int lane) {
  constexpr int PIECE = 16 / sizeof(Element), PIECES = BLOCK_COLUMNS / PIECE;
  Element* head_gmem = params.out_gmem + work.tile.batch * params.out.batch + work.tile.head * params.out.head;
#pragma unroll 1
  for (int i = lane; i < WARP_ROWS * COLUMN_BLOCKS * PIECES; i += WARP) {
    const int piece = i % PIECES, block = i / PIECES % COLUMN_BLOCKS, nth = i / (PIECES * COLUMN_BLOCKS);
    const int row = first_row + nth, own_row = warp_row + nth;
    if (row < 0 || row >= work.sequence.seqlen_q) continue;
    const unsigned char* src_smem = out_smem + (block * TILE_M + own_row) * ROW_BYTES + (piece ^ own_row % 8) * 16;
    Element* dst_gmem = head_gmem + (work.sequence.first_q + row) * params.out.row + block * BLOCK_COLUMNS + piece * PIECE;
    *reinterpret_cast<uint4*>(dst_gmem) = *reinterpret_cast<const uint4*>(src_smem);
  }
}

// The lse of a thread's two rows, where they are rows of the sequence.
__device__ __forceinline__ void store_lse_rows(const AttentionParams& params, const Work& work, int row, int lane,
                                               const float (&lse)[2]) {
  float* head_gmem = params.lse_gmem + (Index(work.tile.batch) * params.num_heads_q + work.tile.head) * params.seqlen_q;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int own = row + 8 * r;
    if (own >= 0 && own < work.sequence.seqlen_q && lane % 4 == 0) head_gmem[work.sequence.first_q + own] = lse[r];
  }
}

// ---------------------------------------------------------------------------------------------------- the list

// What the lengths are given as: the ends of sequences that lie end to end, or the real rows of padded ones (null: all).
// The order and types of these fields are the launch contract; the host fills a struct of the same layout.
struct PlanParams {
  const int* cu_seqlens_q_gmem;   // [sequences + 1], or null
  const int* cu_seqlens_k_gmem;
  const int* seqlens_q_gmem;      // [sequences], or null
  const int* seqlens_k_gmem;
  Sequence* sequences_gmem;
  ListedTile* tiles_gmem;         // [most_tiles]
  int* num_tiles_gmem;
  int sequences, most_tiles;
  int padded_left;                // the real rows are the last ones
};
constexpr int PLAN_THREADS = 1024;

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
__device__ __forceinline__ Sequence sequence_at(const AttentionParams& params, const PlanParams& plan, int nth) {
  Sequence sequence;
  sequence.batch = plan.cu_seqlens_q_gmem != nullptr ? 0 : nth;
  place(plan.cu_seqlens_q_gmem, plan.seqlens_q_gmem, nth, params.seqlen_q, plan.padded_left, sequence.first_q,
        sequence.seqlen_q);
  place(plan.cu_seqlens_k_gmem, plan.seqlens_k_gmem, nth, params.seqlen_k, plan.padded_left, sequence.first_k,
        sequence.seqlen_k);
  return sequence;
}

// Rows [first, end) of a batch, of all heads, become 0, and their lse -inf.
__device__ __forceinline__ void clear_outputs(const AttentionParams& params, int batch, int first, int end) {
  constexpr int PIECE = 16 / sizeof(Element), PIECES = HEAD_DIM / PIECE;
  const int rows = max(0, end - first);
  for (Index i = threadIdx.x; i < Index(rows) * params.num_heads_q * PIECES; i += PLAN_THREADS) {
    const int piece = i % PIECES, row = first + i / PIECES % rows, head = i / PIECES / rows;
    Element* row_gmem = params.out_gmem + batch * params.out.batch + head * params.out.head + row * params.out.row;
    *reinterpret_cast<uint4*>(row_gmem + piece * PIECE) = make_uint4(0, 0, 0, 0);
    if (piece == 0)
      params.lse_gmem[(Index(batch) * params.num_heads_q + head) * params.seqlen_q + row] = -INFINITY;
  }
}

// Every tile of every sequence, with its pages; a sequence a warp, a tile a lane.
template <typename Act>
__device__ __forceinline__ void each_tile(const AttentionParams& params, const MaskParams& masks, const PlanParams& plan,
                                          Act&& act) {
  const int lane = threadIdx.x % WARP;
  for (int nth = threadIdx.x / WARP; nth < plan.sequences; nth += PLAN_THREADS / WARP) {
    const Sequence sequence = sequence_at(params, plan, nth);
    if (lane == 0) plan.sequences_gmem[nth] = sequence;
    const int tiles = (sequence.seqlen_q + TILE_M - 1) / TILE_M;
    const int whole_rows = (sequence.seqlen_q + WARP_ROWS - 1) / WARP_ROWS * WARP_ROWS;
    for (int tile = lane; tile < tiles; tile += WARP) {
      const int first_row = params.causal ? whole_rows - (tile + 1) * TILE_M : tile * TILE_M;
      const PageSpan span(masks, first_row, TILE_M, TILE_N, sequence.seqlen_q, sequence.seqlen_k);
      act(ListedTile{nth, tile}, span.end - span.first);
    }
  }
}

extern "C" __device__ const LaunchShape attention_hopper_plan_shape = {TILE_M, TILE_N, PLAN_THREADS, 0};

// Block 0 lists the sequences and their tiles, from heavy to light: a counting sort by pages. The other blocks, one a sequence,
// clear the rows that belong to none.
extern "C" __global__ void __launch_bounds__(PLAN_THREADS, 1)
    attention_hopper_plan(const __grid_constant__ AttentionParams params, const __grid_constant__ MaskParams masks,
                          const __grid_constant__ PlanParams plan) {
  if (blockIdx.x > 0) {
    const int nth = blockIdx.x - 1;
    const Sequence sequence = sequence_at(params, plan, nth);
    const int end = sequence.first_q + sequence.seqlen_q;
    if (plan.cu_seqlens_q_gmem == nullptr) {
      clear_outputs(params, sequence.batch, 0, sequence.first_q);
      clear_outputs(params, sequence.batch, end, params.seqlen_q);
    } else {
      if (nth == 0) clear_outputs(params, 0, 0, sequence.first_q);
      if (nth == plan.sequences - 1) clear_outputs(params, 0, end, params.seqlen_q);
    }
    return;
  }

  constexpr int WEIGHTS = PLAN_THREADS;  // a weight a thread; heavier tiles count as the heaviest
  __shared__ int places[WEIGHTS];        // tiles of each weight, then where the next one of them goes
  __shared__ int of_warp[WARP];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int most_pages = (params.seqlen_k + TILE_N - 1) / TILE_N, pages_a_weight = most_pages / WEIGHTS + 1;

  places[threadIdx.x] = 0;
  __syncthreads();
  const auto weight_of = [&](int pages) { return min(WEIGHTS - 1, pages / pages_a_weight); };
  each_tile(params, masks, plan, [&](ListedTile, int pages) { atomicAdd(&places[weight_of(pages)], 1); });
  __syncthreads();

  // Thread i has weight WEIGHTS - 1 - i: how many tiles are heavier.
  const int weight = WEIGHTS - 1 - threadIdx.x, own = places[weight];
  int sum = own;
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    const int before = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == WARP - 1) of_warp[warp] = sum;
  __syncthreads();
  int heavier = sum - own;
  for (int i = 0; i < warp; ++i) heavier += of_warp[i];
  places[weight] = heavier;
  if (threadIdx.x == PLAN_THREADS - 1) *plan.num_tiles_gmem = min(plan.most_tiles, heavier + own);
  __syncthreads();
  each_tile(params, masks, plan, [&](ListedTile tile, int pages) {
    const int place = atomicAdd(&places[weight_of(pages)], 1);
    if (place < plan.most_tiles) plan.tiles_gmem[place] = tile;
  });
}
