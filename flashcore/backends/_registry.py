"""The registry: which backends there are, by id, from the modules of this folder and from plug-ins.

A module puts a backend into it by decorating a `Backend` subclass with `register`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
import threading
from pathlib import Path

from flashcore.backends._contract import COMPUTES, REGISTERED, Backend
from flashcore.errors import FlashCoreError, UnknownName
from flashcore.numerics import instruments
from flashcore.paths import plugin_folders

_REGISTRY = REGISTERED
_discovered: set[str] = set()
_discovering = threading.RLock()
"""Held while modules and plug-ins are imported, so that no other thread misses one. A plug-in may ask for a backend."""
WAIT_S = 60.0
"""Seconds to wait for a thread that imports them: it may wait for a module that asks while it is imported here."""

os.register_at_fork(after_in_child=_discovering._at_fork_reinit)  # the thread that holds it is not in a child


def register(cls: type[Backend]) -> type[Backend]:
    """Class decorator: put one instance of the backend into the registry under its id."""
    known = _REGISTRY.get(cls.id)
    if known is not None and type(known).__qualname__ != cls.__qualname__:
        raise FlashCoreError(f"Two backends are called '{cls.id}'; give the newer one another id.")
    _REGISTRY[cls.id] = cls()
    for base in cls.__mro__:
        if issubclass(base, Backend):
            instruments.trust(base, COMPUTES)
    return cls


@functools.cache  # a plug-in may come later; our own folder stays as it is
def _import_our_own() -> None:
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not (info.ispkg or info.name.startswith("_")):
            importlib.import_module(f"{__package__}.{info.name}")


def _discover() -> None:
    _import_our_own()
    for folder in plugin_folders():
        if not folder.is_dir():
            raise FlashCoreError(
                f"FLASHCORE_PLUGINS names {folder}, and there is no such folder; name folders that hold backends."
            )
        instruments.remember()  # what judges, as it is before code of somebody else's runs
        for path in sorted(folder.glob("*.py")):
            if str(path) not in _discovered:
                _discovered.add(str(path))  # before it is imported, since it may ask for a backend itself
                try:
                    _import_plugin(path)
                except BaseException:
                    _discovered.discard(str(path))  # whoever asks again is told again
                    raise


def _import_plugin(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"flashcore_plugin_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except FlashCoreError:
        raise
    except Exception as error:  # whatever a file of somebody else's raises
        said = " ".join(str(error).split())[:300].rstrip(".")
        raise FlashCoreError(
            f"The plug-in {path} cannot be imported ({type(error).__name__}: {said}); mend it, or take its folder out "
            "of FLASHCORE_PLUGINS."
        ) from error


def all_backends() -> list[Backend]:
    """Every backend known here, whether or not it can run: ours from slow to fast, then peers.

    Raises
    ------
    FlashCoreError
        FLASHCORE_PLUGINS names no folder, or a file in one cannot be imported.
    """
    order = {"reference": 0, "ours": 1, "peer": 2}
    if _discovering.acquire(timeout=WAIT_S):
        try:
            _discover()
        finally:
            _discovering.release()
    return sorted(_REGISTRY.values(), key=lambda b: (order[b.role], b.device != "cpu", b.id))


def get(backend_id: str) -> Backend:
    """The backend with this id.

    Raises
    ------
    UnknownName
        No backend has it; the message lists those that exist.
    """
    known = {b.id: b for b in all_backends()}
    if backend_id not in known:
        raise UnknownName("backend", backend_id, sorted(known))
    return known[backend_id]


def ids_in(names: str) -> list[str]:
    """The ids of a comma-separated list, each once, whether or not there are such backends."""
    return list(dict.fromkeys(filter(None, (name.strip() for name in names.split(",")))))


def select(names: str = "all", *, device: str | None = None) -> list[Backend]:
    """Backends by a comma-separated list of ids, or `all`; with `device`, those that take tensors there.

    An id that does not exist is an error, and so is a list without one; one that is merely not available here is
    returned, for the caller to record. An id that stands there twice is one.
    """
    named = ids_in(names)
    if not named:
        raise UnknownName("backend", names, ["all", *(b.id for b in all_backends())])
    wanted = all_backends() if named == ["all"] else [get(name) for name in named]
    return [b for b in wanted if device is None or b.device in (device, "any")]
