"""The machine: compile a kernel, launch it, watch it, call cuBLASLt, and say what this machine has.

`build` makes cubins with NVRTC and needs no GPU, `launching` runs them, and `isolation` gives a process of its own to a
measurement that may hang or kill the CUDA context. Nothing here knows which backends there are.
"""

__all__ = [
    "build", "cache", "counters", "cublaslt", "device", "isolation", "launching", "options", "profiling", "rooms",
]  # fmt: skip
