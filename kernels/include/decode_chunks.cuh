// Decoding in chunks whose bounds depend on their place in a sequence alone (chunks.cuh). Included by attention_decode.cu.
//
// A block's share ends at the border of a chunk that is next to where it would end otherwise. Each warpgroup takes whole chunks,
// so that nothing is added up across warpgroups, and each chunk is a part. Parts of a head lie in the order of its chunks.
#pragma once

static_assert(NUM_CONSUMERS == 2, "each half of a warp looks pages up for one warpgroup");
constexpr int HALF_WARP = WARP / NUM_CONSUMERS;
constexpr int PARTS_OF_ONE = PARTS_UNDER_WAY / NUM_CONSUMERS;

// mbarrier.test_wait.parity (PTX ISA, mbarrier): whether the phase of that parity is complete.
__device__ __forceinline__ bool mbarrier_is_complete(Mbarrier* barrier_smem, unsigned parity) {
  int complete;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.s32 %0, 1, 0, done;\n"
      "}"
      : "=r"(complete)
      : "r"(smem_address(barrier_smem)), "r"(parity)
      : "memory");
  return complete;
}

// Chunks that a sequence can have at most.
__device__ __forceinline__ int most_chunks(const PagedParams& paged) {
  return chunk_of(max(0, ((paged.table_stride << paged.page_shift) - 1) / UNIT_KEYS)) + 1;
}

// The chunk that a unit lies in: units [begin, end) of all heads, and the tile of the sequence that is unit 0 of the head.
struct Chunk {
  int begin, end;

  __device__ __forceinline__ Chunk(const SharedMemory& smem, const AttentionParams& params, const PagedParams& paged,
                                   const DecodeParams& decode, int num_heads, int unit MASKED(, const MaskParams& masks)) {
    const int number = head_of(smem, num_heads, unit), first = smem.first_unit[number];
    const int unit_0 = first MASKED(- units_before(params, paged, masks, Head(params, decode, number).batch));
    const int chunk = chunk_of(unit - unit_0);
    begin = max(first, unit_0 + first_tile_of(chunk));
    end = min(smem.first_unit[number + 1], unit_0 + first_tile_of(chunk + 1));
  }
};

// One warp: the block's chunks, of which each warpgroup takes another one when it is through with its last. Each half of the
// warp looks up the boxes of one warpgroup's chunk, half a warp's worth of them ahead.
__device__ __forceinline__ void produce(SharedMemory& smem, const AttentionParams& params, const PagedParams& paged,
                                        const DecodeParams& decode, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                        const Shares& shares, int num_heads MASKED(, const MaskParams& masks)) {
  const int lane = threadIdx.x % WARP, half = lane / HALF_WARP, half_lane = lane % HALF_WARP;
  const int box_keys = min(UNIT_KEYS, 1 << paged.page_shift), boxes = UNIT_KEYS / box_keys;
  const int units_ahead = HALF_WARP / boxes;
  const int all = smem.first_unit[num_heads];
  const auto chunk_at = [&](int unit) { return Chunk(smem, params, paged, decode, num_heads, unit MASKED(, masks)); };
  const auto share_begin = [&](int block) {
    const int unit = shares.begin(block);
    if (unit >= all) return all;
    const Chunk chunk = chunk_at(unit);
    return unit - chunk.begin <= chunk.end - unit ? chunk.begin : chunk.end;
  };
  int left = share_begin(blockIdx.x);  // the first unit of the chunks that no warpgroup has taken yet
  const int end_of_share = share_begin(blockIdx.x + 1);

  int begin = 0, unit = 0, end = 0;  // of the half's chunk: its first unit, the one to come, and its end
  const auto take_chunks = [&] {
    const unsigned wants = __ballot_sync(~0u, unit == end);
#pragma unroll
    for (int other = 0; other < NUM_CONSUMERS; ++other) {
      if (!(wants >> other * HALF_WARP & 1) || left == end_of_share) continue;
      const int chunk_end = chunk_at(left).end;
      if (half == other) {
        begin = unit = left;
        end = chunk_end;
      }
      left = chunk_end;
    }
  };
  const auto look = [&] {
    const int looked = max(0, min(unit + half_lane / boxes, end - 1));
    return look_up(smem, params, paged, decode, num_heads, looked, half_lane % boxes * box_keys MASKED(, masks));
  };

  RingPosition at[NUM_CONSUMERS];
#pragma unroll
  for (int consumer = 0; consumer < NUM_CONSUMERS; ++consumer) at[consumer].advance(consumer);
  take_chunks();
  Lookup next_box = {};
  if (__any_sync(~0u, unit < end)) next_box = look();
  while (__any_sync(~0u, unit < end)) {
    const Lookup box = next_box;
    const int own_begin = begin, own_unit = unit, own_end = end, own_count = min(units_ahead, end - unit);
    unit += own_count;
    take_chunks();

    // A box that is not there has page -1, which the tensor copies fill with zeros.
    const int own_position = (box.page << paged.page_shift) + (box.key & ((1 << paged.page_shift) - 1));
    const bool is_there = box.page >= 0 && box.pool_page >= 0 && own_position < box.length;
    const int own_pool_page = is_there ? box.pool_page : -1;
#ifdef FLASHCORE_MASKS
    const Span of_first = seen_by(masks, 0, params.seqlen_q, box.length);
    const Span of_last = seen_by(masks, params.seqlen_q - 1, params.seqlen_q, box.length);
    const bool is_whole = is_there && (HAS_SOFTCAP || params.softmax_scale >= 0.f) && own_position >= of_last.begin &&
                          own_position + box_keys <= of_first.end;
#else
    const bool is_whole = is_there && params.softmax_scale >= 0.f &&
                          own_position + box_keys <= visible_positions(params, box.length, 0);
#endif
    const unsigned whole = __ballot_sync(~0u, is_whole);
    const int most = max(__shfl_sync(~0u, own_count, 0), __shfl_sync(~0u, own_count, HALF_WARP));
#pragma unroll 1
    for (int i = 0; i < most; ++i) {
#pragma unroll
      for (int consumer = 0; consumer < NUM_CONSUMERS; ++consumer) {
        const int first_lane = consumer * HALF_WARP, from = first_lane + i * boxes + lane % boxes;
        if (i >= __shfl_sync(~0u, own_count, first_lane)) continue;
        const int pool_page = __shfl_sync(~0u, own_pool_page, from);
        const int position = __shfl_sync(~0u, is_there ? own_position : NO_POSITION, from);
        const int head_kv = __shfl_sync(~0u, box.head_kv, from), number = __shfl_sync(~0u, box.number, from);
        const int key = __shfl_sync(~0u, box.key, first_lane + i * boxes);
        const int chunk_begin = __shfl_sync(~0u, own_begin, first_lane), chunk_end = __shfl_sync(~0u, own_end, first_lane);
        const int now = __shfl_sync(~0u, own_unit, first_lane) + i;
        const unsigned own = ((1u << boxes) - 1) << (first_lane + i * boxes);
        const int row = position & ((1 << paged.page_shift) - 1), into = lane * box_keys * ROW_BYTES;
        RingPosition& slot_at = at[consumer];
        const int slot = slot_at.slot;
        mbarrier_wait(&smem.k_empty[slot], slot_at.parity ^ 1);
        Unit& info = smem.unit[slot_at.parity][slot];
        if (lane < boxes) info.position[lane] = position;
        if (lane == 0) {
          info.number = number;
          info.index = key / UNIT_KEYS;
          info.taken = chunk_end - chunk_begin;
          info.begins = now == chunk_begin;
          info.ends = now + 1 == chunk_end;
          info.whole = (whole & own) == own;
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive_expect_tx(&smem.k_full[slot], UNIT_BYTES);
        __syncwarp();
        if (lane < boxes) {
#pragma unroll
          for (int block = 0; block < COLUMN_BLOCKS; ++block)
            tma_load_4d(smem.k[slot] + block * UNIT_KEYS * ROW_BYTES + into, k_map, &smem.k_full[slot], block * BLOCK_COLUMNS,
                        row, head_kv, pool_page);
        }
        mbarrier_wait(&smem.v_empty[slot], slot_at.parity ^ 1);
        if (lane == 0) mbarrier_arrive_expect_tx(&smem.v_full[slot], UNIT_BYTES);
        __syncwarp();
        if (lane < boxes) {
#pragma unroll
          for (int block = 0; block < COLUMN_BLOCKS; ++block)
            tma_load_4d(smem.v[slot] + block * UNIT_KEYS * ROW_BYTES + into, v_map, &smem.v_full[slot], block * BLOCK_COLUMNS,
                        row, head_kv, pool_page);
        }
        slot_at.advance(NUM_CONSUMERS);
      }
      if (i == 0) {
        if (half_lane == 0 && own_unit < own_end && own_unit == own_begin) prefetch_q(params, Head(params, decode, box.number));
        // What comes after this batch is looked up now, and used when the batch has been copied.
        if (__any_sync(~0u, unit < end)) next_box = look();
      }
    }
  }
#pragma unroll
  for (int consumer = 0; consumer < NUM_CONSUMERS; ++consumer) {
    const RingPosition& slot_at = at[consumer];
    mbarrier_wait(&smem.k_empty[slot_at.slot], slot_at.parity ^ 1);
    if (lane == 0) {
      smem.unit[slot_at.parity][slot_at.slot].number = NO_MORE;
      mbarrier_arrive(&smem.k_full[slot_at.slot]);
    }
  }
}

// Tell the combiner of part `nth` of this warpgroup; by all its threads.
__device__ __forceinline__ void pass_on(SharedMemory& smem, int consumer, int nth, const Part& part) {
  const int entry = consumer * PARTS_OF_ONE + nth % PARTS_OF_ONE;
  mbarrier_wait(&smem.part_empty[entry], nth / PARTS_OF_ONE % 2 ^ 1);
  if (threadIdx.x % WARPGROUP == 0) smem.part[entry] = part;
  __syncwarp();
  if (threadIdx.x % WARP == 0) mbarrier_arrive(&smem.part_full[entry]);
}

// By one thread: the next head of which all parts are there, of the parts that this block completes; NO_MORE after the last one.
struct PartsOfBlock {
  int nth[NUM_CONSUMERS] = {};
  bool over[NUM_CONSUMERS] = {};

  __device__ __forceinline__ int next_head(SharedMemory& smem, const DecodeParams& decode) {
    while (!(over[0] && over[1])) {
#pragma unroll
      for (int consumer = 0; consumer < NUM_CONSUMERS; ++consumer) {
        const int entry = consumer * PARTS_OF_ONE + nth[consumer] % PARTS_OF_ONE;
        if (over[consumer] || !mbarrier_is_complete(&smem.part_full[entry], nth[consumer] / PARTS_OF_ONE % 2)) continue;
        const Part part = smem.part[entry];
        ++nth[consumer];
        over[consumer] = part.number == NO_MORE;
        if (over[consumer]) continue;
        mbarrier_arrive(&smem.part_empty[entry]);
        const int all = smem.first_unit[part.number + 1] - smem.first_unit[part.number];
        if (atomic_add_release(&decode.accounted_gmem[part.number], part.taken) + part.taken != all) continue;
        decode.accounted_gmem[part.number] = 0;
        return part.number;
      }
    }
    return NO_MORE;
  }
};
