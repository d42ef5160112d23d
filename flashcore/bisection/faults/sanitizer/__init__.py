"""NVIDIA's compute-sanitizer on our kernels: run it, read its log, keep its findings as records.

`sanitizing` starts the tool on a small problem, `log` reads what the tool printed, and `target` is the program that the
tool watches. Where the tool is not installed, that is a record too.
"""

__all__ = ["sanitizing"]
