"""Make the Q, K and V of a problem and what its masks need: seeded, in the patterns that attention kernels break on."""

from __future__ import annotations

import itertools
import random
from numbers import Integral
from typing import TYPE_CHECKING, Literal, get_args

from flashcore.errors import InvalidProblem, UnknownName
from flashcore.numerics import ambient, masking
from flashcore.numerics.masking import MaskTensors
from flashcore.problem import Problem

if TYPE_CHECKING:
    import torch

Pattern = Literal[
    "normal", "uniform", "large", "constant", "outlier", "alternating", "tiny", "rising", "falling", "steep", "sunken",
]  # fmt: skip
PATTERNS: tuple[str, ...] = get_args(Pattern)
LAYOUTS = ("bhsd", "bshd", "apart")

LARGE = 64.0
"""Standard deviation of Q and K under `large`: at head_dim 64 an unscaled product then passes float16's 65504."""
OUTLIER = 50.0
OUTLIER_SHARE = 1 / 512
"""Under `outlier` one element in 512 of Q, K and V is 50 times the rest, as activations of real models are."""
TINY = 1e-3
RAMP = 4.0
"""Under `rising` and `falling` the mean score runs over about 16 units, so every page has a new maximum, or none."""
STEEP = 8.0
"""Under `steep` it rises by about 64, so that a few pages on a prob against the first page's maximum is past float16's
largest number, e^11, and still far below bfloat16's, e^88: a guard for the one dtype is none for the other."""
SUNKEN = 200.0
"""Under `sunken` all scores lie about so far below zero. Whatever is weighed against a reference of 0, as one that no
key has set may be, is then gone: float32 ends at e^-87."""
SPARE = 8
"""Elements between the rows of Q under `apart`."""
UNUSED_ROWS = 3
"""Rows of a ragged batch behind its last sequence."""
LENGTHS = ("mixed", "equal", "uniform")
MOST_SEED = 2**62
"""torch's generators hold 64 bits, and some seeds are drawn from others by a sum."""
FEWEST_ROWS = 64
"""Of a sequence under `uniform`."""
SINKS = (1.0, 5.0)
"""Least and greatest size of a sink: beside a few hundred scores about 0 it takes part of a row, or nothing."""


@ambient.judging
def make_inputs(
    problem: Problem,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    pattern: Pattern = "normal",
    layout: Literal["bhsd", "bshd", "apart"] = "bhsd",
    masks: MaskTensors | None = None,
    spare: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V for one problem, in its dtype, with fixed numbers for a seed, pattern and kind of device.

    Parameters
    ----------
    problem
        Shapes and dtype.
    seed
        Of the generator on `device`; the CPU's and the GPU's generators give different numbers for one seed.
    device
        Where the tensors are made. A GPU makes them itself: 100 million numbers take too long on the host.
    pattern
        ``normal`` and ``uniform`` (-1 to 1): the plain cases. ``large``: unscaled scores overflow float16.
        ``constant``: every key scores alike, so `out` is the mean of V. ``outlier``: one element in 512 is 50 times the
        rest. ``alternating``: the sign of the keys flips from one to the next, as a swapped column would show.
        ``tiny``: scores near zero. ``rising``: later keys score higher, so the running maximum moves on every page.
        ``falling``: the first page holds the maximum of the row. ``steep``: as ``rising``, past what float16 holds.
        ``sunken``: every score lies far below zero.
    layout
        ``bhsd``: contiguous ``[B, H, S, D]``. ``bshd``: the same shape as a strided view of ``[B, S, H, D]`` memory.
        ``apart``: each in an order of its own, so that strides of one are wrong for the others: K as ``bhsd``, V as
        ``bshd``, and Q with room between its rows.
    masks
        Where sequences have lengths, says which rows are real, and all others hold NaN; None for `make_masks` of the
        same seed.
    spare
        Rows of a ragged batch behind its last sequence; None for `UNUSED_ROWS`.

    Returns
    -------
    q, k, v
        ``[batch, num_heads_q, seqlen_q, head_dim]`` and twice ``[batch, num_heads_kv, seqlen_k, head_dim]``. Of a
        ragged batch ``[1, num_heads, total, head_dim]``, where `spare` rows belong to no sequence.

    Raises
    ------
    UnknownName
        No such pattern or layout.
    InvalidProblem
        `refuse_seed`.
    """
    import torch

    refuse_seed(seed)
    if pattern not in PATTERNS:
        raise UnknownName("input pattern", pattern, list(PATTERNS))
    if layout not in LAYOUTS:
        raise UnknownName("layout", layout, list(LAYOUTS))
    device = torch.device(device)
    generator = torch.Generator(device=device).manual_seed(int(seed))
    dtype = getattr(torch, problem.dtype)

    if problem.lengths and masks is None:
        masks = make_masks(problem, seed=seed, device=device)
    batch, rows_q, rows_k = problem.batch, problem.seqlen_q, problem.seqlen_k
    # Position of each key from 0 to 1, to be laid along the first column of the head.
    position = torch.linspace(0.0, 1.0, rows_k, device=device)
    if problem.lengths == "ragged":
        lengths_q, lengths_k = (cu.diff().tolist() for cu in (masks.cu_seqlens_q, masks.cu_seqlens_k))
        spare = UNUSED_ROWS if spare is None else spare
        batch, rows_q, rows_k = 1, sum(lengths_q) + spare, sum(lengths_k) + spare
        parts = [torch.linspace(0.0, 1.0, length, device=device) for length in [*lengths_k, spare]]
        position = torch.cat(parts)

    def draw(heads: int, rows: int) -> torch.Tensor:
        shape = (batch, heads, rows, problem.head_dim)
        if pattern == "uniform":
            return torch.rand(shape, generator=generator, device=device).mul_(2).sub_(1)
        values = torch.randn(shape, generator=generator, device=device)
        if pattern == "outlier":
            picked = torch.rand(shape, generator=generator, device=device) < OUTLIER_SHARE
            values = torch.where(picked, values * OUTLIER, values)
        return values

    q = draw(problem.num_heads_q, rows_q)
    k = draw(problem.num_heads_kv, rows_k)
    v = draw(problem.num_heads_kv, rows_k)

    if pattern == "large":
        q, k = q * LARGE, k * LARGE
    elif pattern == "constant":
        k = torch.ones_like(k) * 0.5
        q = torch.ones_like(q)
    elif pattern == "alternating":
        sign = 1.0 - 2.0 * (torch.arange(rows_k, device=device) % 2)
        k = k.abs() * sign[:, None]
        q = q.abs()
    elif pattern == "tiny":
        q, k = q * TINY, k * TINY
    elif pattern in ("rising", "falling", "steep", "sunken"):
        # One column carries the level; it is divided by the scale so that the scores move whatever the scale is.
        level = {
            "rising": RAMP * position, "falling": RAMP * (1.0 - position), "steep": STEEP * position,
            "sunken": torch.full_like(position, -SUNKEN / STEEP),
        }[pattern]  # fmt: skip
        # The last column carries a large one: were it the first, all that a sum adds to it would be rounded at its
        # size, and right kernels would be off by more than the error model of a sum, which takes terms that grow it.
        column, size = (-1, STEEP) if pattern in ("steep", "sunken") else (0, RAMP)
        q[..., column] = size
        k[..., column] = level / (problem.scale or 1.0)

    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if problem.lengths:
        for tensor, name in ((q, "q"), (k, "k"), (v, "k")):
            padding = ~masking.real_rows(tensor, problem, masks, name)
            tensor.masked_fill_(padding[:, None, :, None], float("nan"))
    if layout == "bhsd":
        return q, k, v
    if layout == "bshd":
        return _rows_first(q), _rows_first(k), _rows_first(v)
    padded = torch.zeros(*q.shape[:3], q.shape[3] + SPARE, dtype=dtype, device=device)
    return padded[..., : q.shape[3]].copy_(q), k, _rows_first(v)


def _rows_first(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers and shape, in the memory order ``[B, S, H, D]``."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def refuse_seed(seed: int) -> None:
    """Raise `InvalidProblem` for what is no whole number, or one beyond `MOST_SEED`."""
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise InvalidProblem(f"seed: {seed!r} is no whole number.")
    if abs(seed) > MOST_SEED:
        raise InvalidProblem(f"seed: {seed} is too large; give a number from -{MOST_SEED} to {MOST_SEED}.")


@ambient.judging
def make_masks(
    problem: Problem, *, seed: int = 0, device: str | torch.device = "cpu", lengths: str = "mixed"
) -> MaskTensors | None:
    """The tensors that a problem's masks need, with fixed numbers for a seed; None where it needs none.

    Sinks of both signs take turns; each is a number that bfloat16 has, since some peers take no other. `lengths` says
    how long sequences are (`lengths_of`).
    """
    import torch

    if not masking.needs_tensors(problem):
        return None
    device, given = torch.device(device), {}
    if problem.sink:
        generator = torch.Generator().manual_seed(seed)
        size = SINKS[0] + (SINKS[1] - SINKS[0]) * torch.rand(problem.num_heads_q, generator=generator)
        sign = 1.0 - 2.0 * ((torch.arange(problem.num_heads_q) + seed) % 2)
        given["sink"] = (size * sign).bfloat16().float().to(device)
    if problem.lengths:
        for name, real in zip("qk", lengths_of(problem, seed, lengths), strict=True):
            if problem.lengths == "ragged":
                real, name = [0, *itertools.accumulate(real)], f"cu_seqlens_{name}"
            else:
                name = f"seqlens_{name}"
            given[name] = torch.tensor(real, dtype=torch.int32, device=device)
    return masking.mask_tensors(problem, device, **given)


def lengths_of(problem: Problem, seed: int = 0, kind: str = "mixed") -> tuple[list[int], list[int]]:
    """Real queries and real keys of each sequence, fixed for a seed; the host needs no tensor to know them.

    Parameters
    ----------
    kind
        ``mixed``: of six sequences in a row one has all of its queries and some keys, one all keys, one a single key,
        one no key, one no query, and one a single query; which comes first depends on the seed. ``equal``: all are
        whole. ``uniform``: as many queries as keys, from `FEWEST_ROWS` to all, each number as likely.

    Raises
    ------
    UnknownName
        No such kind.
    """
    if kind not in LENGTHS:
        raise UnknownName("kind of lengths", kind, list(LENGTHS))
    if kind == "equal":
        return [problem.seqlen_q] * problem.batch, [problem.seqlen_k] * problem.batch
    rng = random.Random(f"lengths {seed}")
    if kind == "uniform":
        most = min(problem.seqlen_q, problem.seqlen_k)
        drawn = [rng.randint(min(FEWEST_ROWS, most), most) for _ in range(problem.batch)]
        return drawn, list(drawn)
    lengths_q, lengths_k = [], []
    for sequence in range(problem.batch):
        some_q, some_k = rng.randint(1, problem.seqlen_q), rng.randint(1, problem.seqlen_k)
        pair = (
            (problem.seqlen_q, some_k), (some_q, problem.seqlen_k), (some_q, 1), (some_q, 0), (0, some_k), (1, some_k),
        )[(sequence + seed) % 6]  # fmt: skip
        lengths_q.append(pair[0])
        lengths_k.append(pair[1])
    return lengths_q, lengths_k
