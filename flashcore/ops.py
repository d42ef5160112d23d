"""Attention as a user calls it: tensors in, one clear error for each kind of bad input, the fastest right backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch

from flashcore import backends
from flashcore.errors import InvalidProblem, UnknownName, Unsupported
from flashcore.numerics import plain, transforms
from flashcore.problem import DTYPE_BYTES, Problem

AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("hopper", "sdpa-cudnn", "sdpa-flash", "wmma", "scalar", "sdpa-math", "reference"),
    "cpu": ("sdpa-math", "cpu", "reference"),
}
"""What ``backend="auto"`` tries, fastest first; ids that this installation lacks are passed over.

Order on an H200: our Hopper kernel, then cuDNN and FlashAttention-2 through torch (both beat a kernel on the WMMA API),
then ours that take what those refuse: `lse`, a causal mask with unequal lengths. `sdpa-math` stores all scores; on a
CPU it is torch's own path and quicker than our page loop, which is there for ``return_lse``.
"""
WITHOUT_LSE = frozenset({"sdpa-math", "sdpa-flash", "sdpa-cudnn"})

KEPT_CALLS = 4096
_calls: dict[tuple, tuple[Problem, backends.Backend]] = {}
"""Calls that were checked, with what was found. Keys hold plain values, and no tensor."""

DTYPES = {getattr(torch, name): name for name in DTYPE_BYTES}
"""Names of the dtypes that problems may have."""


@functools.lru_cache(maxsize=4096)
def _problem(q_shape, k_shape, v_shape, q_dtype, k_dtype, v_dtype, causal, softmax_scale) -> Problem:
    """The Problem of three shapes and dtypes. Cached: building a checked Problem takes longer than a launch."""
    for name, shape in (("q", q_shape), ("k", k_shape), ("v", v_shape)):
        if len(shape) != 4:
            raise InvalidProblem(
                f"{name} has {len(shape)} dimensions {tuple(shape)}; it has to be [batch, num_heads, seqlen, head_dim]."
            )
        if 0 in shape:
            raise InvalidProblem(f"{name} is empty, shape {tuple(shape)}; every size must be at least 1.")
    if not q_dtype == k_dtype == v_dtype:
        raise InvalidProblem(f"q, k and v have dtypes {q_dtype}, {k_dtype} and {v_dtype}; convert them to one.")
    if q_dtype not in DTYPES:
        raise InvalidProblem(f"dtype {q_dtype} is not supported; use one of {', '.join(map(str, DTYPES))}.")
    if k_shape != v_shape:
        raise InvalidProblem(f"k {tuple(k_shape)} and v {tuple(v_shape)} differ in shape; they have to be the same.")
    if q_shape[0] != k_shape[0]:
        raise InvalidProblem(f"q has batch {q_shape[0]}, and k and v have {k_shape[0]}; they have to be the same.")
    if q_shape[3] != k_shape[3]:
        raise InvalidProblem(f"q has head_dim {q_shape[3]}, and k and v have {k_shape[3]}; they have to be the same.")
    if q_shape[1] % k_shape[1]:
        raise InvalidProblem(f"num_heads_q ({q_shape[1]}) must be a multiple of num_heads_kv ({k_shape[1]}).")
    return Problem(
        batch=q_shape[0], num_heads_q=q_shape[1], num_heads_kv=k_shape[1], seqlen_q=q_shape[2], seqlen_k=k_shape[2],
        head_dim=q_shape[3], dtype=DTYPES[q_dtype], causal=causal, softmax_scale=softmax_scale,
    )  # fmt: skip


def _requires_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    # Written out, since it is asked at every call.
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def problem_of(q, k, v, causal: bool = False, softmax_scale: float | None = None) -> Problem:
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
        that is no finite number; gradients or tangents wanted, or a `torch.vmap` under way.
    """
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        kinds = ", ".join(f"{type(t).__module__}.{type(t).__name__}" for t in (q, k, v))
        raise InvalidProblem(f"q, k and v have to be torch tensors, or CuPy arrays all three; got {kinds}.")
    if not (q.device == k.device == v.device):
        raise InvalidProblem(f"q, k and v lie on {q.device}, {k.device} and {v.device}; move them to one device.")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise InvalidProblem(f"{name} is a sparse or nested tensor; pass a dense one, such as {name}.to_dense().")
    transforms.refuse("q, k or v", q, k, v)
    causal, scale = plain.flag("causal", causal), plain.softmax_scale(softmax_scale)
    problem = _problem(q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, causal, scale)
    if problem.head_dim > 1:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.stride(3) != 1:
                raise InvalidProblem(
                    f"The last dimension of {name} is not contiguous (stride {tensor.stride(3)}); "
                    f"pass {name}.contiguous(), or a view whose head_dim lies together in memory."
                )
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


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, device: torch.device, name: str, return_lse: bool) -> backends.Backend:
    """The backend that runs this problem on this device. Cached, so that a call costs no look-up of the registry."""
    if device.type not in AUTO_ORDER:
        raise InvalidProblem(f"The tensors lie on '{device}'; FlashCore takes CPU and CUDA tensors.")
    if name == "auto":
        able = [one for one in AUTO_ORDER[device.type] if not (return_lse and one in WITHOUT_LSE)]
        first = first_of(able, device, lambda backend: backend.why_not(problem) is None)
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
        raise Unsupported(name, "it does not return lse; choose another backend, or leave return_lse out")
    return backend


def attention(
    q,
    k,
    v,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
):
    """``softmax(softmax_scale * q k^T + mask) v``, forward only.

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
        Multiplies ``q k^T``: any real number, also negative; None for ``1/sqrt(head_dim)``. A CPU tensor of no
        dimensions is read as the number that it holds.
    backend
        An id that ``flashcore.backends`` knows, or ``auto``: the fastest that is right for this device and problem.
    return_lse
        Return ``(out, lse)``.

    What is set around the call, such as autocast, changes nothing of its result.

    Returns
    -------
    out : ``[batch, num_heads_q, seqlen_q, head_dim]``
        In the dtype of `q`; 0 in rows that see no key.
    lse : float32 ``[batch, num_heads_q, seqlen_q]``, with `return_lse`
        Natural logarithm of the softmax denominator, -inf in rows that see no key.

    Raises
    ------
    InvalidProblem
        The tensors do not fit (see `problem_of`), or lie where the backend does not take them; an option is of the
        wrong type; a derivative or a mapped axis is asked for.
    UnknownName
        No backend has this id.
    Unsupported, BackendUnavailable
        The backend named does not take this problem, or does not work on this machine.
    """
    arrays = _is_cupy(q) and _is_cupy(k) and _is_cupy(v)
    if arrays:
        q, k, v = (torch.from_dlpack(array) for array in (q, k, v))
    # By value: under its own name a tensor would be looked up by what it is, and kept alive by having been asked for.
    if causal is not True and causal is not False:
        causal = plain.flag("causal", causal)
    if return_lse is not True and return_lse is not False:
        return_lse = plain.flag("return_lse", return_lse)
    if softmax_scale is not None and type(softmax_scale) is not float:
        softmax_scale = plain.softmax_scale(softmax_scale)
    if type(backend) is not str:
        backend = plain.word("backend", backend)
    try:
        # Looking the whole call up takes half as long as checking it.
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device,
            k.device, v.device, causal, softmax_scale, backend, return_lse,
        )  # fmt: skip
        known = _calls.get(key)
    except (AttributeError, TypeError, RuntimeError):  # no tensors, or none with strides: the checks say which
        key = known = None
    if known is None or transforms.under_way() or _requires_gradients(q, k, v):
        problem = problem_of(q, k, v, causal, softmax_scale)
        known = problem, _choose(problem, q.device, backend, return_lse)
        if key is not None:
            if len(_calls) >= KEPT_CALLS:
                _calls.clear()
            _calls[key] = known
    problem, chosen = known
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            out, lse = chosen.run(q, k, v, problem)
    else:
        out, lse = chosen.run(q, k, v, problem)
    if return_lse and lse is None:
        raise Unsupported(chosen.id, "it does not return lse; choose another backend, or leave return_lse out")
    if arrays:
        import cupy

        out, lse = cupy.from_dlpack(out), cupy.from_dlpack(lse) if return_lse else None
    return (out, lse) if return_lse else out


def _is_cupy(array) -> bool:
    """Whether it is a CuPy array, told without importing CuPy."""
    return type(array).__module__.partition(".")[0] == "cupy"
