"""Arguments become plain values: a bool, a float or a str of Python's own, before anything is looked up by them.

A tensor among the arguments would be looked up by what it is, not by what it holds: the answer to one call would then
be given to the next one, after the tensor had changed, and whatever remembered the call would keep the tensor alive.
"""

from __future__ import annotations

import numbers
import operator
from posix import environ as process  # what lies beneath os.environ and follows it, at a tenth of the time of a look-up

import numpy as np
import torch

from flashcore.errors import InvalidProblem
from flashcore.numerics import transforms
from flashcore.numerics.transforms import constant_when_traced
from flashcore.problem import LARGEST

BATCH_INVARIANT = b"FLASHCORE_BATCH_INVARIANT"
"""The variable that asks for `Problem.batch_invariant` in every call that does not say, as `process` names it."""
SHOWN = 60
"""Characters of a value that an error shows."""


def shown(value) -> str:
    """A value in an error's words: a tensor by its dtype, shape and device, since its numbers may lie on a GPU."""
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor {list(value.shape)} on {value.device}"
    if isinstance(value, np.ndarray):
        return f"a numpy array of {value.dtype} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def flag(name: str, value) -> bool:
    """A bool from Python's or numpy's.

    Raises
    ------
    InvalidProblem
        It is anything else. A string or a number may mean the other one, and a tensor may be a mask.
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise InvalidProblem(f"{name} has to be True or False; got {shown(value)}.")


def batch_invariant(value=None) -> bool:
    """Whether bits are asked for that are the same in every batch; None for what the process asks for.

    Raises
    ------
    InvalidProblem
        It is no bool, or FLASHCORE_BATCH_INVARIANT holds something else than 1 or 0.
    """
    return _asked_by_process() if value is None else flag("batch_invariant", value)


@constant_when_traced
def _asked_by_process() -> bool:
    # Whoever traces a call gets what holds at that moment, as a constant of the graph.
    text = process.get(BATCH_INVARIANT, b"0")
    if text not in (b"0", b"1"):
        name, text = BATCH_INVARIANT.decode(), text.decode(errors="replace")
        raise InvalidProblem(f"{name} is {shown(text)}; set it to 1 or 0, or leave it out.")
    return text == b"1"


def number(name: str, value) -> float | None:
    """A float, or None.

    Any real number is one: Python's, numpy's, an array or a CPU tensor of no dimensions.

    Raises
    ------
    InvalidProblem
        It is no number; a tensor on a GPU, which the host would have to wait for, or one that gradients or tangents are
        asked of.
    """
    if value is None:
        return None
    given = value
    if isinstance(value, torch.Tensor):
        value = _from_tensor(name, value)
    elif isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise InvalidProblem(f"{name} must be a number, or None; got {shown(given)}.")
    try:
        return float(value)
    except OverflowError:  # a whole number or a fraction of hundreds of digits
        raise InvalidProblem(f"{name} is {shown(given)}; no float is as large.") from None


def integer(name: str, value) -> int:
    """An int from Python's or numpy's, or from a CPU tensor of one; `InvalidProblem` for anything else.

    True and False are none: whoever passes False for a size means that there is none, and 0 may mean something else. A
    symbol of torch's compiler or of export stays one, so that a graph is not bound to the number of its first call.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    given = value
    if isinstance(value, torch.Tensor):
        value = _from_tensor(name, value)
    try:
        if isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InvalidProblem(f"{name} is {shown(given)}; it has to be a whole number.") from None


def constant(size: int) -> int:
    """A size as a number of its own: what is traced from here on is for this size alone, were it a symbol before."""
    return len(range(size))  # the one way by which torch's compiler, in all releases, puts the number in its place


def softmax_scale(value) -> float | None:
    """A softmax scale as `number` reads it; `InvalidProblem` also for one that is not finite in float32."""
    scale = number("softmax_scale", value)
    if scale is not None and not -LARGEST <= scale <= LARGEST:  # also of NaN; torch's compiler follows this form
        raise InvalidProblem(f"softmax_scale must be finite in float32, or None for 1/sqrt(head_dim); got {scale}.")
    return scale


def _from_tensor(name: str, value: torch.Tensor):
    """The number that a tensor holds, where it can be read without a wait, and nothing is lost by it; else itself."""
    transforms.refuse(name, value)
    if value.dim():
        return value
    if value.device.type != "cpu":
        raise InvalidProblem(
            f"{name} is {shown(value)}, and reading it would wait for the device; pass a Python number, such as "
            "its item() taken once."
        )
    return value.item()


def word(name: str, value) -> str:
    """A string, such as the id of a backend; `InvalidProblem` for anything else."""
    if isinstance(value, str):
        return str(value)
    raise InvalidProblem(f"{name} has to be a string; got {shown(value)}.")
