"""Call somebody else's kernel with what it can take.

FlashAttention and cuDNN read 16 bytes at a time. Of tensors that start elsewhere, or whose rows do, one gives a wrong
result and the other ends the CUDA context, so such tensors are copied first. FlashAttention folds the softmax scale
into the exponential, after it took the maximum of the unscaled products: right above 0, and an overflow below it.

The packages are looked for by each name that they go by, without importing them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flashcore.backends._contract import AVAILABLE, Availability
from flashcore.errors import Unsupported

if TYPE_CHECKING:  # torch takes seconds to import, and listing backends needs none of it
    import torch

    from flashcore.numerics.masking import MaskTensors
    from flashcore.problem import Problem

COPY_BYTES = 16


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if every row of it starts at 16 bytes and no two overlap, else a contiguous copy.

    A dimension of one element counts too, since its stride is told to the kernel. What a copy would not mend stays: a
    head_dim whose rows are no multiple of 16 bytes, which torch pads by itself.
    """
    size = tensor.element_size()
    starts_well = tensor.data_ptr() % COPY_BYTES == 0
    if starts_well and all(step > 0 and step * size % COPY_BYTES == 0 for step in tensor.stride()[:-1]):
        return tensor
    if starts_well and tensor.shape[-1] * size % COPY_BYTES and tensor.is_contiguous():
        return tensor
    import torch

    return tensor.clone(memory_format=torch.contiguous_format)


def with_scale_above_zero(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Queries and a scale above 0 that give the same scores, exactly: a sign goes into `q`, and so does a zero."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


def call_flash_attention(
    function: Callable[..., Any], q, k, v, problem: Problem, *, no_limit: int | None = -1, **options: Any
):
    """`out` and `lse` (None where it returns none) of a function of FlashAttention's own signature and layout.

    Parameters
    ----------
    no_limit
        What a window that is open to one side has there, in this function's words.
    """
    options |= _asked(problem, no_limit)
    q, scale = with_scale_above_zero(q, problem.scale)
    # It takes [B, S, H, D]; a transposed view costs nothing.
    given = (readable(t).transpose(1, 2) for t in (q, k, v))
    result = function(*given, softmax_scale=scale, causal=problem.causal, **options)
    out, lse = (result[0], result[1]) if isinstance(result, (tuple, list)) else (result, None)
    return out.transpose(1, 2), lse


def _asked(problem: Problem, no_limit: int | None) -> dict[str, Any]:
    """What the function is told of masks: only those in force, so that it need not know the words of others."""
    words: dict[str, Any] = {}
    if "window" in problem.masks:
        words["window_size"] = tuple(no_limit if side < 0 else side for side in problem.window)
    if problem.softcap is not None:
        words["softcap"] = problem.softcap
    return words


def call_ragged(
    function: Callable[..., Any], q, k, v, problem: Problem, masks: MaskTensors, *, no_limit: int | None = -1,
    longest: bool = True, **options: Any,
):  # fmt: skip
    """`out` of a function of FlashAttention's signature for sequences that lie end to end, and None.

    Rows that belong to no sequence may hold anything, as the peer leaves them: to clear them takes a pass over `out`,
    which would count as its time. What `lse` holds in a row without a key is its own affair too, so it is not given on.

    Parameters
    ----------
    longest
        Whether the function wants to know the longest sequence's length.
    """
    options |= _asked(problem, no_limit)
    if longest:
        options |= {"max_seqlen_q": problem.seqlen_q, "max_seqlen_k": problem.seqlen_k}
    q, scale = with_scale_above_zero(q, problem.scale)
    given = (readable(t)[0].transpose(0, 1) for t in (q, k, v))  # it takes [total, H, D]
    result = function(
        *given, cu_seqlens_q=masks.cu_seqlens_q, cu_seqlens_k=masks.cu_seqlens_k, softmax_scale=scale,
        causal=problem.causal, **options,
    )  # fmt: skip
    out = result[0] if isinstance(result, (tuple, list)) else result
    return out.transpose(0, 1)[None], None


def as_refusal(backend: str, error: Exception) -> Exception:
    """`Unsupported` where a package says of its own build that it does not support something; else the error itself."""
    said = re.search(r"\w[^\n]*does not support[^\n.]*", str(error))
    return Unsupported(backend, f"the package says: {said[0].strip()}") if said else error


def with_empty_rows(out: torch.Tensor, lse: torch.Tensor | None, problem: Problem, masks: MaskTensors | None = None):
    """The same results, in place, with what belongs into rows that see no key, where a peer may leave anything: 0, and
    in `lse` -inf or the sink."""
    right = problem.window[1]  # the keys of row i end at key i + seqlen_k - seqlen_q + right
    num_empty = max(0, problem.seqlen_q - problem.seqlen_k - right) if right >= 0 else 0
    if num_empty:
        out[:, :, :num_empty] = 0
        if lse is not None:
            lse[:, :, :num_empty] = masks.sink[:, None] if problem.sink else -math.inf
    return out, lse


def _is_there(module: str) -> bool:
    if sys.modules.get(module) is not None:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # a package around it that is broken, which is as good as none
        return False


def installed(modules: Sequence[str]) -> str | None:
    """The first of these modules that can be imported here, by name; None where none is. Loads no more than a package
    around it."""
    return next((name for name in modules if _is_there(name)), None)


def version_of(distributions: Sequence[str]) -> str | None:
    """The version of the first of these distributions that is installed; None where none says so."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def on_hopper(title: str, load: Callable[[], Any]) -> Availability:
    """Whether torch sees a Hopper GPU, which the peer of this title is called on, and the peer can be imported here.

    A wheel that was built for another torch or another CUDA is installed, and fails only when it is loaded.
    """
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return Availability(False, f"{title} needs a Hopper GPU", "run on an H100 or H200")
    try:
        load()
    except Exception as error:  # whatever an import may raise, it is the reason
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
        return Availability(
            False, f"{title} is installed and cannot be imported ({said})",
            f"install a build of it for torch {torch.__version__} and CUDA {torch.version.cuda}",
        )  # fmt: skip
    return AVAILABLE
