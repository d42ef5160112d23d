"""The test that is written fails while the bug is there, and passes once it is mended."""

from __future__ import annotations

import pytest

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


def test_there_is_no_test_of_what_is_right():
    with pytest.raises(InvalidProblem, match="no failing case"):
        write_test(diagnose("cpu", "tiny"), "test_x.py", "cpu")
