"""Backend `flashinfer`: called as FlashInfer wants it, with a stand-in for it, and what is said without it."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from flashcore import backends
from flashcore.backends import flashinfer
from flashcore.numerics.inputs import make_inputs
from flashcore.ops import problem_of
from flashcore.problem import Problem, square

PROBLEM = Problem(batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=20, seqlen_k=50, head_dim=64, causal=True)


def prefill(q, k, v, causal=False, kv_layout="HND", sm_scale=None, return_lse=False):
    """What it computes: [rows, heads, head_dim] in and out; `lse` as [rows, heads], to the base of 2."""
    assert kv_layout == "NHD" and q.shape == (20, 4, 64) and k.shape == v.shape == (50, 2, 64)
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    out, lse = backends.get("cpu").run(q, k, v, problem_of(q, k, v, causal, sm_scale))
    out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1) / math.log(2)
    return (out, lse) if return_lse else out


@pytest.fixture
def there(monkeypatch):
    module = types.SimpleNamespace(single_prefill_with_kv_cache=prefill, __spec__=None)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    flashinfer._prefill.cache_clear()
    yield module
    flashinfer._prefill.cache_clear()


def test_rows_go_in_before_heads_and_come_out_after_them(there):
    inputs = make_inputs(PROBLEM)
    backend = backends.get("flashinfer")
    expected, expected_lse = backends.get("cpu").run(*inputs, PROBLEM)
    out, lse = backend.run(*inputs, PROBLEM)
    assert torch.equal(out, expected) and lse is None
    out, lse = backend.run_with_lse(*inputs, PROBLEM)
    assert torch.equal(out, expected) and lse.is_contiguous()
    assert torch.allclose(lse, expected_lse, rtol=1e-6), "the natural log, and not that to the base of 2"


def test_nothing_is_copied_that_it_can_read(there):
    q, k, v = make_inputs(PROBLEM)
    seen = {}
    there.single_prefill_with_kv_cache = lambda q, k, v, **more: seen.update(q=q, k=k, v=v) or q
    flashinfer._prefill.cache_clear()
    backends.get("flashinfer").run(q, k, v, PROBLEM)
    assert [seen[n].data_ptr() for n in "qkv"] == [t.data_ptr() for t in (q, k, v)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None), ({"dtype": "bfloat16", "head_dim": 128}, None), ({"seqlen_q": 50}, None),
        ({"batch": 2}, "its batches are rows"), ({"seqlen_q": 51}, "no more queries than keys"),
        ({"seqlen_q": 51, "causal": False}, None), ({"head_dim": 96}, "head_dim 96 is not among"),
        ({"dtype": "float32"}, "dtype float32"),
    ],
)  # fmt: skip
def test_what_it_takes(changes, reason):
    found = backends.get("flashinfer").why_not(PROBLEM.with_(**changes))
    assert found is None if reason is None else reason in found


def test_what_is_missing_is_named_with_what_mends_it(monkeypatch, tmp_path):
    backend, there = backends.get("flashinfer"), set()
    monkeypatch.setattr(flashinfer, "installed", lambda names: next((n for n in names if n in there), None))
    monkeypatch.setattr(flashinfer, "version_of", lambda names: "0.7.2" if names == ("flashinfer-python",) else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not backend.availability().ok and backend.software() is None
    there.add("flashinfer")
    state = backend.availability()
    assert not state.ok and "nvcc" in state.reason and "flashinfer-jit-cache" in state.fix
    there.add("flashinfer_jit_cache")
    monkeypatch.setitem(sys.modules, "flashinfer", types.SimpleNamespace(single_prefill_with_kv_cache=prefill))
    assert backend.availability().ok and backend.software() == "flashinfer-python 0.7.2"
    there.remove("flashinfer_jit_cache")
    (tmp_path / "bin").mkdir()
    for path in (tmp_path / "bin" / "nvcc", tmp_path / "ninja"):
        path.write_text("")
        path.chmod(0o755)
    assert backend.availability().ok
    assert backend.why_not(square(1, 2, 8, 64)) is None
