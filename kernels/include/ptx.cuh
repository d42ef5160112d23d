// One PTX instruction a function, named after it; the PTX ISA section stands beside each.
#pragma once

// A shared-memory address as the 32-bit number that PTX wants.
__device__ __forceinline__ unsigned smem_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// cp.async.cg (PTX ISA, Data Movement: cp.async): 16 bytes from global to shared memory, past L1.
// Only `valid_bytes` (0 or 16) are read; the rest of the 16 is filled with zeros.
__device__ __forceinline__ void cp_async_16(void* dst_smem, const void* src_gmem, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem_address(dst_smem)), "l"(src_gmem),
               "r"(valid_bytes)
               : "memory");
}

// cp.async.commit_group: close the group of copies issued so far by this thread.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// cp.async.wait_group: wait until at most `PENDING` groups of this thread are still under way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// ex2.approx.ftz.f32 (PTX ISA, Floating Point: ex2): 2^x, with 2^-inf = 0.
__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// lg2.approx.ftz.f32, rcp.approx.ftz.f32 (PTX ISA, Floating Point: lg2, rcp): log2(x), with minus infinity for 0; 1 / x.
__device__ __forceinline__ float lg2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ldmatrix.x4 (PTX ISA, Warp Level Matrix Instructions: ldmatrix): four 8 x 8 matrices of 16-bit elements, of which lane i
// gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(unsigned* x, const void* row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(smem_address(row_smem))
               : "memory");
}

// stmatrix.x4 (PTX ISA, Warp Level Matrix Instructions: stmatrix): the way back.
__device__ __forceinline__ void store_matrices(void* row_smem, const unsigned (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(row_smem)), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// prefetch.global.L2 (PTX ISA, Data Movement: prefetch): bring the line that holds an address into L2.
__device__ __forceinline__ void prefetch_l2(const void* src_gmem) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(src_gmem) : "memory");
}

// atom.add.release.gpu (PTX ISA, Parallel Synchronization: atom): what the thread wrote before, and what it knows others wrote,
// is seen by whoever sees the sum. Returns what was there.
__device__ __forceinline__ int atomic_add_release(int* sum_gmem, int x) {
  int before;
  asm volatile("atom.add.release.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(sum_gmem), "r"(x) : "memory");
  return before;
}

// fence.acq_rel.gpu (PTX ISA, membar/fence): what others wrote before a value that the thread has seen can be read.
__device__ __forceinline__ void fence_acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

#ifdef FLASHCORE_MASKS
// st.global, st.shared (PTX ISA, Data Movement: st): 16 bytes, by the threads that `ask` for it. Predicated, since a branch would
// take what is uniform out of the uniform registers.
__device__ __forceinline__ void store_16_global(bool ask, void* dst_gmem, const uint4& x) {
  asm volatile(
      "{\n"
      ".reg .pred ask;\n"
      "setp.ne.s32 ask, %5, 0;\n"
      "@ask st.global.v4.b32 [%0], {%1, %2, %3, %4};\n"
      "}\n" ::"l"(dst_gmem),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(int(ask))
      : "memory");
}
__device__ __forceinline__ void store_16_shared(bool ask, void* dst_smem, const uint4& x) {
  asm volatile(
      "{\n"
      ".reg .pred ask;\n"
      "setp.ne.s32 ask, %5, 0;\n"
      "@ask st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n"
      "}\n" ::"r"(smem_address(dst_smem)),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(int(ask))
      : "memory");
}
#endif
