// Tensor copies between global and shared memory by the copy engine.
#pragma once
#include "mbarrier.cuh"

// What cuTensorMapEncodeTiled fills in on the host; <cuda.h>, which declares it, does not compile under NVRTC.
struct alignas(64) CUtensorMap {
  unsigned long long opaque[16];
};

// prefetch.tensormap (PTX ISA, Data Movement: prefetch).
__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// cp.async.bulk.tensor.4d (PTX ISA, Data Movement: cp.async.bulk.tensor): one box, whose first element stands at
// (column, row, head, batch), to shared memory. What lies outside the tensor becomes zero, and counts as copied.
__device__ __forceinline__ void tma_load_4d(void* dst_smem, const CUtensorMap& map, Mbarrier* barrier_smem, int column,
                                            int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(smem_address(dst_smem)),
      "l"(&map), "r"(smem_address(barrier_smem)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// fence.proxy.async (PTX ISA, membar/fence): what this thread wrote to shared memory is seen by tensor copies and wgmma.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
