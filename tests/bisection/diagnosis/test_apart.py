"""In a process of its own a crash is a finding, and a wrong question is the same error as here."""

from __future__ import annotations

import pytest

from flashcore.bisection.diagnosis import diagnose_apart
from flashcore.errors import OutOfTime, UnknownName

FUNCTIONS = """
import os
import torch

def sleeps(q, k, v):
    import time
    time.sleep(9)

def dies(q, k, v):
    os._exit(7)

def wrong(q, k, v):
    return (torch.softmax(q.float() @ k.float().mT, -1) @ v.float()).to(q.dtype)
"""


@pytest.mark.slow
def test_a_crash_is_a_finding_and_a_finding_comes_back(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    found = diagnose_apart(f"{file}:dies", device="cpu")
    assert not found.right and "took its process with it" in found.headline() and "exit code 7" in found.headline()
    assert found.to_trial().status == "failed"
    found = diagnose_apart(f"{file}:wrong", "B=1,H=1,S=40,D=16", device="cpu")
    assert not found.right and found.screened[0].answer is None and found.seconds > 0
    with pytest.raises(OutOfTime, match="sleeps did not end within the 1 s that were left"):
        diagnose_apart(f"{file}:sleeps", device="cpu", within_s=0.6)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_function_that_is_not_there_is_the_error_that_it_is_here(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    with pytest.raises(UnknownName, match="function in"):
        diagnose_apart(f"{tmp_path / 'mine.py'}:none", device="cpu")
