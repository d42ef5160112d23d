"""Keep what was built or measured once for this user alone: a cubin is code that is about to run."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from flashcore.paths import folder_in, home
from flashcore.records import write_whole

OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_dir() -> Path:
    """Where cubins and measured choices are kept: FLASHCORE_CACHE, else `flashcore` in the user's cache folder."""
    return folder_in("FLASHCORE_CACHE") or (folder_in("XDG_CACHE_HOME") or home() / ".cache") / "flashcore"


def read_private(path: Path) -> bytes:
    """Content of a kept file.

    Raises
    ------
    OSError
        There is none, or somebody else owns it or may write it or its folder, so that it proves nothing.
    """
    for one in (path.parent, path):
        if not _is_private(one):
            raise OSError(errno.EPERM, "others may have written it", str(one))
    return path.read_bytes()


def write_private(path: Path, content: bytes) -> None:
    """Keep a file for this user alone, in a folder that is made or closed for this user alone.

    Raises
    ------
    OSError
        The folder belongs to somebody else, or cannot be written.
    """
    folder = path.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(folder):
        if not _is_own(folder.lstat()) or folder.is_symlink():
            raise OSError(errno.EPERM, "the folder belongs to somebody else", str(folder))
        folder.chmod(0o700)
    write_whole(path, content)
    path.chmod(0o600)


def is_closed(folder: Path) -> bool:
    """Whether nobody else can put a file into a folder, or another in its place; one that is not made yet is closed."""
    for one in (folder, folder.parent):
        try:
            if not _is_private(one):
                return False
        except FileNotFoundError:
            continue
        except OSError:
            return False
    return True


def keeping_kernels() -> dict[str, str]:
    """Environment variables that make FlashAttention-4 keep the kernels that it compiled, for the next processes.

    It compiles one for each kind of problem, in seconds, and a report has some 60 kinds and several processes.
    """
    folder = cache_dir() / "flash-attention-4"
    if not is_closed(folder):  # what lies in it is code that will run
        return {}
    switch = "FLASH_ATTENTION_CUTE_DSL_CACHE"
    return {f"{switch}_ENABLED": "1", f"{switch}_DIR": str(folder)}


def _is_own(state: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or state.st_uid == os.geteuid()


def _is_private(path: Path) -> bool:
    """Whether a file or folder is this user's and nobody else may write it; a link is neither."""
    state = path.lstat()
    return _is_own(state) and not stat.S_ISLNK(state.st_mode) and not state.st_mode & OTHERS_MAY_WRITE
