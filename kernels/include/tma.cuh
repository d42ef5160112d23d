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

// cp.async.bulk.tensor.4d, the other way: one box from shared memory, by the threads that `ask` for it. Rows beyond the
// tensor's last are not written; a box must not begin before its first. Predicated, since a branch would take what is uniform
// out of the uniform registers.
__device__ __forceinline__ void tma_store_4d(bool ask, const CUtensorMap& map, const void* src_smem, int column, int row,
                                             int head, int batch) {
  asm volatile(
      "{\n"
      ".reg .pred ask;\n"
      "setp.ne.s32 ask, %6, 0;\n"
      "@ask cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n"
      "}\n" ::"l"(&map),
      "r"(smem_address(src_smem)), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(int(ask))
      : "memory");
}

// cp.async.bulk.commit_group, wait_group.read (PTX ISA, Data Movement: cp.async.bulk.commit_group): close the group of copies
// from shared memory that the thread has asked for; wait until what they read may be overwritten.
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// fence.proxy.async (PTX ISA, membar/fence): what this thread wrote to shared memory is seen by tensor copies and wgmma.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
