"""`examples/triton_attention.py`: it loads without Triton, is right on a GPU, and an edited line of it is named."""

from __future__ import annotations

import ast
import sys

import pytest
import torch

import flashcore
from flashcore.bisection.diagnosis import diagnose, load
from flashcore.paths import HOME

FILE = HOME / "examples" / "triton_attention.py"
if not FILE.is_file():
    pytest.skip("this test reads the checkout, and FlashCore runs from an install here", allow_module_level=True)

SCALE = "        scores = scores * scale\n"
"""The line that the edited version lacks."""


def test_it_parses_and_says_how_to_diagnose_it():
    said = ast.get_docstring(ast.parse(FILE.read_text()))
    assert "flashcore diagnose examples/triton_attention.py:attention" in said
    assert FILE.read_text().count(SCALE) == 1


def test_without_triton_it_loads_and_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it then fails
    attention = load(f"{FILE}:attention")
    q = torch.zeros(1, 1, 2, 16)
    with pytest.raises(RuntimeError, match="Triton is not installed: pip install triton"):
        attention(q, q, q)
    found = diagnose(attention, "B=1,H=1,S=8,D=16", device="cpu")
    assert not found.right and "pip install triton" in found.headline()


@pytest.mark.gpu
def test_it_is_right_and_without_the_scale_that_is_named(tmp_path):
    pytest.importorskip("triton")
    found = flashcore.diagnose(f"{FILE}:attention", lse="natural")
    assert found.right, str(found)
    edited = tmp_path / FILE.name
    edited.write_text(FILE.read_text())
    problem = "B=2,H=4,Hkv=2,S=200,D=64,causal"
    assert flashcore.diagnose(f"{edited}:attention", problem).right
    edited.write_text(FILE.read_text().replace(SCALE, ""))
    found = flashcore.diagnose(f"{edited}:attention", problem)
    assert "scale missing" in [h.name for h in found.hypotheses], str(found)
    assert found.stage == "scores"
