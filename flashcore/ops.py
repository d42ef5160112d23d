"""Attention as a user calls it: tensors in, one clear error for each kind of bad input, the fastest right backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch

from flashcore import backends
from flashcore.backends.others.standing_in import StandIn
from flashcore.errors import FlashCoreError, InvalidProblem, UnknownName, Unsupported
from flashcore.library import dense, masked
from flashcore.library.dense import DTYPES
from flashcore.numerics import masking, plain, transforms
from flashcore.numerics.masking import MaskTensors
from flashcore.paging.checks import can_read_back, debugging
from flashcore.problem import Problem

AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("hopper", "fa3", "sdpa-cudnn", "sdpa-flash", "wmma", "scalar", "sdpa-math", "reference"),
    "cpu": ("sdpa-math", "cpu", "reference"),
}
"""What ``backend="auto"`` tries, fastest first; ids that this installation lacks are passed over.

Order on an H200: our Hopper kernel, then what takes a head_dim that it does not: FlashAttention-3 where somebody
installed it, cuDNN and FlashAttention-2 through torch (all beat a kernel on the WMMA API), then ours that take what
those refuse. `sdpa-math` stores all scores; on a CPU it is torch's own path and quicker than our page loop, which is
there for ``return_lse``.
"""
WITHOUT_LSE = frozenset({"sdpa-math", "sdpa-cudnn"})
"""Backends that return no `lse`, which gradients start from as well."""
NO_LSE = "it does not return lse; choose another backend, or leave return_lse out"
"""Why such a call is refused, as a clause."""
AUTO_DTYPES = {"fa3": ("bfloat16",)}
"""Dtypes for which `auto` tries a backend, where not all: a widespread wheel of FlashAttention-3 lacks float16."""

STAND_IN = StandIn()
"""What `auto` takes where a problem has masks and none of the above has a kernel for them."""
LAST_WITH_MASKS = {"cuda": ("fa3", "sdpa-math", "reference"), "cpu": ("reference",)}
"""What the stand-in comes before: it has FlashAttention where these store all scores, and keeps the promises about rows
without a key or a sequence, which a backend of somebody else's does not."""

KEPT_CALLS = 4096
Call = tuple[Problem, backends.Backend, tuple[int, ...]]
"""What was found of a call that was checked: its problem, what runs it, and the strides of `out`."""
_calls: dict[tuple, Call] = {}
"""Calls that were checked. Keys hold plain values, and no tensor."""

_dispatch_modes = torch._C._len_torch_dispatch_stack
"""How many of torch's dispatch modes are active, such as that of fake tensors; nearly always none."""
_is_compiling = torch.compiler.is_compiling
_current_gpu = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
"""The current GPU, once CUDA is in use: a quarter of the time of ``torch.cuda.current_device``."""
_process, _ASKED = plain.process, plain.BATCH_INVARIANT
_Tensor = torch.Tensor
_PLAIN = torch.Tensor.__torch_dispatch__
"""What a kind of tensor has that does not take part in dispatch; fake and distributed tensors have their own."""


@functools.lru_cache(maxsize=4096)
def _problem(q_shape, k_shape, v_shape, q_dtype, k_dtype, v_dtype, causal, softmax_scale, batch_invariant) -> Problem:
    """The Problem of three shapes and dtypes. Cached: building a checked Problem takes longer than a launch."""
    dense.check_shapes(q_shape, k_shape, v_shape, q_dtype, k_dtype, v_dtype)
    return Problem(
        batch=q_shape[0], num_heads_q=q_shape[1], num_heads_kv=k_shape[1], seqlen_q=q_shape[2], seqlen_k=k_shape[2],
        head_dim=q_shape[3], dtype=DTYPES[q_dtype], causal=causal, softmax_scale=softmax_scale,
        batch_invariant=batch_invariant,
    )  # fmt: skip


def _requires_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    # Written out, since it is asked at every call.
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def problem_of(
    q, k, v, causal: bool = False, softmax_scale: float | None = None, batch_invariant: bool = False
) -> Problem:
    """Check three tensors and say what attention problem they are.

    Parameters
    ----------
    q, k, v
        ``[B, Hq, Sq, D]``, and ``[B, Hkv, Sk, D]`` twice, as in `attention`.

    Raises
    ------
    InvalidProblem
        Not tensors, or sparse ones; on different devices; different or unsupported dtypes; not 4-D; an empty size;
        shapes that do not fit together; a last dimension that is not contiguous; a `causal` that is no bool; a scale
        that is no finite number.
    """
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        kinds = ", ".join(f"{type(t).__module__}.{type(t).__name__}" for t in (q, k, v))
        raise InvalidProblem(f"q, k and v have to be torch tensors, or CuPy arrays all three; got {kinds}.")
    if not (q.device == k.device == v.device):
        raise InvalidProblem(f"q, k and v lie on {q.device}, {k.device} and {v.device}; move them to one device.")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise InvalidProblem(f"{name} is a sparse or nested tensor; pass a dense one, such as {name}.to_dense().")
    causal, scale = plain.flag("causal", causal), plain.softmax_scale(softmax_scale)
    problem = _problem(q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, causal, scale, batch_invariant)
    dense.check_rows(q, k, v)
    return problem


def first_of(
    names: Iterable[str], device: torch.device, takes: Callable[[backends.Backend], bool]
) -> backends.Backend | None:
    """The first that works on this device and takes what is asked; ids that are not installed are passed over."""
    for name in names:
        try:
            backend = backends.get(name)
        except UnknownName:
            continue
        if backend.device in (device.type, "any") and backend.availability().ok and takes(backend):
            return backend
    return None


def nobody_promises(problem: Problem, device: torch.device, why_not: Callable[[backends.Backend], str | None]) -> str:
    """Why no backend keeps the bits of this problem in every batch here, as a clause: with what each says that can."""
    said = []
    for backend in backends.all_backends():
        if backend.batch_invariant and backend.device in (device.type, "any"):
            state = backend.availability()
            reason = why_not(backend) if state.ok else state.reason
            said += [f"{backend.id}: {reason}"] if reason else []
    why = f" ({'; '.join(said)})" if said else ""
    return f"no backend on '{device}' promises bits that are the same in every batch for {problem.label()}{why}"


def refuse_others(name: str, who: str, why: str) -> None:
    """Raise `Unsupported` where the process asks for batch-invariant bits, and somebody else would compute a call.

    Parameters
    ----------
    name
        Of the function that was called.
    who, why
        Who would compute it, and why not we: a noun and a clause.
    """
    if plain.batch_invariant():
        asked = f"{_ASKED.decode()}=1 asks for bits that are the same in every batch"
        raise Unsupported(name, f"{asked}, and {who} would compute this call without that promise, since {why}")


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, device: torch.device, name: str, return_lse: bool) -> backends.Backend:
    """The backend that runs this problem on this device. Cached, so that a call costs no look-up of the registry."""
    if device.type not in AUTO_ORDER:
        raise InvalidProblem(f"The tensors lie on '{device}'; FlashCore takes CPU and CUDA tensors.")
    if name == "auto":
        able = [one for one in AUTO_ORDER[device.type] if not (return_lse and one in WITHOUT_LSE)]
        able = [one for one in able if problem.dtype in AUTO_DTYPES.get(one, (problem.dtype,))]
        if problem.masks:
            able = [one for one in able if one not in LAST_WITH_MASKS[device.type]]
        first = first_of(able, device, lambda backend: backend.why_not(problem) is None)
        if first is None and problem.batch_invariant:
            raise Unsupported("auto", nobody_promises(problem, device, lambda backend: backend.why_not(problem)))
        if first is None and problem.masks:
            return STAND_IN
        if first is None:
            raise Unsupported("auto", f"no backend on '{device}' takes {problem.label()}")
        return first
    backend = backends.get(name)
    if backend.device not in (device.type, "any"):
        raise InvalidProblem(
            f"Backend '{name}' takes {backend.device} tensors, and these lie on '{device}'; "
            f"move them with .to('{backend.device}'), or choose another backend."
        )
    backend.require(problem)
    if return_lse and name in WITHOUT_LSE:
        raise Unsupported(name, NO_LSE)
    return backend


def picked_for(dtype: torch.dtype, head_dim: int, device: torch.device) -> backends.Backend:
    """What ``backend="auto"`` picks for an ordinary problem of this dtype and head_dim; whatever the lengths are.

    As everything here that is asked about no call in particular, it heeds FLASHCORE_BATCH_INVARIANT.
    """
    problem = Problem(
        batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=128, seqlen_k=128, head_dim=head_dim, dtype=DTYPES[dtype],
        batch_invariant=plain.batch_invariant(),
    )  # fmt: skip
    return choose(problem, device, "auto", False)


def attention(
    q,
    k,
    v,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    seqlens_q: torch.Tensor | None = None,
    seqlens_k: torch.Tensor | None = None,
    padding: str = "right",
    batch_invariant: bool | None = None,
):
    """``softmax(softmax_scale * q k^T + mask) v``.

    Parameters
    ----------
    q
        ``[batch, num_heads_q, seqlen_q, head_dim]``: torch tensor on the CPU or a GPU, or CuPy array (taken, and its
        like returned, without a copy). Any strides with the last dimension contiguous: a transposed ``[B, S, H, D]``
        costs nothing.
    k, v
        ``[batch, num_heads_kv, seqlen_k, head_dim]`` of the same kind, device and dtype (float16, bfloat16, float32);
        num_heads_q has to be a multiple of num_heads_kv.
    causal
        Query i sees keys ``j <= i + seqlen_k - seqlen_q`` (bottom-right aligned).
    softmax_scale
        Multiplies ``q k^T``: any number that is finite in float32, also negative; None for ``1/sqrt(head_dim)``. A CPU
        tensor of no dimensions is read as the number that it holds.
    backend
        An id that ``flashcore.backends`` knows, or ``auto``: the fastest that is right for this device and problem.
    return_lse
        Return ``(out, lse)``.
    window_left, window_right
        Query i stands at position ``i + seqlen_k - seqlen_q`` and sees keys from ``position - window_left`` to
        ``position + window_right``; -1 for no limit. With `causal` the right side is 0.
    softcap
        Above 0: a score s becomes ``softcap * tanh(s / softcap)``, before any mask.
    sink
        Float tensor ``[num_heads_q]``: the score, which no scale multiplies, of one more key of each head, whose value
        is 0. `lse` counts it.
    seqlens_q, seqlens_k
        int32 tensors ``[batch]`` on the device of `q`: real rows of each sequence, None where all are. Both masks above
        and `causal` are aligned bottom right in each sequence, as if it came alone. What lies in padding may be
        anything, NaN too. Lengths are never read back from a GPU; FLASHCORE_DEBUG=1 asks for a check.
    padding
        Where the rows lie that are not real: ``right`` of the real ones, or ``left``; the same for all sequences.
    batch_invariant
        True: the bits of a row depend on its own query, its keys, its mask and these options alone; not on the batch,
        on the other rows of the call, or on how long they are (docs/batch-invariance.md). Forward only. A call that no
        backend promises this for is refused. None: what the variable FLASHCORE_BATCH_INVARIANT says when the call is
        made, or traced: 1 for True, 0 or nothing for False.

    What is set around the call, such as autocast, changes nothing of its result. Under `torch.compile` and
    `torch.export` the call is one op, ``torch.ops.flashcore.attention`` (with masks ``masked_attention``), and
    `torch.vmap` folds the mapped axis into the batch. Gradients flow back through `out` and `lse`, to `q`, `k`, `v` and
    `sink`, whatever the masks (`flashcore.library.gradients`); first derivatives only, and by `torch.autograd`, not by
    torch.func or forward mode. With masks that no kernel of ours takes, `auto` calls FlashAttention where it is
    installed, then torch's own, and last torch's operations in float32.

    Returns
    -------
    out : ``[batch, num_heads_q, seqlen_q, head_dim]``
        In the dtype of `q`, with the strides of ``torch.empty_like(q)``; 0 in rows that see no key or are not real.
    lse : float32 ``[batch, num_heads_q, seqlen_q]``, with `return_lse`
        Natural logarithm of the softmax denominator, -inf in rows that are not real or see no key and no sink.

    Raises
    ------
    InvalidProblem
        The tensors do not fit (see `problem_of`), or lie where the backend does not take them; an option is of the
        wrong type, or makes no sense; a length is beyond the tensors (on a GPU with FLASHCORE_DEBUG=1 only); a
        derivative is asked for that there is none of.
    UnknownName
        No backend has this id.
    Unsupported, BackendUnavailable
        The backend named does not take this problem, or does not work on this machine; or no backend promises
        `batch_invariant` for it.
    """
    if (
        window_left != -1 or window_right != -1 or softcap is not None or sink is not None or seqlens_q is not None
        or seqlens_k is not None or padding != "right"
    ):  # fmt: skip
        return _with_masks(
            q, k, v, causal, softmax_scale, backend, return_lse, window_left, window_right, softcap, sink, seqlens_q,
            seqlens_k, padding, batch_invariant,
        )  # fmt: skip
    if _is_compiling():
        transforms.refuse_traced_derivatives("q, k or v")
        return _as_op(q, k, v, causal, softmax_scale, backend, return_lse, batch_invariant)
    # By value: under its own name a tensor would be looked up by what it is, and kept alive by having been asked for.
    if causal is not True and causal is not False:
        causal = plain.flag("causal", causal)
    if return_lse is not True and return_lse is not False:
        return_lse = plain.flag("return_lse", return_lse)
    if softmax_scale is not None and type(softmax_scale) is not float:
        softmax_scale = plain.softmax_scale(softmax_scale)
    if type(backend) is not str:
        backend = plain.word("backend", backend)
    if batch_invariant is None:
        batch_invariant = _ASKED in _process and plain.batch_invariant()
    elif batch_invariant is not True and batch_invariant is not False:
        batch_invariant = plain.batch_invariant(batch_invariant)
    if (
        type(q) is not _Tensor or type(k) is not _Tensor or type(v) is not _Tensor
        or _dispatch_modes() or transforms.under_way() or _requires_gradients(q, k, v)
    ):  # fmt: skip
        if is_cupy(q) and is_cupy(k) and is_cupy(v):
            return _of_arrays(q, k, v, causal, softmax_scale, backend, return_lse, batch_invariant)
        if wants_dispatch(q, k, v):
            return _as_op(q, k, v, causal, softmax_scale, backend, return_lse, batch_invariant)
    out, lse = _compute(q, k, v, causal, softmax_scale, return_lse, backend, batch_invariant)
    return (out, lse) if return_lse else out


def _compute(q, k, v, causal: bool, softmax_scale: float | None, return_lse: bool, backend: str, batch_invariant: bool):
    """`attention` of tensors that lie in memory, with arguments that are plain values."""
    try:
        # Looking the whole call up takes half as long as checking it.
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device,
            k.device, v.device, causal, softmax_scale, backend, return_lse, batch_invariant,
        )  # fmt: skip
        known = _calls.get(key)
    except (AttributeError, TypeError, RuntimeError):  # no tensors, or none with strides: the checks say which
        key = known = None
    if known is None:
        problem = problem_of(q, k, v, causal, softmax_scale, batch_invariant)
        known = keep(_calls, key, (problem, choose(problem, q.device, backend, return_lse), dense.out_strides(q)))
    problem, chosen, strides = known
    out, lse = run(chosen, problem, q, k, v, return_lse)
    return (out if out.stride() == strides else dense.laid_out(out, strides)), lse


def keep(calls: dict[tuple, Call], key: tuple | None, known: Call) -> Call:
    """Remember what was found of a call, unless it has no key; a table that is full begins anew."""
    if key is not None:
        if len(calls) >= KEPT_CALLS:
            calls.clear()
        calls[key] = known
    return known


def run(chosen: backends.Backend, problem: Problem, q, k, v, return_lse: bool, masks: MaskTensors | None = None):
    """`out` and `lse` of a backend for a checked problem, on the GPU where the tensors lie.

    Raises
    ------
    Unsupported
        `lse` is asked for, and the backend returned none.
    """
    if q.is_cuda and q.get_device() != _current_gpu():
        with torch.cuda.device(q.device):
            return run(chosen, problem, q, k, v, return_lse, masks)
    compute = chosen.run_with_lse if return_lse else chosen.run
    out, lse = compute(q, k, v, problem) if masks is None else compute(q, k, v, problem, masks=masks)
    if return_lse and lse is None:
        raise Unsupported(chosen.id, NO_LSE)
    return out, lse


def _compute_op(
    q, k, v, causal=False, softmax_scale=None, return_lse=False, backend="auto", batch_invariant=False
):  # fmt: skip
    """What computes ``torch.ops.flashcore.attention``: the same, and an empty `lse` where none is asked for."""
    out, lse = _compute(q, k, v, causal, softmax_scale, return_lse, backend, batch_invariant)
    return out, lse if return_lse else out.new_empty(0, dtype=torch.float32)


dense.computed_by(_compute_op)


def wants_dispatch(*tensors: torch.Tensor | None, names: str = "q, k or v") -> bool:
    """Whether torch's dispatcher has to see the call: for gradients, a mapped axis, fake tensors and the like."""
    tensors = [tensor for tensor in tensors if tensor is not None]
    if not all(isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_nested for t in tensors):
        return False  # the checks say what is wrong with them
    if transforms.under_way():
        transforms.refuse_derivatives(names, *tensors)
    return (
        _dispatch_modes() > 0
        or any(type(tensor).__torch_dispatch__ is not _PLAIN for tensor in tensors)
        or any(map(transforms.is_mapped, tensors))
        or transforms.want_gradients(*tensors)
    )


def _as_op(q, k, v, causal, softmax_scale, backend, return_lse, batch_invariant):
    """The call through torch's dispatcher. It is traced by torch's compiler, so it has to stay plain."""
    batch_invariant = plain.batch_invariant(batch_invariant)
    if softmax_scale is not None:
        softmax_scale = plain.softmax_scale(softmax_scale)
    with_lse = lse_for_gradients(return_lse, backend, q, k, v)
    out, lse = dense.attention(q, k, v, causal, softmax_scale, with_lse, backend, batch_invariant)
    return (out, lse) if return_lse else out


# --------------------------------------------------------------------------------------------------------- with masks


def _with_masks(
    q, k, v, causal, softmax_scale, backend, return_lse, window_left, window_right, softcap, sink, seqlens_q,
    seqlens_k, padding, batch_invariant,
):  # fmt: skip
    """`attention` where an option of a mask is not at its default."""
    causal, return_lse = plain.flag("causal", causal), plain.flag("return_lse", return_lse)
    softmax_scale, backend = plain.softmax_scale(softmax_scale), plain.word("backend", backend)
    softcap, batch_invariant = masked.softcap(softcap), plain.batch_invariant(batch_invariant)
    window_left, window_right = masked.window(causal, window_left, window_right)
    padding = masked.side(padding, seqlens_q is not None or seqlens_k is not None)
    options = causal, softmax_scale, window_left, window_right, softcap, padding
    tensors = q, k, v, sink, seqlens_q, seqlens_k
    if _is_compiling():
        transforms.refuse_traced_derivatives(NAMES)
    if _is_compiling() or (not in_memory(*tensors) and wants_dispatch(*tensors, names=NAMES)):
        with_lse = lse_for_gradients(return_lse, backend, q, k, v, sink)
        out, lse = masked.masked_attention(*tensors, *options, with_lse, backend, batch_invariant)
    elif is_cupy(q) and is_cupy(k) and is_cupy(v):
        import cupy

        tensors = (torch.from_dlpack(one) if is_cupy(one) else one for one in tensors)
        out, lse = _compute_masked(*tensors, *options, return_lse, backend, batch_invariant)
        out, lse = cupy.from_dlpack(out), cupy.from_dlpack(lse) if return_lse else None
    else:
        out, lse = _compute_masked(*tensors, *options, return_lse, backend, batch_invariant)
    return (out, lse) if return_lse else out


NAMES = "q, k, v or a tensor of a mask"
"""What a sentence about one of these calls them."""


def in_memory(*tensors: torch.Tensor | None) -> bool:
    """Whether all are plain tensors, nothing stands around the call, and no gradients are wanted; the usual case."""
    if _dispatch_modes() or transforms.under_way():
        return False
    grads = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) is not _Tensor or (grads and tensor.requires_grad)):
            return False
    return True


def lse_for_gradients(return_lse: bool, backend: str, *tensors: torch.Tensor | None) -> bool:
    """Whether the op has to return `lse`: where it is asked for, or gradients are, which start from it."""
    if return_lse or not transforms.want_gradients(*(tensor for tensor in tensors if tensor is not None)):
        return return_lse
    if backend in WITHOUT_LSE:
        raise Unsupported(backend, "gradients are asked for, and start from lse, which it does not return; choose "
                          "another backend, or call it under torch.no_grad()")  # fmt: skip
    return True


@functools.lru_cache(maxsize=4096)
def masked_problem(base: Problem, window_left: int, window_right: int, softcap, sink: bool, lengths: str) -> Problem:
    """The problem with these masks; a window that hides nothing is none, and one that ends here is a causal mask.

    What it hides may be other rows' affair; so a window stays where bits have to be the same in every batch.
    """
    if window_left >= base.seqlen_k - 1 and not base.batch_invariant:
        window_left = -1  # no query stands further right than the last key of its sequence
    if window_right >= base.seqlen_q - 1 and not base.batch_invariant:
        window_right = -1  # nor further left than the keys less the queries
    return base.with_(
        causal=base.causal or window_right == 0, window_left=window_left, window_right=window_right, softcap=softcap,
        sink=sink, lengths=lengths,
    )  # fmt: skip


def _compute_masked(
    q, k, v, sink=None, seqlens_q=None, seqlens_k=None, causal=False, softmax_scale=None, window_left=-1,
    window_right=-1, softcap=None, padding="right", return_lse=False, backend="auto", batch_invariant=False,
):  # fmt: skip
    """`attention` with masks of tensors that lie in memory, with options that are plain values."""
    try:
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device,
            k.device, v.device, causal, softmax_scale, backend, return_lse, window_left, window_right, softcap, padding,
            look(sink), look(seqlens_q), look(seqlens_k), batch_invariant,
        )  # fmt: skip
        known = _calls.get(key)
    except (AttributeError, TypeError, RuntimeError):  # as in `_compute`
        key = known = None
    if known is None:
        base = problem_of(q, k, v, causal, softmax_scale, batch_invariant)
        masked.check_masks(q, sink, seqlens_q, seqlens_k)
        lengths = "" if seqlens_q is None and seqlens_k is None else masked.side(padding, True)
        problem = masked_problem(base, window_left, window_right, softcap, sink is not None, lengths)
        known = keep(_calls, key, (problem, choose(problem, q.device, backend, return_lse), dense.out_strides(q)))
    problem, chosen, strides = known
    out, lse = run_masked(chosen, problem, q, k, v, return_lse, sink, seqlens_q=seqlens_q, seqlens_k=seqlens_k)
    return dense.laid_out(out, strides), lse.contiguous() if return_lse else None


def look(tensor: torch.Tensor | None):
    """What of a mask's tensor decides whether it fits; not its numbers."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def run_masked(
    chosen, problem: Problem, q, k, v, return_lse: bool, sink, *, whole: tuple[int, int] | None = None,
    longest: tuple[int, int] | None = None, **lengths,
):  # fmt: skip
    """`out` and `lse` of a backend for a checked problem with masks.

    Parameters
    ----------
    sink
        Float tensor ``[num_heads_q]``, or None.
    whole
        Tokens of Q and of K with which the last sequence of a ragged batch has to end; None for any.
    longest
        Of a ragged batch: what its caller says that no sequence is longer than.
    lengths
        Further fields of `MaskTensors`. Their numbers are checked where they lie on a CPU; on a GPU, where the host
        would have to wait for them, with FLASHCORE_DEBUG=1 only.
    """
    if sink is not None:
        sink = sink.detach()
        sink = sink if sink.dtype == torch.float32 and sink.is_contiguous() else sink.float().contiguous()
    masks = None
    if problem.sink or problem.lengths:
        masks = MaskTensors(sink, **lengths)
        if not q.is_cuda or debugging():
            check_numbers(masks, problem, *(whole or (q.shape[2], k.shape[2])), whole is not None, longest)
    return run(chosen, problem, q, k, v, return_lse, masks)


def check_numbers(
    masks: MaskTensors, problem: Problem, rows: int, keys: int, whole: bool = False,
    longest: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """Raise `InvalidProblem` where lengths are beyond the tensors, or where sequences begin falls or ends elsewhere.

    While a CUDA graph is captured nothing can be read back; then the graph itself asserts it, at each replay.
    """
    named = {name: tensor for name, tensor in masks.named() if name != "sink"}
    sizes = {"q": (rows, problem.seqlen_q), "k": (keys, problem.seqlen_k)}
    if can_read_back(next(iter(masks.named()))[1].device):
        masking.check_values(masks, problem, rows, keys, longest)
        for name, tensor in named.items():
            size, _ = sizes[name[-1]]
            if whole and int(tensor[-1]) != size:
                raise InvalidProblem(
                    f"{name} ends with {int(tensor[-1])}, and {name[-1]} has {size} rows; they have to be the same."
                )
        return
    for name, tensor in named.items():
        size, longest = sizes[name[-1]]
        if name.startswith("cu_"):
            each = tensor.diff()
            ends = tensor[-1] == size if whole else tensor[-1] <= size
            good = ((each >= 0) & (each <= longest)).all() & (tensor[0] == 0) & ends
            words = f"begins with 0, never falls, ends with {size}, and has no sequence of more than {longest} rows"
        else:
            good, words = ((tensor >= 0) & (tensor <= size)).all(), f"holds lengths from 0 to {size}"
        torch._assert_async(good, f"FlashCore requires that {name} {words}.")


def _compute_masked_op(
    q, k, v, sink=None, seqlens_q=None, seqlens_k=None, causal=False, softmax_scale=None, window_left=-1,
    window_right=-1, softcap=None, padding="right", return_lse=False, backend="auto", batch_invariant=False,
):  # fmt: skip
    """What computes ``torch.ops.flashcore.masked_attention``; its options may come from anybody."""
    window_left, window_right = masked.window(causal, window_left, window_right)
    padding = masked.side(padding, seqlens_q is not None or seqlens_k is not None)
    out, lse = _compute_masked(
        q, k, v, sink, seqlens_q, seqlens_k, causal, softmax_scale, window_left, window_right, masked.softcap(softcap),
        padding, return_lse, backend, batch_invariant,
    )  # fmt: skip
    return out, lse if return_lse else out.new_empty(0, dtype=torch.float32)


masked.computed_by(masked.masked_attention, _compute_masked_op)


@plain.constant_when_traced
def kernel_takes(
    kind: str, index: int, dtype: torch.dtype, head_dim: int, masks: tuple[str, ...] = (), backend: str = "auto"
) -> bool:
    """Whether a kernel of ours, or the backend that is named, takes calls with these masks, whatever their sizes are.

    Parameters
    ----------
    kind, index
        Of the device.
    masks
        Some of ``window, softcap, sink, lengths, ragged``, as `Problem.masks` has them.
    """
    lengths = "ragged" if "ragged" in masks else "right" if "lengths" in masks else ""
    try:
        problem = Problem(
            batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=128, seqlen_k=128, head_dim=head_dim, dtype=DTYPES[dtype],
            window_left=64 if "window" in masks else -1, softcap=1.0 if "softcap" in masks else None,
            sink="sink" in masks, lengths=lengths, batch_invariant=plain.batch_invariant(),
        )  # fmt: skip
        return choose(problem, torch.device(kind, index), backend, False).role == "ours" or backend != "auto"
    except (FlashCoreError, KeyError):  # another device, a backend that says no, or a dtype that is not ours
        return False


# --------------------------------------------------------------------------------------------------------------- CuPy


def _of_arrays(q, k, v, causal, softmax_scale, backend, return_lse, batch_invariant):
    """The call with CuPy arrays in and out, none of them copied."""
    import cupy

    tensors = [torch.from_dlpack(array) for array in (q, k, v)]
    out, lse = _compute(*tensors, causal, softmax_scale, return_lse, backend, batch_invariant)
    return (cupy.from_dlpack(out), cupy.from_dlpack(lse)) if return_lse else cupy.from_dlpack(out)


def is_cupy(array) -> bool:
    """Whether it is a CuPy array, told without importing CuPy."""
    return type(array).__module__.partition(".")[0] == "cupy"
