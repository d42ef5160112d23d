"""What `flashcore doctor` says of peers: which are installed, in which version, and whether there is a newer cuDNN."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from flashcore.gpu.device import Check
from flashcore.paths import HOME

CUDNN = "sdpa-cudnn"


def checks(constraints: Path | None = None) -> list[Check]:
    """A line for each peer: whether a sweep can time it here, with the version of the software that it calls.

    Parameters
    ----------
    constraints
        The folder of pinned versions, which say what can be installed; that of this checkout if left out. Nothing is
        asked over a network, so a version that is newer than the pins is not known.
    """
    if importlib.util.find_spec("torch") is None:  # the doctor says so by itself, and no backend loads
        return []
    from flashcore import backends

    found = []
    for peer in (one for one in backends.all_backends() if one.role == "peer"):
        state, software = peer.availability(), peer.software()
        parts = [software, None if state.ok else state.reason]
        if peer.id == CUDNN and software:
            parts.append(newer_cudnn(software.split()[-1], constraints or HOME / "constraints"))
        detail = "; ".join(filter(None, parts)) or "its version is not known"
        found.append(Check(f"Peer {peer.id}", state.ok, detail, state.fix))
    return found


def newer_cudnn(loaded: str, constraints: Path) -> str:
    """Which newer cuDNN is known to be installable, as a clause with the command; empty where none is.

    Parameters
    ----------
    loaded
        The version that torch loaded, such as ``9.19.0``.
    """
    import torch

    cuda = (torch.version.cuda or "").partition(".")[0]
    path = constraints / f"cuda{cuda}.txt"
    pins = path.read_text(encoding="utf-8") if cuda and path.is_file() else ""
    pin = re.search(rf"^(nvidia-cudnn-cu{cuda}==([0-9.]+))$", pins, flags=re.MULTILINE)
    if pin is None or _numbers(pin[2]) <= _numbers(loaded):
        return ""
    newer = ".".join(map(str, _numbers(pin[2])))
    return f"{newer} is newer: pip install {pin[1]} (pip then says if torch asked for another)"


def _numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version; what comes behind them is a build."""
    return tuple(int(part) for part in version.split(".")[:3])
