// Products of a warpgroup on Tensor Cores, accumulated in registers (PTX ISA, Asynchronous Warpgroup Level MMA).
//
// Each of the 128 threads holds N / 2 floats of the 64 x N accumulator: of eight columns at a time, two neighbours of row
// lane / 4 and two of row lane / 4 + 8, in the 16 rows of its warp.
#pragma once
#include "attention.cuh"
#include "ptx.cuh"

// wgmma.fence: registers and shared memory written before are seen by the products issued after it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// wgmma.commit_group: close the group of products issued so far.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wgmma.wait_group: wait until at most `PENDING` groups are still under way.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// A matrix in shared memory as wgmma wants it described (PTX ISA, matrix descriptor), in rows of 128 bytes whose 16-byte
// pieces are swizzled in groups of eight rows, as the tensor copies leave them. `block_bytes` leads from one block of 64
// columns to the next; only an operand whose columns are not the depth of the product (V) steps over it.
struct MatrixDescriptor {
  unsigned low;  // address and step between blocks, each in units of 16 bytes

  __device__ MatrixDescriptor(const void* matrix_smem, int block_bytes)
      : low((block_bytes >> 4) << 16 | smem_address(matrix_smem) >> 4) {}

  // The same matrix `bytes` further on; addresses in shared memory never carry out of the address field.
  __device__ MatrixDescriptor at(int bytes) const {
    MatrixDescriptor further = *this;
    further.low += bytes >> 4;
    return further;
  }
  __device__ unsigned long long bits() const {
    constexpr unsigned long long SWIZZLE_128_BYTES = 1ull << 62;
    constexpr unsigned long long EIGHT_ROWS = 8 * 128;
    return SWIZZLE_128_BYTES | (EIGHT_ROWS >> 4) << 32 | low;
  }
};

#if FLASHCORE_BF16
#define WGMMA_TYPES "f32.bf16.bf16"
#else
#define WGMMA_TYPES "f32.f16.f16"
#endif

#define REGISTERS_8(x, i) \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])

// wgmma.mma_async.m64nNk16, for N columns.
//   shared: x (+)= A @ B^T, both in shared memory, A 64 x 16 and B N x 16
//   registers: x (+)= A @ B, A 64 x 16 in registers, B 16 x N in shared memory; or A @ B^T, B N x 16
// With `add` zero the accumulator is overwritten.
template <int N>
struct Wgmma;

// NUMBERS: the accumulator's operands in the text; the others follow it as %D0 to %D6.
#define DEFINE_WGMMA(N, NUMBERS, D0, D1, D2, D3, D4, D5, D6, ...)                                                    \
  template <>                                                                                                        \
  struct Wgmma<N> {                                                                                                  \
    __device__ __forceinline__ static void shared(float (&x)[N / 2], MatrixDescriptor a, MatrixDescriptor b,         \
                                                  int add) {                                                         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #D2 ", 0;\n"                                             \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES " {" NUMBERS "}, %" #D0 ", %" #D1       \
                   ", p, 1, 1, 0, 0;\n}"                                                                           \
                   : __VA_ARGS__                                                                                     \
                   : "l"(a.bits()), "l"(b.bits()), "r"(add));                                                         \
    }                                                                                                                \
    template <bool B_TRANSPOSED = false>                                                                             \
    __device__ __forceinline__ static void registers(float (&x)[N / 2], const unsigned* a, MatrixDescriptor b,       \
                                                     int add) {                                                      \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #D5 ", 0;\n"                                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES " {" NUMBERS "}, {%" #D0 ", %" #D1      \
                   ", %" #D2 ", %" #D3 "}, %" #D4 ", p, 1, 1, %" #D6 ";\n}"                                          \
                   : __VA_ARGS__                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "r"(add), "n"(!B_TRANSPOSED));       \
    }                                                                                                                \
  };

#define NUMBERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NUMBERS_16 NUMBERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NUMBERS_24 NUMBERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NUMBERS_32 NUMBERS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_64                                                                                                   \
  NUMBERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51"  \
             ", %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OPERANDS_8(x) REGISTERS_8(x, 0)
#define OPERANDS_16(x) OPERANDS_8(x), REGISTERS_8(x, 8)
#define OPERANDS_24(x) OPERANDS_16(x), REGISTERS_8(x, 16)
#define OPERANDS_32(x) OPERANDS_24(x), REGISTERS_8(x, 24)
#define OPERANDS_64(x) \
  OPERANDS_32(x), REGISTERS_8(x, 32), REGISTERS_8(x, 40), REGISTERS_8(x, 48), REGISTERS_8(x, 56)

DEFINE_WGMMA(64, NUMBERS_32, 32, 33, 34, 35, 36, 37, 38, OPERANDS_32(x))
DEFINE_WGMMA(128, NUMBERS_64, 64, 65, 66, 67, 68, 69, 70, OPERANDS_64(x))

// Which of a thread's two rows an accumulator element belongs to, and its column.
__device__ constexpr int row_of(int i) { return i / 2 % 2; }
__device__ __forceinline__ int column_of(int i, int lane) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// The four lanes that share a row combine.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
