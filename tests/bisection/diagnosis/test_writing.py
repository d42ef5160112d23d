"""The test that is written fails while the bug is there, and passes once it is mended."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashcore import backends
from flashcore.bisection.diagnosis import diagnose, write_test
from flashcore.errors import InvalidProblem

WRONG = """
import torch

def mine(q, k, v):
    s = q.float() @ k.float().mT
    return (torch.softmax(s, -1) @ v.float()).to(q.dtype)
"""


def run(path):
    names: dict = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    (test,) = [value for name, value in names.items() if name.startswith("test_")]
    test()


def test_it_fails_until_the_function_is_mended(tmp_path):
    file = tmp_path / "kernel.py"
    file.write_text(WRONG)
    place = f"{file}:mine"
    found = diagnose(place, "B=1,H=2,S=40,D=16", device="cpu")
    written = write_test(found, str(tmp_path / "test_kernel.py"), place)
    with pytest.raises(AssertionError, match="scale is missing"):
        run(tmp_path / "test_kernel.py")
    assert written.endswith("test_kernel.py")
    file.write_text(WRONG.replace(".mT", ".mT / q.shape[-1] ** 0.5"))
    run(tmp_path / "test_kernel.py")


def test_the_seed_is_written_and_of_a_backend_only_what_it_may_be_told(tmp_path, monkeypatch):
    file = tmp_path / "kernel.py"
    file.write_text(WRONG)
    found = diagnose(f"{file}:mine", "B=1,H=1,S=40,D=16", device="cpu", seed=7)
    assert found.smallest.inputs.seed == 7
    assert ", seed=7)" in Path(write_test(found, str(tmp_path / "test_it.py"), f"{file}:mine")).read_text()
    monkeypatch.setattr(type(backends.get("cpu")), "run", lambda self, q, k, v, problem, **masks: (v.clone(), None))
    found = diagnose("cpu", "B=1,H=1,S=40,D=64")
    assert not found.right and found.context["lse"] == "natural"
    assert "lse" not in Path(write_test(found, str(tmp_path / "test_cpu.py"), "cpu")).read_text().split("def ")[1]


def test_there_is_no_test_of_what_is_right():
    with pytest.raises(InvalidProblem, match="no failing case"):
        write_test(diagnose("cpu", "tiny"), "test_x.py", "cpu")
