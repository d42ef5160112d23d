"""Compare a backend with the float64 reference: every element, bounds that the precision explains, NaN always fails."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from flashcore import backends
from flashcore.errors import BackendUnavailable, Unsupported
from flashcore.measure.cluster import Task
from flashcore.numerics import ambient, instruments, masking, reference
from flashcore.numerics.inputs import make_inputs, make_masks
from flashcore.numerics.masking import MaskTensors
from flashcore.numerics.outputs import poisoned_outputs
from flashcore.numerics.tolerance import TANH_ERROR, UNIT_FLOAT32, Comparison, compare
from flashcore.problem import Problem, parse_problem, square
from flashcore.records import Correctness, Trial, digits

LSE_BOUND = 1e-3
"""What `lse` may be off by, besides its rounding."""


@dataclass(frozen=True)
class Case:
    """A problem with its inputs, what is expected of a backend, and how far off it may be."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    """float64 ``[B, Hq, Sq, D]``; of a ragged batch ``[1, Hq, total, D]``."""
    lse: torch.Tensor
    """float64, shaped as `out` without its last dimension."""
    out_atol: float
    out_rtol: float
    lse_atol: float
    lse_rtol: float
    bad_inputs: str | None
    """Why the inputs are no test of a kernel (they hold NaN or Inf), or None."""
    masks: MaskTensors | None = None
    """Where the masks of the problem need tensors."""


@functools.lru_cache(maxsize=1)
@ambient.judging
def make_case(
    problem: Problem, seed: int, pattern: str, layout: str, device: str, round_scores: bool = False,
    tanh_error: float = TANH_ERROR, lengths: str = "mixed", spare: int | None = None,
) -> Case:  # fmt: skip
    """Inputs and bounds of one check; the last is kept, since the backends of a sweep share it one after another."""
    masks = make_masks(problem, seed=seed, device=device, lengths=lengths)
    q, k, v = make_inputs(
        problem, seed=seed, device=device, pattern=pattern, layout=layout, masks=masks, spare=spare
    )  # fmt: skip
    return expected(q, k, v, problem, round_scores=round_scores, masks=masks, tanh_error=tanh_error)


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, *, round_scores: bool,
    masks: MaskTensors | None = None, tanh_error: float = TANH_ERROR,
) -> Case:  # fmt: skip
    """What attention gives for these inputs, in float64, and how far off a backend may be.

    Bound of `out`: twice the largest error that the same maths makes at this precision, and of rounding
    ``eps(dtype) * |expected|`` and what a rounding of the scores does: they are sums in float32 with partial sums up to
    ``scale * |q| |k|`` (Cauchy-Schwarz), so an exponent is off by `delta` = 2^-24 of that and `out` by
    ``2 delta max|v|``. The last counts for large inputs alone. Bound of `lse`: 1e-3, twice the error at this precision,
    `delta` and a rounding to float32. A backend that stores its scores in 16 bits (`rounds_scores`) is held to the same
    maths with that rounding in it. Under a softcap `delta` also has ``softcap * tanh_error`` (`Backend.tanh_error`).
    Rows that are not real count for nothing in the bounds, and have to be 0, and -inf in `lse`.
    """
    out, lse = reference.attention(q, k, v, problem, masks)
    near_out, near_lse = reference.attention_same_precision(q, k, v, problem, masks, round_scores=round_scores)
    real = dict(zip("qkv", masking.right_aligned(q, k, v, problem, masks)[:3], strict=True))
    figures = torch.stack([
        *(real[name].float().norm(dim=-1).max().double() for name in "qk"),
        real["v"].abs().max().double(),
        (near_out - out).abs().max().double(),
        torch.where(lse.isfinite(), (near_lse - lse).abs(), 0.0).max().double(),
        *(t.isfinite().all().double() for t in real.values()),
    ])  # fmt: skip
    # At once: each number that a GPU is asked for is waited for.
    longest_q, longest_k, most, out_error, lse_error, *finite = figures.tolist()
    delta = UNIT_FLOAT32 * abs(problem.scale) * longest_q * longest_k + (problem.softcap or 0.0) * tanh_error
    bad = [name for name, whole in zip(real, finite, strict=True) if not whole]
    return Case(
        q, k, v, out, lse,
        out_atol=2 * out_error + 2 * delta * most,
        out_rtol=torch.finfo(q.dtype).eps,
        lse_atol=LSE_BOUND + 2 * lse_error + delta,
        lse_rtol=4 * UNIT_FLOAT32,
        bad_inputs=f"the inputs themselves hold NaN or Inf (in {', '.join(bad)}), which says nothing of the backend"
        if bad else None,
        masks=masks,
    )  # fmt: skip


def guarded(kind: str, backend: backends.Backend, problem: Problem, measure: Callable[[], Trial], **fields) -> Trial:
    """Run `measure` and turn what it raises into a trial's status and reason, so that one bad backend ends no sweep.

    A kernel whose source is edited meanwhile is an error too: nobody could say which of the two was measured.
    """
    before = hash_of(backend, problem)
    try:
        backend.require(problem)
        trial = measure()
        if hash_of(backend, problem) == before:
            return trial
        status, reason = "error", "its source was edited while it was measured, so measure it again"
    except BackendUnavailable as error:
        status, reason = "unavailable", f"{error.reason}; to mend it: {error.fix}"
    except Unsupported as error:
        status, reason = "unsupported", error.reason
    except Exception as error:  # a broken kernel may raise anything; the record has to say so
        text = " ".join(str(error).split()) or "no message"
        status, reason = "error", f"{type(error).__name__}: {text[:500]}"
    return Trial(kind=kind, backend=backend.id, problem=problem, status=status, reason=reason,
                 source_hash=hash_of(backend, problem), **fields)  # fmt: skip


def hash_of(backend: backends.Backend, problem: Problem | None = None) -> str | None:
    """The backend's source hash, or None when even that fails (a plug-in's kernel file that is gone)."""
    try:
        return backend.source_hash(problem)
    except Exception:
        return None


def device_of(backend: backends.Backend) -> str:
    """Where a backend is checked when nobody says: its own device, or the GPU for one that runs anywhere."""
    if backend.device == "any":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return backend.device


def on_host(backend: backends.Backend) -> bool:
    """Whether a check of a backend leaves the GPU alone (`cluster.Task.host`)."""
    return device_of(backend) == "cpu"


@ambient.judging
def check_attention(
    backend: str | backends.Backend,
    problem: Problem,
    *,
    seed: int = 0,
    pattern: str = "normal",
    layout: str = "bhsd",
    device: str | None = None,
    lengths: str = "mixed",
) -> Trial:
    """Judge every element of a backend's `out` and `lse` against float64.

    The backend's outputs start out full of NaN, so an element it never writes fails. The reference runs on the same
    device, in float64.

    Parameters
    ----------
    backend
        An id or a `Backend`.
    seed, pattern, layout
        Of the inputs (`make_inputs`).
    device
        None for the backend's own.
    lengths
        How long sequences are, where they have lengths (`lengths_of`). A ragged batch has rows behind its last sequence
        under ``mixed``, except for a peer, which may leave anything there.

    Returns
    -------
    Trial
        Kind `correctness`; status `ok`, `failed` (measured and wrong: `reason` has the first bad element), `error`
        (it raised, or the inputs hold NaN), `unsupported` or `unavailable`. Raises only for an unknown id.
    """
    chosen = backends.get(backend) if isinstance(backend, str) else backend
    data = {"seed": seed, "pattern": pattern, "layout": layout, "role": chosen.role}
    if problem.lengths:
        data["lengths"] = lengths
    spare = 0 if problem.lengths == "ragged" and (chosen.role == "peer" or lengths != "mixed") else None
    tanh_error = chosen.tanh_error if problem.softcap is not None else TANH_ERROR  # one case for all where none is

    def measure() -> Trial:
        place = device or device_of(chosen)
        # The mode says nothing of what is expected, so it shares the case of the problem without it.
        asked = problem.with_(batch_invariant=False) if problem.batch_invariant else problem
        case = make_case(
            asked, seed, pattern, layout, place, chosen.rounds_scores, tanh_error, lengths=lengths, spare=spare
        )
        common = dict(kind="correctness", backend=chosen.id, problem=problem, source_hash=chosen.source_hash(problem))
        if case.bad_inputs:
            return Trial(status="error", reason=case.bad_inputs, data=data, **common)
        masks = None if case.masks is None else masking.changed(case.masks, _room_like)
        given = _given(case, masks)
        with instruments.watched(chosen.id), poisoned_outputs():
            results = chosen.run(*given, problem, **backends.with_masks(masks))
            wrong = wrong_form(results, problem, case.q.device, case.out.shape)
            # A copy before anything else runs: what is written later, or elsewhere, is not in it.
            out, lse = (None, None) if wrong else (None if t is None else t.clone() for t in results)
        if not wrong and (names := changed_inputs(given, _inputs(case), masks, case.masks)):
            wrong = f"it changed its inputs ({names}), which belong to whoever calls it"
        if wrong:
            return Trial(status="failed", reason=wrong, data=data, **common)
        found = compare(out, case.out, atol=case.out_atol, rtol=case.out_rtol)
        found_lse = None if lse is None else compare(lse, case.lse, atol=case.lse_atol, rtol=case.lse_rtol)
        correctness = correctness_of(found, found_lse)
        reason = None
        if not correctness.passed:
            tensor, comparison = ("out", found) if not found.passed else ("lse", found_lse)
            reason = f"{tensor}: {comparison.sentence()}"
        more = {"returns_lse": lse is not None, "rtol": case.out_rtol}
        if not correctness.passed:
            more["worst"] = found.worst
        return Trial(status="ok" if correctness.passed else "failed", reason=reason, correctness=correctness,
                     data=data | more, **common)  # fmt: skip

    return guarded("correctness", chosen, problem, measure, data=data)


OFFSET_BYTES = 256
"""What memory blocks of CUDA are aligned to: no kernel reads slower from here."""
DELAY_CYCLES = 2_000_000
"""Of a GPU's clock, about a millisecond: so long do inputs arrive after a call was made."""


def _given(case: Case, masks: MaskTensors | None = None) -> tuple[torch.Tensor, ...]:
    """The inputs of a check as tensors of the backend's own, with the strides of the case; `masks` are filled alike.

    So nothing that it writes into them reaches the reference, or the backend that is checked next. They begin inside a
    block of memory, and not where those of a timing do, so being right at one address is not enough. On a GPU they are
    filled on the current stream after a delay: work on a stream that does not wait for that one reads NaN, and lengths
    of 0.
    """
    given = tuple(map(_room_like, _inputs(case)))
    pairs = list(zip(given, _inputs(case), strict=True))
    if masks is not None:
        pairs += [(tensor, getattr(case.masks, name)) for name, tensor in masks.named()]
    if case.q.device.type == "cuda":
        for tensor, _ in pairs:
            _once(tensor).fill_(float("nan") if tensor.is_floating_point() else 0)
        torch.cuda.synchronize()
        torch.cuda._sleep(DELAY_CYCLES)
    for tensor, values in pairs:
        _once(tensor).copy_(_once(values))
    return given


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with one entry along each expanded dimension: an expanded tensor cannot be written to."""
    return tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]


def _room_like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory for a tensor of these strides, `OFFSET_BYTES` into a block of its own."""
    offset = OFFSET_BYTES // tensor.element_size()
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.new_empty(offset + span).as_strided(tensor.shape, tensor.stride(), offset)


def _inputs(case: Case) -> tuple[torch.Tensor, ...]:
    return case.q, case.k, case.v


def wrong_form(results, problem: Problem, device: torch.device, shape: tuple[int, ...] | None = None) -> str | None:
    """What is wrong with the kind, shape, dtype or device of what a backend returned, as a clause; None for nothing.

    `shape` is that of `out`, where the problem does not say it: of a ragged batch.

    Plain tensors alone count: one of a class of its own may answer as it likes when it is compared.
    """
    if not isinstance(results, tuple | list) or len(results) != 2:
        return f"it returned {type(results).__name__}; expected out and lse"
    shape = tuple(shape or (problem.batch, problem.num_heads_q, problem.seqlen_q, problem.head_dim))
    wanted = (("out", shape, getattr(torch, problem.dtype)), ("lse", shape[:-1], torch.float32))
    for tensor, (name, shape, dtype) in zip(results, wanted, strict=True):
        if tensor is None and name == "lse":
            continue
        if type(tensor) is not torch.Tensor:
            return (
                f"{name} is no plain tensor but of class {type(tensor).__name__}, whose word for itself proves nothing"
            )
        if (tuple(tensor.shape), tensor.dtype, tensor.device) != (shape, dtype, device):
            return (
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
                f"expected {dtype} {shape} on {device}"
            )
    return None


def changed_inputs(
    now: Sequence[torch.Tensor], before: Sequence[torch.Tensor], masks: MaskTensors | None = None,
    masks_before: MaskTensors | None = None,
) -> str:  # fmt: skip
    """Which of Q, K, V and the mask tensors are not what they were, by name; empty when all are. NaN equals NaN."""
    pairs = list(zip("qkv", now, before, strict=True))
    if masks is not None:
        pairs += [(name, tensor, getattr(masks_before, name)) for name, tensor in masks.named()]
    return ", ".join(name for name, a, b in pairs if not (torch.equal(a, b) or bool(_alike(a, b).all())))


def _alike(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def correctness_of(found: Comparison, found_lse: Comparison | None) -> Correctness:
    """What a record says of `out`, and of `lse` where it was returned."""
    parts = [found] if found_lse is None else [found, found_lse]
    first = None
    if found.first_bad:
        first = {"tensor": "out", **found.first_bad}
    elif found_lse and found_lse.first_bad:
        first = {"tensor": "lse", **found_lse.first_bad}
    return Correctness(
        passed=all(part.passed for part in parts),
        checked=sum(part.checked for part in parts),
        num_bad=sum(part.num_bad for part in parts),
        num_nan=sum(part.num_nan for part in parts),
        num_inf=sum(part.num_inf for part in parts),
        max_abs_error=digits(found.max_abs_error, 9),
        bound=digits(found.bound, 9),
        lse_max_abs_error=None if found_lse is None else digits(found_lse.max_abs_error, 9),
        lse_bound=None if found_lse is None else digits(found_lse.bound, 9),
        first_bad=first,
    )


def check_problems(profile: str = "quick", *, gpu: bool | None = None) -> list[Problem]:
    """The small matrix of problems that a report checks each backend on: tails, one row, unequal lengths, empty rows.

    The test suite's matrix is larger; this one has each kind of shape once, and grows with ``profile="full"``. Three of
    them are a decode step, which is all that a backend for a few query tokens takes: one token, several, and more than
    there are keys; pages of the usual size, of the smallest and of the largest. The last four have scales that are not
    the usual one, a decode step and a longer one each: below zero, and so large that scores run to some hundreds.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    shapes = [
        square(1, 2, 256, 64),
        square(1, 2, 256, 128, causal=True),
        square(1, 2, 256, 64, dtype="bfloat16", causal=True),
        Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=129, seqlen_k=257, head_dim=64, causal=True),
        Problem(batch=1, num_heads_q=2, num_heads_kv=1, seqlen_q=1, seqlen_k=333, head_dim=128),
        Problem(batch=1, num_heads_q=2, num_heads_kv=2, seqlen_q=192, seqlen_k=64, head_dim=64, causal=True),
        Problem(batch=2, num_heads_q=8, num_heads_kv=2, seqlen_q=1, seqlen_k=1000, head_dim=128, page_size=64),
        Problem(
            batch=2, num_heads_q=9, num_heads_kv=1, seqlen_q=8, seqlen_k=300, head_dim=64, dtype="bfloat16",
            causal=True, page_size=16,
        ),
        Problem(
            batch=3, num_heads_q=6, num_heads_kv=2, seqlen_q=7, seqlen_k=5, head_dim=64, causal=True, page_size=256,
        ),
        Problem(
            batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=100, seqlen_k=200, head_dim=64, causal=True,
            softmax_scale=-0.125,
        ),
        Problem(
            batch=1, num_heads_q=2, num_heads_kv=2, seqlen_q=130, seqlen_k=300, head_dim=128, dtype="bfloat16",
            softmax_scale=4.0,
        ),
        Problem(
            batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=3, seqlen_k=333, head_dim=128, causal=True, page_size=32,
            softmax_scale=-0.5,
        ),
        Problem(batch=1, num_heads_q=8, num_heads_kv=2, seqlen_q=2, seqlen_k=700, head_dim=64, softmax_scale=8.0),
    ]  # fmt: skip
    if profile == "full":
        length = 2048 if gpu else 512
        for dtype in ("float16", "bfloat16"):
            for head_dim in (64, 128):
                for causal in (False, True):
                    even = square(2, 8 if gpu else 2, length, head_dim, dtype=dtype, causal=causal)
                    odd = {"seqlen_q": length // 2 - 1, "seqlen_k": length - 3}
                    shapes += [even, even.with_(batch=1, num_heads_q=8, num_heads_kv=2, **odd)]
    return shapes


def masked_problems(profile: str = "quick", *, gpu: bool | None = None) -> list[Problem]:
    """The matrix of problems with masks: windows, softcaps, sinks and lengths, alone and together.

    Among them are windows that reach across one page and across several, that hide every key of some rows, and that end
    on a page's edge; a decode step; sequences without keys, without queries, with one of either, and whole ones
    (`flashcore.numerics.inputs.make_masks`). ``profile="full"`` has each in both dtypes and head_dims, and lengths that
    fill a GPU.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    plain = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=150, seqlen_k=300, head_dim=64)
    six = plain.with_(batch=6)
    shapes = [
        plain.with_(causal=True, window_left=40),
        plain.with_(window_left=127, window_right=128, head_dim=128, dtype="bfloat16"),
        plain.with_(seqlen_q=300, seqlen_k=150, causal=True, window_left=5, head_dim=128),
        plain.with_(softcap=30.0, causal=True),
        plain.with_(sink=True, head_dim=128),
        plain.with_(seqlen_q=1, window_left=100, softcap=5.0, sink=True, page_size=64),
        six.with_(lengths="right", dtype="bfloat16"),
        six.with_(lengths="left", causal=True, sink=True),
        six.with_(lengths="ragged", causal=True, head_dim=128),
        six.with_(
            lengths="ragged", causal=True, window_left=64, softcap=30.0, sink=True, dtype="bfloat16", head_dim=128
        ),
    ]
    if profile == "full":
        length = 2048 if gpu else 256
        even = square(6, 8 if gpu else 2, length, 64)
        odd = even.with_(num_heads_q=8, num_heads_kv=2, seqlen_q=length // 2 - 1, seqlen_k=length - 3)
        for dtype in ("float16", "bfloat16"):
            for head_dim in (64, 128):
                kind = {"dtype": dtype, "head_dim": head_dim}
                shapes += [
                    even.with_(**kind, batch=1, causal=True, window_left=length // 8),
                    odd.with_(**kind, batch=1, window_left=length // 4, window_right=31, sink=True),
                    even.with_(**kind, batch=1, softcap=15.0),
                    odd.with_(**kind, lengths="right", causal=True, softcap=50.0),
                    odd.with_(**kind, lengths="left", window_left=100),
                    even.with_(**kind, lengths="ragged", causal=True, sink=True),
                    odd.with_(**kind, lengths="ragged", window_left=33, window_right=length // 8),
                ]
    return shapes


def invariant_problems(profile: str = "quick", *, gpu: bool | None = None) -> list[Problem]:
    """The matrix of problems that ask for bits that are the same in every batch (`Problem.batch_invariant`).

    Sequences of several chunks are among them (2,048 keys each in our kernels), with masks and without.
    ``profile="full"`` has each in both dtypes and head_dims, and lengths that fill a GPU.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    plain = Problem(
        batch=2,
        num_heads_q=4,
        num_heads_kv=2,
        seqlen_q=150,
        seqlen_k=300,
        head_dim=64,
        causal=True,
        batch_invariant=True,
    )
    long = plain.with_(batch=1, seqlen_q=70, seqlen_k=4200, head_dim=128, dtype="bfloat16")
    shapes = [plain, long, plain.with_(seqlen_q=1, seqlen_k=2300, page_size=64)]
    if profile == "full":
        many = {"num_heads_q": 32, "num_heads_kv": 4, "seqlen_q": 700, "seqlen_k": 6300} if gpu else {}
        for dtype in ("float16", "bfloat16"):
            for head_dim in (64, 128):
                kind = {"dtype": dtype, "head_dim": head_dim}
                shapes += [
                    long.with_(**kind, **many),
                    long.with_(**kind, causal=False),
                    long.with_(**kind, seqlen_q=3, page_size=16),
                    long.with_(**kind, window_left=2100, sink=True),
                    plain.with_(**kind, softcap=20.0, lengths="ragged", batch=5),
                ]
    return shapes


CPU_FLOPS = 5e9
"""The largest problem that is checked without a GPU: its float64 reference takes about a second on two cores."""


def named_problems(names: str, profile: str, *, gpu: bool | None = None) -> tuple[list[Problem], list[Problem]]:
    """The three matrices of problems, and what a `;`-separated list of presets and labels names.

    Returns
    -------
    problems, left_out
        What to check, and those named that are too large for a machine without a GPU.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    named = [] if names.strip() == "default" else [parse_problem(n) for n in names.split(";") if n.strip()]
    left_out = [problem for problem in named if not gpu and problem.flops() > CPU_FLOPS]
    problems = [*check_problems(profile, gpu=gpu), *masked_problems(profile, gpu=gpu)]
    problems += invariant_problems(profile, gpu=gpu)
    return problems + [p for p in named if p not in left_out and p not in problems], left_out


def pairs(problems: list[Problem], chosen: list[backends.Backend]) -> list[tuple[Problem, backends.Backend]]:
    """What to check, problem by problem; a variant of another backend on every sixth, as its code is that one's.

    A problem of the masked matrix is for the backends that take its masks, and with lengths for ours alone: some of its
    sequences are empty, of which peers promise nothing, and each is checked where it is timed. One of the
    batch-invariant matrix is for the backends that promise that. One that somebody named is for all: a backend that
    does not take it says so in its record.
    """
    matrices = [matrix("full", gpu=gpu) for matrix in (masked_problems, invariant_problems) for gpu in (False, True)]
    optional = {problem for matrix in matrices for problem in matrix}
    return [
        (problem, one)
        for number, problem in enumerate(problems)
        for one in chosen
        if (one.variant_of is None or number % 6 == 0) and (problem not in optional or _is_for(problem, one))
    ]


def _is_for(problem: Problem, one: backends.Backend) -> bool:
    """Whether a problem with masks, or in the batch-invariant mode, is for a backend that nobody named it for."""
    if problem.lengths and one.role == "peer":
        return False
    if problem.batch_invariant:  # on the CPU such problems are computed number by number
        if not one.batch_invariant or (one.device != "cuda" and problem.flops() > CPU_FLOPS):
            return False
    return set(problem.masks) <= set(one.masks)


FOREIGN_LIMIT_S = 90.0
"""Seconds that one check of somebody else's package may take, where a process of its own can end it."""


def tasks(wanted: Sequence[tuple[Problem, backends.Backend]], *, seed: int = 0, pattern: str = "normal") -> list[Task]:
    """The checks of `pairs` as tasks for `cluster.perform`: one a problem and device, since its reference is shared.

    A package of somebody else's (`Backend.foreign`) has a task of its own, so that its crash costs no other check.
    """
    found = []
    for problem, group in groupby(wanted, key=lambda pair: pair[0]):
        chosen = [one for _, one in group]
        foreign = [[one] for one in chosen if one.foreign]
        rest = [one for one in chosen if not one.foreign]
        at_home = [[one for one in rest if on_host(one)], [one for one in rest if not on_host(one)]]
        for some in filter(None, [*at_home, *foreign]):
            own, host = some[0].foreign, on_host(some[0])
            owed = tuple(owed_check(one, problem, seed=seed, pattern=pattern) for one in some)
            name = (
                f"check {some[0].id} on {problem.label()}" if own else f"check {problem.label()}{' on the CPU' * host}"
            )
            cost_s = max(1.0, problem.flops() / CPU_FLOPS)  # a backend on the CPU takes most of the time
            more = {"limit_s": FOREIGN_LIMIT_S, "cost_s": 5.0} if own else {"cost_s": cost_s}
            found.append(Task(name, _checks, (problem, some, seed, pattern), owed=owed, host=host, **more))
    return found


def owed_check(backend: backends.Backend, problem: Problem, **data: Any) -> dict[str, Any]:
    """Fields of the record of a check that never came."""
    return {"kind": "correctness", "backend": backend.id, "problem": problem, "source_hash": hash_of(backend, problem),
            "data": {"role": backend.role, **data}}  # fmt: skip


def _checks(problem: Problem, chosen: Sequence[backends.Backend], seed: int, pattern: str) -> Iterator[Trial]:
    for one in chosen:
        yield check_attention(one, problem, seed=seed, pattern=pattern)


instruments.trust(sys.modules[__name__], ("compare", "expected", "wrong_form", "changed_inputs"))
