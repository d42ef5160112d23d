"""Where files lie: the project's own, those that a user names, and those that are only half written.

A path that a user names is made absolute where it comes in, since a notebook's kernel works in another folder.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import socket
import tempfile
import zlib
from pathlib import Path

from flashcore.errors import FlashCoreError

PACKAGE = Path(__file__).resolve().parent
"""The folder of the package itself."""
HOME = PACKAGE.parent
"""What the package lies in: the root of a checkout, or the folder of installed packages."""
FOLDER_VARIABLES = ("FLASHCORE_CACHE", "CUDA_HOME", "CUDA_PATH", "PLAYWRIGHT_BROWSERS_PATH", "XDG_CACHE_HOME")
"""Environment variables that name one folder."""
LIST_VARIABLES = ("FLASHCORE_PLUGINS", "PYTHONPATH")
"""Environment variables that name several."""


def data_dir(name: str) -> Path:
    """The folder `kernels`, `notebooks` or `reports`: beside the package in a checkout, inside it once installed."""
    checkout = HOME / name
    packaged = PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else checkout


# ------------------------------------------------------------------------------------------- paths that users name


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path from the root, whatever folder a process works in later; links and ``..`` stay as they are written.

    Raises
    ------
    FlashCoreError
        The path is relative, and the current folder no longer exists.
    """
    path = Path(path)
    if path.is_absolute():
        return path
    try:
        return path.absolute()
    except OSError as error:
        raise FlashCoreError(
            f"The path '{path}' is relative, and the current folder is gone ({error.strerror}); change into a folder "
            "that exists, or name the whole path."
        ) from error


def absolute_place(place: str) -> str:
    """``FILE.py:function`` with its file from the root, as a process that works elsewhere has to get it."""
    where, colon, name = place.rpartition(":")
    return f"{absolute(Path(where).expanduser())}:{name}" if colon and where.endswith(".py") else place


def folder_in(variable: str) -> Path | None:
    """The folder that an environment variable names, from the root; None when it is not set, or empty."""
    named = os.environ.get(variable)
    return absolute(named) if named else None


def folders_in(variable: str) -> list[Path]:
    """The folders that an environment variable lists, from the root."""
    return [absolute(part) for part in os.environ.get(variable, "").split(os.pathsep) if part]


def plugin_folders() -> list[Path]:
    """The folders of FLASHCORE_PLUGINS, which hold backends and kernels of others."""
    return folders_in("FLASHCORE_PLUGINS")


def absolute_variables() -> dict[str, str]:
    """The environment variables that name folders, as a process that works elsewhere has to get them."""
    found = {name: str(folder) for name in FOLDER_VARIABLES if (folder := folder_in(name)) is not None}
    lists = {name: os.pathsep.join(map(str, folders_in(name))) for name in LIST_VARIABLES}
    return found | {name: text for name, text in lists.items() if text}


def home() -> Path:
    """The user's home folder; of a user without one (a container's made-up user id) a folder of that user's own."""
    try:
        return Path.home()
    except RuntimeError:  # HOME is not set, and no account has this user id
        return _made_up_home()


def _made_up_home() -> Path:
    folder = Path(tempfile.gettempdir()) / f"flashcore-home-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        mine = folder.lstat().st_uid == os.getuid() and not folder.is_symlink()
    except OSError:
        mine = False
    return folder if mine else Path(tempfile.mkdtemp(prefix="flashcore-home-"))


def set_home() -> None:
    """Name `home()` in HOME where nothing names one, since Jupyter and torch do not start without a home folder."""
    if os.environ.get("HOME"):
        return
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ["HOME"] = str(home())


# ------------------------------------------------------------------------------------------------ half-written files


def _numbering() -> str:
    """Where this process's number means something: the machine, and on Linux the container, in whose numbers it counts.

    Containers may share a machine's name and a folder, and each counts its processes from 1.
    """
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


_HOST = f"{zlib.crc32(_numbering().encode()):08x}"
_PARTIAL = re.compile(r"\.(?:.*\.)?([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}\.partial")


def partial_path(path: Path) -> Path:
    """A name beside `path` for what is not whole yet: hidden, used by nobody else, and told from what a kill left.

    It holds the machine and the process that write it, so that `sweep` knows what nobody will finish.
    """
    stem = path.name[:120]  # a file's name may have 255 bytes
    return path.with_name(f".{stem}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.partial")


def sweep(folder: Path) -> None:
    """Remove what killed processes of this machine left half-written in a folder; what is being written stays."""
    try:
        left = [p for p in folder.iterdir() if (m := _PARTIAL.fullmatch(p.name)) and m[1] == _HOST and _dead(int(m[2]))]
    except OSError:  # no such folder, or not ours to read: nothing of ours can lie there
        return
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # of another user, in a folder that several share
                path.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether a file or folder of this name is half-written, and may be gone at any moment (`partial_path`)."""
    return _PARTIAL.fullmatch(name) is not None


def _dead(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
