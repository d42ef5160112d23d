"""FlashAttention of others: who is found, what it is told, and that torch's own knows the arguments."""

from __future__ import annotations

import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashcore.backends.others import flash
from flashcore.backends.others.masked import Masking


@pytest.mark.slow
def test_torchs_own_knows_the_arguments_by_its_description_of_what_comes_out():
    masking = Masking(window_left=3, window_right=2)
    with FakeTensorMode():
        q, k = (torch.empty(2, rows, 8, 96, dtype=torch.bfloat16, device="cuda") for rows in (100, 300))
        out, lse = flash.in_torch(q, k, k, masking, None)
        assert out.shape == q.shape and lse.shape == (2, 8, 100)
        q, bounds = torch.empty(30, 8, 64, dtype=torch.float16, device="cuda"), torch.empty(4, device="cuda")
        out, lse = flash.in_torch(q, q, q, Masking(causal=True), 0.1, (bounds, bounds, 20, 20))
        assert out.shape == q.shape and lse.shape == (8, 30)


def test_packages_that_are_not_there_or_too_new_are_passed_over(monkeypatch):
    flash.functions.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: name)
    modules = {"flash_attn": types.SimpleNamespace(flash_attn_func=lambda q, k, v, causal=False: None)}

    def load(name):
        if name not in modules:
            raise ImportError("built for another torch")
        return modules[name]

    monkeypatch.setattr(flash.importlib, "import_module", load)
    ((_, dtypes, parameters),) = flash.functions("flash_attn_func", 0)
    assert dtypes == flash.HALVES and "causal" in parameters
    assert flash.functions("flash_attn_varlen_func", 0) == ()
    flash.functions.cache_clear()
