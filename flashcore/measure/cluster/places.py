"""Where trials are computed: what a worker says of its card, node and software, and which may work on one report."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from flashcore import __version__
from flashcore.errors import ClusterError
from flashcore.paths import PACKAGE

SAME_SOFTWARE = ("driver", "cuda_runtime", "cudnn", "cublaslt", "torch", "cupy", "nvrtc", "python")
"""What a figure depends on besides the card: it is recorded once for a run, so all workers have to have the same."""


@dataclass(frozen=True)
class Place:
    """One card of one node, or one process of a node without cards."""

    node: str
    """The node's host name."""
    card: str | None
    """The card's uuid, as nvidia-smi gives it; None without one."""
    gpu: str | None
    """The card's name, such as `NVIDIA H200`."""
    version: str
    """FlashCore's."""
    sources: str
    """16 hex digits over the kernels and the package: see `sources`."""
    software: Mapping[str, Any] = field(default_factory=dict)
    memory_bytes: int | None = None
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES of the process."""
    pid: int = 0
    name: str = ""
    """What Dask calls the worker."""

    @property
    def key(self) -> str:
        """What no two workers may share: the card, or else the worker's name."""
        return self.card or f"cpu-{self.name}"

    @property
    def label(self) -> str:
        """The place in a few words, for a reader."""
        return f"{short(self.card) if self.card else f'CPU worker {self.name}'} on {self.node}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `environment.json`."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("software", "pid") and v not in (None, "")}
        return kept | {"software": dict(self.software)}


def short(card: str) -> str:
    """A card's uuid as nvidia-smi takes it when it is cut off: ``GPU-`` and eight digits."""
    return card[:12]


@functools.cache
def sources() -> str:
    """A hash of what measures: the kernels without comments and white space, and every module of the package."""
    from flashcore.gpu.build import source_hashes

    told = hashlib.sha256(json.dumps(source_hashes(), sort_keys=True).encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        told.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return told.hexdigest()[:16]


def identify() -> dict[str, Any]:
    """What this process would measure on, as plain data; asked in the process that measures."""
    from flashcore.gpu import device

    facts = device.snapshot()
    return {
        "node": socket.gethostname(), "card": f"GPU-{facts['uuid'].removeprefix('GPU-')}" if facts["uuid"] else None,
        "gpu": facts["gpu"], "version": __version__, "sources": sources(),
        "software": {name: facts[name] for name in SAME_SOFTWARE}, "memory_bytes": facts["memory_bytes"],
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid(),
    }  # fmt: skip


def place_of(told: Mapping[str, Any], name: str) -> Place:
    """The place of what `identify` told, which another version may tell otherwise."""
    known = {f.name for f in fields(Place)}
    missing = {"node": "?", "card": None, "gpu": None, "version": "?", "sources": "?"}
    return Place(**missing | {k: v for k, v in told.items() if k in known} | {"name": name})


def refuse_foreign(place: Place, mine: Place) -> None:
    """Refuse a worker whose FlashCore is not this one.

    Raises
    ------
    ClusterError
        Its version or its sources differ.
    """
    if place.version != mine.version:
        raise ClusterError(
            f"The worker {place.label} has FlashCore {place.version} and this process {mine.version}; install the same "
            "version there."
        )
    if place.sources != mine.sources:
        raise ClusterError(
            f"The worker {place.label} has other kernels or modules than this process (hash {place.sources} instead of "
            f"{mine.sources}), so what it measures is something else; give it the same files."
        )


def refuse_mixed(places: Sequence[Place], mine: Place) -> None:
    """Refuse workers that cannot share a report: two on one card, another card, or other software.

    Parameters
    ----------
    mine
        This process: its card and software are those that the run's environment names.

    Raises
    ------
    ClusterError
        Says which worker, and why.
    """
    twice = [key for key, count in Counter(p.key for p in places).items() if count > 1]
    if twice:
        raise ClusterError(
            f"Two workers are on the card {twice[0]}, so one would work beside the other's timings; start one worker a "
            "card, each with its own CUDA_VISIBLE_DEVICES."
        )
    for place in places:
        if mine.gpu is None and place.gpu is not None:
            raise ClusterError(
                f"The worker {place.label} has {_kind(place)} and this process no GPU; a report states its machine "
                "once, so start it on a node with such a card (under Slurm by 'srun --gres=gpu:1 --pty flashcore ...')."
            )
        if _kind(place) != _kind(mine):
            raise ClusterError(
                f"The worker {place.label} has {_kind(place)} and this process {_kind(mine)}; a report compares "
                "rounds, and those of different cards cannot be compared, so use cards of one kind ('flashcore fleet' "
                "takes any)."
            )
        other = [n for n in SAME_SOFTWARE if place.software.get(n) != mine.software.get(n)]
        if other:
            what = f"{other[0]} {place.software.get(other[0])} and this process {mine.software.get(other[0])}"
            raise ClusterError(
                f"The worker {place.label} has {what}; a report states its software once, so install the same there."
            )


def _kind(place: Place) -> str:
    if place.gpu is None:
        return "no GPU"
    return f"{place.gpu} with {(place.memory_bytes or 0) / 2**30:.0f} GiB"
