// Bits that do not depend on who shares the batch: the law that a row follows in every kernel compiled with
// FLASHCORE_INVARIANT; where that is not defined INVARIANT(...) is nothing.
//
// Keys are taken in tiles of LAW_TILE, from the first key of the sequence on, and CHUNK_TILES of them are a chunk. In each chunk
// a row begins afresh: its reference is the maximum of the first tile in which it sees a key, and it raises that by its own sums
// alone. Chunks are added in order. So it does not matter which chunks a block has, which rows a warp has, and which kernel it
// is. The host compiles without contraction of products and sums, so that variants agree.
#pragma once
#include "wgmma.cuh"

#define INVARIANT(...) __VA_ARGS__
#ifdef FLASHCORE_MASKS
#define CHUNKED(...)  // masks have it
#else
#define CHUNKED(...) __VA_ARGS__
#endif

constexpr int LAW_TILE = 64;
constexpr int CHUNK_TILES = 32;

// The chunk that a tile lies in, and the first tile of a chunk.
__device__ __forceinline__ int chunk_of(int tile) { return tile / CHUNK_TILES; }
__device__ __forceinline__ int first_tile_of(int chunk) { return chunk * CHUNK_TILES; }

// mul.ftz, add.ftz (PTX ISA, Floating Point: mul, add): as red.add rounds, which takes numbers below the smallest normal for 0.
__device__ __forceinline__ float multiply_ftz(float x, float y) {
  float z;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
__device__ __forceinline__ float add_ftz(float x, float y) {
  float z;
  asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// What the chunks of a row so far come to, but for O.
struct ChunkSum {
  // A chunk's reference may be so much higher than the sum's, as a power of two, before the sum takes it over.
  static constexpr float HIGHER_AT_MOST = 24.f;
  float reference = -INFINITY, row_sum = 0.f;

  // Add a chunk. Returns what to multiply its O by; `before` is what to multiply the O of those before it by, nearly always 1.
  __device__ __forceinline__ float join(float chunk_reference, float chunk_sum, float& before) {
    before = 1.f;
    if (chunk_sum == 0.f) return 0.f;  // the row sees none of its keys
    if (row_sum == 0.f) reference = chunk_reference;
    const float higher = chunk_reference - reference;
    if (higher > HIGHER_AT_MOST) {
      before = ex2_approx(-higher);
      row_sum = multiply_ftz(row_sum, before);
      reference = chunk_reference;
    }
    const float weight = higher > HIGHER_AT_MOST ? 1.f : ex2_approx(higher);
    row_sum = add_ftz(row_sum, multiply_ftz(chunk_sum, weight));
    return weight;
  }
};

// An element of O with a chunk's added.
__device__ __forceinline__ float joined(float sum, float before, float chunk, float weight) {
  return add_ftz(multiply_ftz(sum, before), multiply_ftz(chunk, weight));
}

// fma.rn.ftz (PTX ISA, Floating Point: fma): an element of O by 1 / l, for an O that is a sum over chunks, or one chunk's as it is.
__device__ __forceinline__ float normalised(float o, float inverse) {
  float out;
  asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(out) : "f"(o), "f"(inverse), "f"(0.f));
  return out;
}
