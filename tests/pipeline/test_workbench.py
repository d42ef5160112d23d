"""Notebooks to work in are copies: no edit of theirs reaches a report, and none is ever lost."""

from __future__ import annotations

import pytest

from flashcore.errors import FlashCoreError
from flashcore.paths import data_dir
from flashcore.pipeline import workbench


@pytest.fixture
def shipped(tmp_path):
    """Two notebooks as FlashCore ships them."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in ("01_first", "02_second"):
        (folder / f"{name}.ipynb").write_text(f"{name}, version 1")
    return folder


def text(folder, name: str) -> str:
    return (folder / f"{name}.ipynb").read_text()


def test_every_notebook_is_copied_and_an_edit_leaves_the_shipped_one_alone(shipped, tmp_path):
    folder, remarks = workbench.lay_out(tmp_path / "lab", notebooks_dir=shipped)
    assert remarks == [] and sorted(p.name for p in folder.glob("*.ipynb")) == ["01_first.ipynb", "02_second.ipynb"]
    (folder / "01_first.ipynb").write_text("mine")
    assert text(shipped, "01_first") == "01_first, version 1"
    assert workbench.lay_out(folder, notebooks_dir=shipped) == (folder, [])
    assert text(folder, "01_first") == "mine", "what the user changed is kept"


def test_a_newer_version_replaces_a_copy_that_nobody_changed_and_lies_beside_one_that_was(shipped, tmp_path):
    folder, _ = workbench.lay_out(tmp_path / "lab", notebooks_dir=shipped)
    (folder / "01_first.ipynb").write_text("mine")
    for name in ("01_first", "02_second"):
        (shipped / f"{name}.ipynb").write_text(f"{name}, version 2")
    _, remarks = workbench.lay_out(folder, notebooks_dir=shipped)
    assert text(folder, "02_second") == "02_second, version 2"
    assert text(folder, "01_first") == "mine" and text(folder, "01_first.newer") == "01_first, version 2"
    assert remarks == ["01_first.ipynb is kept as you changed it; FlashCore's own is in 01_first.newer.ipynb."]
    assert workbench.lay_out(folder, notebooks_dir=shipped)[1] == [], "said once"


def test_a_notebook_of_the_users_own_under_a_shipped_name_is_never_written_over(shipped, tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "01_first.ipynb").write_text("mine")
    folder, remarks = workbench.lay_out(tmp_path / "lab", notebooks_dir=shipped)
    assert text(folder, "01_first") == "mine" and len(remarks) == 1


def test_a_copy_that_was_deleted_comes_back(shipped, tmp_path):
    folder, _ = workbench.lay_out(tmp_path / "lab", notebooks_dir=shipped)
    (folder / "02_second.ipynb").unlink()
    workbench.lay_out(folder, notebooks_dir=shipped)
    assert text(folder, "02_second") == "02_second, version 1"


def test_a_folder_that_cannot_be_written_is_one_sentence(shipped, tmp_path):
    (tmp_path / "lab").write_text("a file")
    with pytest.raises(FlashCoreError, match="cannot be laid out in .* make the folder writable"):
        workbench.lay_out(tmp_path / "lab", notebooks_dir=shipped)


def test_the_copies_lie_in_a_folder_that_git_ignores():
    assert workbench.workbench_dir().name == "lab"
    ignored = (data_dir("notebooks").parent / ".gitignore").read_text().splitlines()
    assert "/lab/" in ignored


def test_two_that_lay_notebooks_out_at_once_take_each_other_for_no_user(shipped, tmp_path, monkeypatch):
    """One is between a copy and its pristine twin when the other one looks, or in the middle of a file."""
    folder, _ = workbench.lay_out(tmp_path / "lab", notebooks_dir=shipped)
    (shipped / "01_first.ipynb").write_text("01_first, version 2")
    seen = []

    def write_whole(path, content, real=workbench.write_whole):
        seen.append(text(folder, "01_first"))  # what another process finds before each write
        real(path, content)

    monkeypatch.setattr(workbench, "write_whole", write_whole)
    (folder / "01_first.ipynb").write_text("01_first, version 2")
    assert workbench.lay_out(folder, notebooks_dir=shipped) == (folder, [])
    assert not (folder / "01_first.newer.ipynb").exists() and set(seen) == {"01_first, version 2"}
