"""Where the project's files lie, in a checkout and in an installed wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import flashcore
from flashcore import paths


def test_the_package_and_what_it_lies_in():
    assert paths.PACKAGE.is_absolute() and paths.HOME == paths.PACKAGE.parent
    assert paths.PACKAGE / "__init__.py" == Path(flashcore.__file__).resolve()


@pytest.mark.parametrize(
    ("name", "file"), [("kernels", "attention_hopper.cu"), ("notebooks", "01_*.ipynb"), ("reports", "gates.toml")]
)
def test_every_folder_holds_its_files(name, file):
    assert list(paths.data_dir(name).glob(file)), f"{paths.data_dir(name)} holds no {file}"


def test_a_checkout_has_them_beside_the_package_and_a_wheel_inside_it(tmp_path, monkeypatch):
    package = tmp_path / "flashcore"
    monkeypatch.setattr(paths, "PACKAGE", package)
    monkeypatch.setattr(paths, "HOME", tmp_path)
    assert paths.data_dir("kernels") == tmp_path / "kernels", "where it would lie, though it is not there"
    (tmp_path / "kernels").mkdir()
    assert paths.data_dir("kernels") == tmp_path / "kernels"
    (package / "_data" / "kernels").mkdir(parents=True)
    assert paths.data_dir("kernels") == package / "_data" / "kernels", "what was installed goes before a neighbour"
    assert paths.data_dir("reports") == tmp_path / "reports", "each folder is looked for by itself"


def test_a_file_of_that_name_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "flashcore")
    monkeypatch.setattr(paths, "HOME", tmp_path)
    (tmp_path / "flashcore" / "_data").mkdir(parents=True)
    (tmp_path / "flashcore" / "_data" / "kernels").write_text("")
    assert paths.data_dir("kernels") == tmp_path / "kernels"


def test_they_do_not_depend_on_the_folder_that_one_is_in(tmp_path):
    code = "from flashcore import paths; print(paths.data_dir('kernels'))"
    environment = {"PYTHONPATH": str(paths.HOME)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(paths.data_dir("kernels")), done.stderr


def test_the_place_of_a_function_is_told_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.absolute_place("mine.py:run") == f"{tmp_path / 'mine.py'}:run"
    assert paths.absolute_place("a.module:run") == "a.module:run" and paths.absolute_place("hopper") == "hopper"
