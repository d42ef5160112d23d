"""Attention over a sequence cut over ranks: keys and values travel, and each rank calls the kernel for its rows."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh

from flashcore import backends, ops
from flashcore.errors import FlashCoreError, InvalidProblem, UnknownName
from flashcore.library.dense import DTYPES
from flashcore.numerics import plain, transforms
from flashcore.parallel.computing import computed_by_plan
from flashcore.parallel.gradients import Differentiable
from flashcore.parallel.plan import PLANS, Zigzag, held
from flashcore.parallel.ranks import (
    Ranks,
    check_length,
    check_shares,
    device_of,
    ranks_of,
    refuse_together,
    told,
    why_not_there,
)

ALIKE = ("batch", "num_heads_q", "num_heads_kv", "head_dim", "dtype", "causal", "softmax_scale", "plan",
         "requires_grad", "seqlen_q", "seqlen_k")  # fmt: skip
"""What has to be the same on all ranks, in the order in which a rank tells it."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mesh: DeviceMesh,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    plan: str = "gather",
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
):
    """`flashcore.attention` of sequences that are cut over the ranks of a mesh, as `shard` cuts them.

    Every rank of the mesh makes the same call with its own shards, and gets its own rows of the result. They are those
    that one card gives, within the kernel's bound; two runs give the same bits. Gradients flow back through `out` and
    `lse`, where every rank runs the backward pass; first derivatives only.

    Parameters
    ----------
    q
        ``[batch, num_heads_q, rows of this rank, head_dim]``, on a device of the mesh.
    k, v
        ``[batch, num_heads_kv, rows of this rank, head_dim]``.
    mesh
        Of one dimension; NCCL connects its GPUs, and gloo its CPUs.
    causal
        Query i of the whole sequence sees keys ``j <= i + seqlen_k - seqlen_q``.
    softmax_scale, backend
        As in `flashcore.attention`.
    return_lse
        Return ``(out, lse)``.
    plan
        ``gather``: each rank fetches all keys and values that its queries see, and joins nothing: the fastest, and
        rounded as on one card. ``ring``: it holds two shards of other ranks at a time, and joins partial results in
        float32 (see `flashcore.parallel.plan`).
    seqlen_q, seqlen_k
        Lengths of the whole sequences, where they are known: the ranks then tell each other nothing, and the host does
        not wait for the other ranks. Give both, on every rank. A first call on a mesh is checked all the same.

    Returns
    -------
    out : ``[batch, num_heads_q, rows of this rank, head_dim]``
        In the dtype of `q`, with the strides of ``torch.empty_like(q)``; 0 in rows that see no key.
    lse : float32 ``[batch, num_heads_q, rows of this rank]``, with `return_lse`
        -inf in rows that see no key.

    Raises
    ------
    InvalidProblem
        What `flashcore.attention` refuses; no process group, or a mesh without this process or of more dimensions; the
        tensors lie on another kind of device than the mesh; shards whose lengths do not fit together, or fewer rows
        than chunks; the ranks were called with different options; gradients are asked of plan ``ring``. Where one rank
        refuses its own arguments, the others refuse too, and none waits for it.
    UnknownName
        No such plan or backend.
    Unsupported
        FLASHCORE_BATCH_INVARIANT=1: the bits of a row depend on how the sequence is cut.
    """
    ranks = ranks_of(mesh)
    try:
        words = _described(q, k, v, ranks, causal, softmax_scale, return_lse, backend, plan, seqlen_q, seqlen_k)
        wrong = None
    except FlashCoreError as error:
        words, wrong = [0] * len(ALIKE), error
    met = ranks.have_met()
    if not met or seqlen_k is None:
        shares = [0, 0] if wrong is not None else [q.shape[2], k.shape[2]]
        said = told(ranks, device_of(ranks, q), [wrong is None, *words, *shares])
        if wrong is not None:
            raise wrong
        seqlen_q, seqlen_k = _agreed(said, ranks)
    elif wrong is not None:
        raise wrong
    else:
        seqlen_q, seqlen_k = words[-2:]
    if ranks.size == 1:
        return ops.attention(
            q, k, v, causal=causal, softmax_scale=softmax_scale, backend=backend, return_lse=return_lse
        )
    cut, scale = Zigzag(seqlen_q, seqlen_k, ranks.size, bool(causal)), plain.softmax_scale(softmax_scale)
    if transforms.want_gradients(q, k, v):
        out, lse = Differentiable.apply(q, k, v, ranks, cut, scale, backend)
    else:
        out, lse = computed_by_plan(q, k, v, ranks, cut, plan, scale, return_lse, backend)
    return (out, lse) if return_lse else out


def _described(
    q, k, v, ranks: Ranks, causal, softmax_scale, return_lse, backend, plan, seqlen_q, seqlen_k
) -> list[int]:
    """Check what one rank sees, and say it in whole numbers (`ALIKE`)."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if transforms.is_distributed(tensor):
            raise InvalidProblem(f"{name} is a DTensor; pass {name}.to_local(), the part that this rank holds.")
        if isinstance(tensor, torch.Tensor) and (wrong := why_not_there(ranks, name, tensor)) is not None:
            raise InvalidProblem(wrong)
    if ranks.size > 1:
        ops.refuse_others("parallel.attention", "several ranks", "a row adds up as they have cut its sequence")
    problem = ops.problem_of(q, k, v, causal, softmax_scale)
    if transforms.under_way():
        transforms.refuse("q, k or v", q, k, v)
    plain.flag("return_lse", return_lse)
    if plain.word("backend", backend) != "auto":
        backends.get(backend)  # here, and not in the call of a kernel, which the other ranks would make all the same
    if plain.word("plan", plan) not in PLANS:
        raise UnknownName("plan", plan, list(PLANS))
    gradients = transforms.want_gradients(q, k, v)
    if gradients and plan != "gather":
        raise InvalidProblem(
            f"Gradients are asked for, and plan '{plan}' has none; choose 'gather', or call it under torch.no_grad()."
        )
    if (seqlen_q is None) != (seqlen_k is None):
        raise InvalidProblem("seqlen_q and seqlen_k are given together, or neither of them; one was given alone.")
    for name, tensor, seqlen in (("seqlen_q", q, seqlen_q), ("seqlen_k", k, seqlen_k)):
        if seqlen is None:
            continue
        seqlen = plain.integer(name, seqlen)
        check_length(name, seqlen, ranks)
        if tensor.shape[2] != held(seqlen, ranks.rank, ranks.size):
            raise InvalidProblem(
                f"Rank {ranks.rank} of {ranks.size} holds {held(seqlen, ranks.rank, ranks.size)} rows of a sequence of "
                f"{name}={seqlen}, and {name[-1]} has {tensor.shape[2]}; cut the whole with flashcore.parallel.shard "
                "over this mesh."
            )
    scale = int.from_bytes(struct.pack("<d", problem.scale), "little", signed=True)
    return [
        problem.batch, problem.num_heads_q, problem.num_heads_kv, problem.head_dim, list(DTYPES).index(q.dtype),
        problem.causal, scale, PLANS.index(plan), gradients, plain.integer("seqlen_q", seqlen_q or 0),
        plain.integer("seqlen_k", seqlen_k or 0),
    ]  # fmt: skip


def _agreed(said: Sequence[Sequence[int]], ranks: Ranks) -> tuple[int, int]:
    """The lengths of the whole sequences, from what all ranks said; `InvalidProblem` where they do not fit together."""
    refuse_together(said)
    for place, name in enumerate(ALIKE, start=1):
        for rank, words in enumerate(said):
            if words[place] != said[0][place]:
                raise InvalidProblem(
                    f"Ranks 0 and {rank} were called with different values of {name}; all ranks have to make the same "
                    "call."
                )
    if ranks.size == 1:
        return said[0][-2], said[0][-1]
    return check_shares("q", [words[-2] for words in said], ranks), check_shares("k", [w[-1] for w in said], ranks)
