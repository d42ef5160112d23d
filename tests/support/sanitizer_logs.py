"""What compute-sanitizer prints: samples in the tool's form, whose places and numbers are invented."""

from __future__ import annotations

MEMCHECK = """\
========= COMPUTE-SANITIZER
the checked program says something
========= Invalid __global__ read of size 2 bytes
=========     at attention_scalar+0x4f0 in /somewhere/attention_scalar.cu:63
=========     by thread (37,0,0) in block (4,0,0)
=========     Access to 0x7f10c0a00200 is out of bounds
=========     and is 513 bytes after the nearest allocation at 0x7f10c0a00000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernel [0x2e5a31] in libcuda.so.1
=========
========= Invalid __global__ read of size 2 bytes
=========     at attention_scalar+0x4f0 in /somewhere/attention_scalar.cu:63
=========     by thread (38,0,0) in block (4,0,0)
=========     Access to 0x7f10c0a00202 is out of bounds
=========
========= Invalid __shared__ write of size 16 bytes
=========     at cp_async_16(void *, const void *, int)+0x90 in ptx.cuh:14
=========     by thread (1,0,0) in block (0,2,0)
=========     Address 0x18004 is misaligned
=========         Device Frame: copy_rows<(int)64>(__half (*)[72], const __half *, int)+0x80 in attention_wmma.cu:62
=========         Device Frame: attention_wmma+0x60 in attention_wmma.cu:121
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernel [0x2e5a31] in libcuda.so.1
=========
========= Program hit cudaErrorIllegalAddress (error 700) due to "an illegal memory access was encountered" on a call.
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: [0x48b53f] in libcuda.so.1
=========
========= Target application returned an error
========= ERROR SUMMARY: 4 errors
========= ERROR SUMMARY: 2 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""


RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at cp_async_16(void *, const void *, int)+0x3380 in ptx.cuh:14
=========     and Read access at attention_wmma+0x1f0 in /a folder/attention_wmma.cu:152 [248 hazards]
=========     and Read access at attention_wmma+0x2f0 in /b/attention_wmma.cu:207 [8 hazards]
=========
========= Warning: Race reported between Read access at void other::Kernel<(int)256>(const int *, int)+0x130
=========     and Write access at void other::Kernel<(int)256>(const int *, int)+0x160 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


HAZARDS = """\
========= ERROR: Potential WAR hazard detected at __shared__ 0x410 in block (11,0,0) :
=========     Read Thread (127,0,0) at attention_scalar+0x860 in attention_scalar.cu:70
=========     Write Thread (0,0,0) at attention_scalar+0x9d0 in attention_scalar.cu:62
=========     Current Value : 0, Incoming Value : 181
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


INITCHECK = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 2 bytes
=========     at attention_scalar+0x250 in attention_scalar.cu:52
=========     by thread (16,0,0) in block (0,0,0)
=========     Address 0x7f3c7ec000fc
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, at::FillFunctor<float>>(int, T2)+0x70
=========     by thread (31,0,0) in block (1,0,0)
=========     Address 0x7f3c7ec000fc
=========
========= ERROR SUMMARY: 2 errors
"""


SYNCCHECK = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at attention_wmma+0xa0 in attention_wmma.cu:134
=========     by thread (19,0,0) in block (0,0,0)
=========
========= Barrier error detected. Divergent thread(s) in block
=========     at 0x000008f0 in /somewhere/attention_wmma.cu:134:attention_wmma(AttentionParams)
=========     by thread (63,0,0) in block (0,0,0)
=========     Device Frame:/somewhere/attention_wmma.cu:134:attention_wmma(AttentionParams) (attention_wmma : 0x8f0)
========= ERROR SUMMARY: 2 errors
"""


CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"


CLEAN_RACE = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
