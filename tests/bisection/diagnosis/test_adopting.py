"""A function adopted as a backend is checked and timed as any other, and says what it does not take."""

from __future__ import annotations

import pytest
import torch

from flashcore import backends
from flashcore.backends import _registry
from flashcore.bisection.diagnosis import adopt, write_plugin
from flashcore.bisection.diagnosis.adopting import id_of
from flashcore.errors import FlashCoreError, InvalidProblem, UnknownName
from flashcore.measure.check import check_attention
from flashcore.problem import parse_problem

KERNEL = """
import torch

def _attend(q, k, v, factor):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).float() for t in (k, v))
    return (torch.softmax(q.float() @ k.mT * factor / q.shape[-1] ** 0.5, -1) @ v).to(q.dtype)

def mine(q, k, v):
    if q.dtype == torch.bfloat16:
        raise TypeError("no bfloat16")
    return _attend(q, k, v, 1.0)

def Mine_Wrong(q, k, v):
    return _attend(q, k, v, 2.0)

def turned(q, k, v):
    return _attend(*(t.transpose(1, 2) for t in (q, k, v)), 1.0).transpose(1, 2)
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    backends.all_backends()
    monkeypatch.setattr(_registry, "_REGISTRY", dict(_registry._REGISTRY))
    path = tmp_path / "kernel.py"
    path.write_text(KERNEL)
    return path


def test_a_right_function_passes_and_a_wrong_one_fails(file):
    problem = parse_problem("B=1,H=4,Hkv=2,S=70,D=32")
    right, wrong = adopt(f"{file}:mine"), adopt(f"{file}:Mine_Wrong")
    assert (right.id, wrong.id, right.role) == ("mine", "mine-wrong", "ours")
    assert check_attention("mine", problem, device="cpu").status == "ok"
    failed = check_attention("mine-wrong", problem, device="cpu")
    assert failed.status == "failed" and failed.correctness.num_bad > 100


def test_what_it_does_not_take_is_said(file):
    backend = adopt(f"{file}:mine")
    assert backend.why_not(parse_problem("B=1,H=1,S=8,D=8,causal")) == "its signature takes no causal"
    assert backend.why_not(parse_problem("B=1,H=1,S=8,D=8,scale=2")) == "its signature takes no softmax_scale"
    trial = check_attention("mine", parse_problem("B=1,H=1,S=8,D=8,bf16"), device="cpu")
    assert trial.status == "unsupported" and "it raised TypeError: no bfloat16" in trial.reason


def test_the_layout_is_kept(file):
    backend = adopt(f"{file}:turned", layout="bshd")
    problem = parse_problem("B=2,H=2,S=40,D=16,float32")
    q, k, v = torch.randn(3, 2, 2, 40, 16)
    out, lse = backend.run(q, k, v, problem)
    assert out.is_contiguous() and lse is None
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5)


def test_a_plug_in_adopts_it_in_another_process(file, tmp_path):
    folder = tmp_path / "plugins"
    folder.mkdir()
    assert write_plugin(folder, f"{file}:mine") == "mine"
    (written,) = folder.glob("*.py")
    exec(compile(written.read_text(), str(written), "exec"), {})
    assert backends.get("mine").title == "mine, a function from kernel.py"


def test_bad_names_are_said_before_anything_is_measured(file, tmp_path):
    with pytest.raises(InvalidProblem, match="is not FILE.py:function"):
        adopt("hopper")
    with pytest.raises(UnknownName, match="function in"):
        write_plugin(tmp_path, f"{file}:none")
    with pytest.raises(FlashCoreError, match="Two backends are called 'cpu'"):
        adopt(f"{file}:mine", backend_id="cpu")
    assert id_of("a/b.py:Box.Run_2") == "box-run-2" and id_of("m:_") == "function"
