// Barriers in shared memory that count arrivals and bytes, and barriers between a few warps. One PTX instruction a
// function, named after it; the PTX ISA section stands beside each.
#pragma once
#include "ptx.cuh"

using Mbarrier = unsigned long long;

// mbarrier.init (PTX ISA, mbarrier): a phase is complete after `arrivals` arrivals and all bytes expected.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier_smem, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier_smem)), "r"(arrivals) : "memory");
}

// fence.mbarrier_init (PTX ISA, membar/fence): initialised barriers become visible to the tensor copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive (PTX ISA, mbarrier).
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier_smem) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier_smem)) : "memory");
}

// mbarrier.arrive.expect_tx (PTX ISA, mbarrier): arrive, and hold the phase until `bytes` more have been copied.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(Mbarrier* barrier_smem, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier_smem)), "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity (PTX ISA, mbarrier), until the phase of that parity is complete.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier_smem, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(smem_address(barrier_smem)),
      "r"(parity)
      : "memory");
}

// bar.sync (PTX ISA, bar/barrier): wait until `threads` threads have come to barrier `id`.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// bar.arrive (PTX ISA, bar/barrier): count towards barrier `id` without waiting.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// setmaxnreg.dec, setmaxnreg.inc (PTX ISA, Miscellaneous: setmaxnreg): a warpgroup gives registers back, or takes them.
template <int REGISTERS>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
