"""FlashCore: attention kernels for Hopper GPUs, and the pipeline that checks, times and judges them.

The public names load on first use, so that ``import flashcore`` and ``flashcore --help`` need neither torch nor CUDA.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "attention": "flashcore.ops",
    "varlen_attention": "flashcore.varlen_ops",
    "paged_attention": "flashcore.paged_ops",
    "scaled_dot_product_attention": "flashcore.compat.sdpa",
    "replace_sdpa": "flashcore.compat.sdpa",
    "Problem": "flashcore.problem",
    "parse_problem": "flashcore.problem",
    "RunFolder": "flashcore.records",
    "Trial": "flashcore.records",
    "FlashCoreError": "flashcore.errors",
    "check_attention": "flashcore.measure.check",
    "bisect": "flashcore.bisection",
    "diagnose": "flashcore.bisection.diagnosis",
    "debug": "flashcore.bisection.interactive",
    "report": "flashcore.pipeline.reporting",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'flashcore' has no attribute '{name}'; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def load_ipython_extension(shell) -> None:
    """What ``%load_ext flashcore`` calls: it gives a notebook the magics ``%diagnose`` and ``%bisect``."""
    from flashcore.bisection.interactive import load_magics

    load_magics(shell)
