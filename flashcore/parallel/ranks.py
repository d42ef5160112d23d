"""What ranks say to each other: who they are, whether all were called alike, and parts of tensors on their way."""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flashcore.errors import InvalidProblem
from flashcore.numerics import plain
from flashcore.parallel.plan import chunks, held, owned

MOST_SHOWN = 8
"""Ranks whose lengths an error shows."""
_met: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
"""Groups whose ranks have spoken to each other, so that all have set up their connections."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a mesh of one dimension, seen from one of them."""

    group: dist.ProcessGroup
    rank: int
    size: int
    kind: str
    """Of the mesh's devices: ``cpu`` or ``cuda``."""

    def peer(self, rank: int) -> int:
        """The number in the whole world of a rank of the mesh."""
        return dist.get_global_rank(self.group, rank)

    def have_met(self) -> bool:
        """Whether a call on this group has been made before; the same on all ranks, which make the same calls."""
        met = self.group in _met
        _met.add(self.group)
        return met


def ranks_of(mesh: DeviceMesh) -> Ranks:
    """The ranks of a mesh.

    Raises
    ------
    InvalidProblem
        It is no mesh of one dimension, its devices are neither CPU nor CUDA, there is no process group, or this process
        is not in it.
    """
    if not isinstance(mesh, DeviceMesh):
        raise InvalidProblem(
            f"mesh is {plain.shown(mesh)}; pass a DeviceMesh of one dimension, as "
            "torch.distributed.device_mesh.init_device_mesh('cuda', (ranks,)) makes it."
        )
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidProblem(
            "There is no process group; start the processes with torchrun and call "
            "torch.distributed.init_process_group() in each."
        )
    if mesh.ndim != 1:
        raise InvalidProblem(
            f"mesh has {mesh.ndim} dimensions; pass the one along which the sequence is cut, such as mesh['cp']."
        )
    if mesh.device_type not in ("cpu", "cuda"):
        raise InvalidProblem(f"mesh is one of '{mesh.device_type}' devices; FlashCore takes CPU and CUDA tensors.")
    if mesh.get_coordinate() is None:
        raise InvalidProblem(
            f"This process is rank {dist.get_rank()}, which mesh {mesh.mesh.tolist()} does not hold; call this on the "
            "ranks of the mesh alone, or make a mesh of all ranks."
        )
    group = mesh.get_group()
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group), mesh.device_type)


def check_length(name: str, seqlen: int, ranks: Ranks) -> None:
    """Raise `InvalidProblem` where a sequence has fewer rows than chunks."""
    if seqlen < 2 * ranks.size:
        raise InvalidProblem(
            f"{name} is {seqlen}, which gives no {2 * ranks.size} chunks, two for each of {ranks.size} ranks; use "
            "fewer ranks, or one card."
        )


def check_shares(name: str, found: Sequence[int], ranks: Ranks) -> int:
    """The length of a sequence whose shards have these lengths, one for each rank.

    Raises
    ------
    InvalidProblem
        The sequence is too short, or cut in another way.
    """
    seqlen = sum(found)
    check_length(f"The length of {name}", seqlen, ranks)
    expected = [held(seqlen, rank, ranks.size) for rank in range(ranks.size)]
    if list(found) != expected:
        raise InvalidProblem(
            f"The ranks hold {_listed(found)} rows of {name}, and {seqlen} rows cut for {ranks.size} ranks are "
            f"{_listed(expected)}; cut the whole with flashcore.parallel.shard over this mesh."
        )
    return seqlen


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:MOST_SHOWN]))
    return f"{shown}, ..." if len(numbers) > MOST_SHOWN else shown


def told(ranks: Ranks, device: torch.device, words: Sequence[int]) -> list[list[int]]:
    """What each rank says, in their order: all say equally many whole numbers. The host waits for the other ranks.

    On a GPU the numbers travel on a stream of their own, so that no work before this call is waited for.
    """
    aside = contextlib.nullcontext()
    if device.type == "cuda":
        aside = torch.cuda.stream(torch.cuda.Stream(device))
    with aside:
        mine = torch.tensor(words, dtype=torch.int64, device=device)
        all_of_them = [torch.empty_like(mine) for _ in range(ranks.size)]
        dist.all_gather(all_of_them, mine, group=ranks.group)
        return torch.stack(all_of_them).tolist()


def travel(
    ranks: Ranks, sent: Mapping[int, Sequence[torch.Tensor]], received: Mapping[int, Sequence[torch.Tensor]]
) -> list[dist.Work]:
    """Start sending tensors to ranks and receiving tensors from ranks, each in order; wait for what this returns.

    NCCL moves them on a stream of its own, which begins when the work that the current stream has so far is done, and
    `wait` makes the current stream wait, and not the host. Tensors are contiguous.
    """
    moves = [
        dist.P2POp(how, tensor, ranks.peer(rank), group=ranks.group)
        for how, part in ((dist.irecv, received), (dist.isend, sent))
        for rank in sorted(part)
        for tensor in part[rank]
    ]
    return dist.batch_isend_irecv(moves) if moves else []


# -------------------------------------------------------------------------------------------------- cut, and put back


def _dimension(tensor: torch.Tensor, dim: int) -> int:
    if not isinstance(tensor, torch.Tensor):
        raise InvalidProblem(f"tensor is {plain.shown(tensor)}; it has to be a torch tensor.")
    dim = plain.integer("dim", dim)
    if not -tensor.dim() <= dim < tensor.dim():
        raise InvalidProblem(f"dim is {dim}, and the tensor has {tensor.dim()} dimensions.")
    return dim % tensor.dim()


def shard(tensor: torch.Tensor, mesh: DeviceMesh, dim: int = 2) -> torch.Tensor:
    """The part of a whole tensor that this rank holds: chunks r and 2n-1-r of 2n along `dim`, one behind the other.

    Nothing is sent; each rank has the whole, for example on the CPU. Cut the tokens, their positions and whatever else
    goes along the sequence alike: ``shard(tokens, mesh, dim=1)``, and ``shard(torch.arange(seqlen), mesh, dim=0)``.

    Parameters
    ----------
    tensor
        The same on each rank, on any device.
    mesh
        Of one dimension.
    dim
        Along the sequence. Where 2n does not divide the length, the first chunks are longer by one.

    Returns
    -------
    part
        A contiguous copy, on the tensor's device.

    Raises
    ------
    InvalidProblem
        As `ranks_of`; no tensor; no such dimension; fewer rows than chunks.
    """
    ranks, dim = ranks_of(mesh), _dimension(tensor, dim)
    check_length(f"The length of the tensor along dim {dim}", tensor.shape[dim], ranks)
    cut = chunks(tensor.shape[dim], ranks.size)
    return torch.cat([tensor.narrow(dim, cut[c][0], cut[c][1] - cut[c][0]) for c in owned(ranks.rank, ranks.size)], dim)


def gather(part: torch.Tensor, mesh: DeviceMesh, dim: int = 2) -> torch.Tensor:
    """The whole tensor on each rank, from the parts that `shard` gave them; the host waits for the other ranks.

    Parameters
    ----------
    part
        This rank's part, on a device of the mesh; shapes and dtypes are the same on all ranks, but for `dim`.
    mesh, dim
        As in `shard`.

    Raises
    ------
    InvalidProblem
        As `shard`; the part lies on another kind of device; gradients are asked for; the parts do not fit together.
    """
    ranks, dim = ranks_of(mesh), _dimension(part, dim)
    device = device_of(ranks, part)
    wrong = why_not_there(ranks, "part", part)
    if wrong is None and part.requires_grad and torch.is_grad_enabled():
        wrong = "part requires gradients, and gather has none; call it under torch.no_grad(), or detach the part."
    others = [size for at, size in enumerate(part.shape) if at != dim]
    kind = zlib.crc32(repr((dim, others, part.dtype)).encode())
    said = told(ranks, device, [wrong is None, kind, part.shape[dim]])
    if wrong is not None:
        raise InvalidProblem(wrong)
    refuse_together(said)
    if any(one[1] != kind for one in said):
        raise InvalidProblem(
            f"The ranks hold parts of different shapes or dtypes (here {list(part.shape)}, {part.dtype}); all but "
            f"dim {dim} has to be the same on every rank."
        )
    seqlen = check_shares("the tensor", [one[2] for one in said], ranks)
    room = max(one[2] for one in said), *others  # gloo gathers tensors of one shape
    sent = part.new_zeros(room)
    sent[: part.shape[dim]] = part.detach().movedim(dim, 0)
    parts = [torch.empty_like(sent) for _ in range(ranks.size)]
    dist.all_gather(parts, sent, group=ranks.group)
    whole = part.new_empty((seqlen, *others))
    cut = chunks(seqlen, ranks.size)
    for rank, tensor in enumerate(parts):
        at = 0
        for chunk in owned(rank, ranks.size):
            start, stop = cut[chunk]
            whole[start:stop] = tensor[at : at + stop - start]
            at += stop - start
    return whole.movedim(0, dim).contiguous()


def device_of(ranks: Ranks, tensor: object) -> torch.device:
    """Where this rank's numbers travel from: beside a tensor, or on the mesh's device where that is no tensor there."""
    if ranks.kind == "cpu":
        return torch.device("cpu")
    there = isinstance(tensor, torch.Tensor) and tensor.is_cuda
    return tensor.device if there else torch.device("cuda", torch.cuda.current_device())


def why_not_there(ranks: Ranks, name: str, tensor: torch.Tensor) -> str | None:
    """None where a tensor lies where the mesh is; otherwise a sentence."""
    if tensor.device.type == ranks.kind:
        return None
    return f"{name} lies on '{tensor.device}', and the mesh is one of {ranks.kind} devices; move it there first."


def refuse_together(said: Sequence[Sequence[int]]) -> None:
    """Raise `InvalidProblem` where another rank says, by a 0 in the first place, that it cannot go on."""
    stopped = [str(rank) for rank, words in enumerate(said) if not words[0]]
    if stopped:
        raise InvalidProblem(f"Rank {stopped[0]} refused what it was called with, and says why; so no rank goes on.")
