// What the 32 lanes of a warp do together.
#pragma once

constexpr int WARP = 32;

// The sum over each group of `LANES` neighbouring lanes, in all of them.
template <int LANES = WARP>
__device__ __forceinline__ float warp_sum(float x) {
  static_assert(LANES > 0 && LANES <= WARP && (LANES & (LANES - 1)) == 0, "lanes pair off, again and again");
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// How many lanes say yes, and how many of those come before this one.
struct Votes {
  int all, before;

  __device__ __forceinline__ explicit Votes(bool yes) {
    const unsigned ballot = __ballot_sync(~0u, yes);
    const unsigned lanes_before = (1u << (threadIdx.x % WARP)) - 1;
    all = __popc(ballot);
    before = __popc(ballot & lanes_before);
  }
};
