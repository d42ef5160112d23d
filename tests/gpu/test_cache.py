"""The cache is this user's alone: what others may have written is built again, never used."""

from __future__ import annotations

import os

import pytest

from flashcore.gpu import cache


def test_what_is_kept_is_private_and_read_back(tmp_path):
    path = tmp_path / "made" / "cache" / "entry.cubin"
    cache.write_private(path, b"code")
    assert cache.read_private(path) == b"code"
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_was_open_is_closed_before_anything_is_kept_in_it(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    cache.write_private(folder / "entry", b"code")
    assert folder.stat().st_mode & 0o777 == 0o700 and cache.read_private(folder / "entry") == b"code"


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_an_entry_that_others_may_write_is_not_read(tmp_path, mode):
    path = tmp_path / "cache" / "entry"
    cache.write_private(path, b"code")
    path.chmod(mode)
    with pytest.raises(OSError, match="others may have written it"):
        cache.read_private(path)


def test_an_entry_in_a_folder_that_others_may_write_is_not_read(tmp_path):
    path = tmp_path / "cache" / "entry"
    cache.write_private(path, b"code")
    path.parent.chmod(0o770)
    with pytest.raises(OSError, match="others may have written it"):
        cache.read_private(path)


def test_a_link_to_somebody_elses_entry_is_not_read(tmp_path):
    path = tmp_path / "cache" / "entry"
    cache.write_private(path, b"code")
    (path.parent / "link").symlink_to(path)
    with pytest.raises(OSError):
        cache.read_private(path.parent / "link")


def test_an_entry_or_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "entry"
    cache.write_private(path, b"code")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(OSError, match="others may have written it"):
        cache.read_private(path)
    with pytest.raises(OSError, match="belongs to somebody else"):
        cache.write_private(path, b"other")
    assert path.read_bytes() == b"code"


def test_the_folder_is_absolute_whatever_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHCORE_CACHE", "rel")
    assert cache.cache_dir() == tmp_path / "rel"


def test_a_folder_is_closed_where_nobody_else_may_write_it_or_the_one_above(tmp_path):
    above = tmp_path / "above"
    kept = above / "kept"
    assert cache.is_closed(kept), "neither is made yet"
    above.mkdir(mode=0o700)
    assert cache.is_closed(kept)
    kept.mkdir(mode=0o700)
    assert cache.is_closed(kept)
    above.chmod(0o770)
    assert not cache.is_closed(kept), "whoever may write above may put another in its place"
    above.chmod(0o700)
    kept.chmod(0o770)
    assert not cache.is_closed(kept)
    (above / "link").symlink_to(kept)
    (above / "file").write_text("")
    assert not cache.is_closed(above / "link") and not cache.is_closed(above / "file" / "kept")
