// What the Hopper kernel has of the chunks before the one it is at (chunks.cuh): O of a warpgroup's rows, in L2, since registers
// are taken. Included by attention_hopper.cu.
#pragma once

// red.global.add.v4.f32 (PTX ISA, Parallel Synchronization: red): four sums; nobody waits for them. Numbers below the smallest
// normal are taken for 0.
__device__ __forceinline__ void add_4_global(float4* sums_gmem, const float4& x) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums_gmem), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

// A thread's part of them. It alone reads and writes it, so that the order of its own instructions is all that is needed.
struct ChunkTotals {
  float4* totals_gmem;  // [blocks, NUM_CONSUMERS, OUTPUTS / 4, WARPGROUP]: two outputs of either row
  ChunkSum row[2];
  bool any;

  __device__ explicit ChunkTotals(float4* totals_gmem) : totals_gmem(totals_gmem) {}

  __device__ __forceinline__ void begin() {
    any = false;
    row[0] = row[1] = ChunkSum();
  }

  // Add a chunk that is over. Few instructions: they are not in the cache of those that run all the time.
  __device__ __forceinline__ void add(const float (&o)[OUTPUTS], const Softmax& softmax) {
    float before[2], weight[2];
    join(softmax, before, weight);
    float4* const own_gmem = own();
    if (any) {
      if (__any_sync(~0u, before[0] != 1.f || before[1] != 1.f)) multiply(before);
#pragma unroll
      for (int i = 0; i < OUTPUTS; i += 4)
        add_4_global(own_gmem + i / 4 * WARPGROUP,
                     make_float4(multiply_ftz(o[i], weight[0]), multiply_ftz(o[i + 1], weight[0]),
                                 multiply_ftz(o[i + 2], weight[1]), multiply_ftz(o[i + 3], weight[1])));
    } else {
#pragma unroll
      for (int i = 0; i < OUTPUTS; i += 4)
        __stcg(own_gmem + i / 4 * WARPGROUP, make_float4(multiply_ftz(o[i], weight[0]), multiply_ftz(o[i + 1], weight[0]),
                                                         multiply_ftz(o[i + 2], weight[1]), multiply_ftz(o[i + 3], weight[1])));
    }
    any = true;
  }

  // O and the softmax of the last chunk, with those before it; sums are then those of whole rows.
  __device__ __forceinline__ void finish(float (&o)[OUTPUTS], Softmax& softmax) {
    if (!any) {
#pragma unroll
      for (int r = 0; r < 2; ++r) softmax.row_sum[r] = quad_sum(softmax.row_sum[r]);
      return;
    }
    float before[2], weight[2];
    join(softmax, before, weight);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      softmax.reference[r] = row[r].reference;
      softmax.row_sum[r] = row[r].row_sum;
    }
    constexpr int AT_ONCE = HEAD_DIM == 64 ? 2 : 8;  // sums on the way
    const float4* const own_gmem = own();
#pragma unroll
    for (int first = 0; first < OUTPUTS; first += 4 * AT_ONCE) {
      float4 sums[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) sums[j] = __ldcg(own_gmem + (first / 4 + j) * WARPGROUP);
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const int i = first + 4 * j;
        o[i] = joined(sums[j].x, before[0], o[i], weight[0]);
        o[i + 1] = joined(sums[j].y, before[0], o[i + 1], weight[0]);
        o[i + 2] = joined(sums[j].z, before[1], o[i + 2], weight[1]);
        o[i + 3] = joined(sums[j].w, before[1], o[i + 3], weight[1]);
      }
    }
  }

 private:
  __device__ __forceinline__ float4* own() const {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // addresses are worked out here, and kept in no register before
    return totals_gmem + (blockIdx.x * NUM_CONSUMERS + thread / WARPGROUP) * (OUTPUTS / 4) * WARPGROUP + thread % WARPGROUP;
  }

  __device__ __forceinline__ void join(const Softmax& softmax, float (&before)[2], float (&weight)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) weight[r] = row[r].join(softmax.reference[r], quad_sum(softmax.row_sum[r]), before[r]);
  }

  // Rare: a chunk's reference is far above those before it.
  __device__ __forceinline__ void multiply(const float (&before)[2]) {
    float4* const own_gmem = own();
#pragma unroll 1
    for (int i = 0; i < OUTPUTS / 4; ++i) {
      const float4 sum = __ldcg(own_gmem + i * WARPGROUP);
      __stcg(own_gmem + i * WARPGROUP, make_float4(multiply_ftz(sum.x, before[0]), multiply_ftz(sum.y, before[0]),
                                                   multiply_ftz(sum.z, before[1]), multiply_ftz(sum.w, before[1])));
    }
  }
};
