"""Backend `fa3`: both forms of FlashAttention-3's interface, and what is said without it."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from flashcore import backends
from flashcore.backends import fa3
from flashcore.errors import Unsupported
from flashcore.numerics.inputs import make_inputs, make_masks
from flashcore.ops import problem_of
from flashcore.problem import Problem, square

UNEQUAL = Problem(batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=50, head_dim=24, causal=True)


def test_fa3_without_its_module_says_so():
    backend = backends.get("fa3")
    try:
        import flash_attn_interface  # noqa: F401
    except ImportError:
        assert not backend.availability().ok and "flash_attn_interface" in backend.availability().reason


@pytest.mark.parametrize("newer", [True, False])
def test_fa3_calls_both_forms_of_its_interface(monkeypatch, newer):
    """A stand-in for FlashAttention-3 that takes [B, S, H, D], as it does, and returns `lse` as each release does."""
    from flashcore.backends import fa3

    def compute(q, k, v, softmax_scale, causal):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        problem = problem_of(q, k, v, causal, softmax_scale)
        out, lse = backends.get("cpu").run(q, k, v, problem)
        return out.transpose(1, 2), lse

    def newer_form(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
        out, lse = compute(q, k, v, softmax_scale, causal)
        return (out, lse) if return_attn_probs else out

    def older_form(q, k, v, softmax_scale=None, causal=False):
        return compute(q, k, v, softmax_scale, causal)

    module = types.SimpleNamespace(flash_attn_func=newer_form if newer else older_form)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    fa3._interface.cache_clear()
    problem = UNEQUAL.with_(seqlen_q=20)
    inputs = make_inputs(problem)
    out, lse = backends.get("fa3").run(*inputs, problem)
    fa3._interface.cache_clear()
    expected, expected_lse = backends.get("cpu").run(*inputs, problem)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.fixture
def installed(monkeypatch):
    """FlashAttention-3 is there; gives what it was called with, and returns `out` alone, as one release did."""
    calls = []

    def flash(q, k, v, softmax_scale=None, causal=False):
        calls.append({"shapes": [tuple(t.shape) for t in (q, k, v)], "scale": softmax_scale, "causal": causal})
        return q

    module = types.SimpleNamespace(flash_attn_func=flash, __spec__=types.SimpleNamespace(name="flash_attn_interface"))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    fa3._interface.cache_clear()
    fa3._left_out.cache_clear()
    yield calls
    fa3._interface.cache_clear()


def test_it_needs_a_hopper_gpu(monkeypatch, installed):
    backend = backends.get("fa3")
    for available, capability, ok in ((False, None, False), (True, (8, 0), False), (True, (9, 0), True),
                                      (True, (10, 0), False)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        state = backend.availability()
        assert state.ok == ok
        assert ok or (state.reason, state.fix) == ("FlashAttention-3 needs a Hopper GPU", "run on an H100 or H200")


def test_heads_go_in_after_rows_and_come_out_before_them(installed):
    problem = UNEQUAL.with_(softmax_scale=0.3)
    q, k, v = make_inputs(problem)
    out, lse = backends.get("fa3").run(q, k, v, problem)
    assert installed == [
        {"shapes": [(1, 70, 4, 24), (1, 50, 2, 24), (1, 50, 2, 24)], "scale": 0.3, "causal": True}
    ]  # fmt: skip
    assert torch.equal(out, q) and lse is None, "a release that gives no lse has none"


def test_what_it_does_not_take():
    backend = backends.get("fa3")
    for head_dim, takes in ((8, True), (64, True), (256, True), (20, False), (264, False)):
        reason = backend.why_not(square(1, 1, 8, head_dim))
        assert reason is None if takes else reason == (
            "FlashAttention-3 takes a head_dim that is a multiple of 8, up to 256"
        )  # fmt: skip
    assert backend.why_not(square(1, 1, 8, 20, dtype="float32")).startswith("dtype float32")
    assert backend.why_not(UNEQUAL) is None, "its causal mask is bottom right, so lengths may differ"


@pytest.fixture
def wheel(monkeypatch):
    """The wheel `fa3-fwd`: the module under its own name, and beside it what the build left out."""
    flags = {"FLASHATTENTION_DISABLE_FP16": True, "FLASHATTENTION_DISABLE_FP8": False,
             "FLASHATTENTION_DISABLE_HDIM256": True, "FLASHATTENTION_ENABLE_VCOLMAJOR": False}  # fmt: skip
    module = types.SimpleNamespace(flash_attn_func=lambda q, k, v, softmax_scale, causal: (q, None), __spec__=None)
    monkeypatch.setattr(fa3, "MODULES", fa3.MODULES[1:])
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", module)
    config = types.SimpleNamespace(CONFIG={"build_flags": flags}, __spec__=None)
    monkeypatch.setitem(sys.modules, "fa3_fwd_config", config)
    fa3._interface.cache_clear()
    fa3._left_out.cache_clear()
    yield config
    fa3._interface.cache_clear()
    fa3._left_out.cache_clear()


def test_the_wheel_is_found_under_its_own_name_and_says_what_it_was_built_without(monkeypatch, wheel):
    backend = backends.get("fa3")
    monkeypatch.setattr(fa3, "version_of", lambda names: "0.0.3" if names == ("fa3-fwd",) else None)
    assert backend.software() == "fa3-fwd 0.0.3"
    assert backend.why_not(square(1, 1, 8, 64)) == "this build of FlashAttention-3 has no kernels for float16"
    for head_dim, takes in ((64, True), (128, True), (192, True), (200, False), (256, False)):
        reason = backend.why_not(square(1, 1, 8, head_dim, dtype="bfloat16"))
        assert reason == (None if takes else f"this build of FlashAttention-3 has no kernels for head_dim {head_dim}")
    problem = UNEQUAL.with_(dtype="bfloat16")
    q, k, v = make_inputs(problem)
    assert torch.equal(backend.run(q, k, v, problem)[0], q)


def test_a_window_is_said_in_its_words_where_the_build_has_kernels_for_it(monkeypatch, wheel):
    told = []

    def function(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
        told.append((causal, window_size))
        return torch.ones_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    monkeypatch.setattr(sys.modules["fa3_fwd_interface"], "flash_attn_func", function)
    fa3._interface.cache_clear()
    problem = UNEQUAL.with_(dtype="bfloat16", causal=False, window_left=5, seqlen_q=60)
    backend = backends.get("fa3")
    assert backend.why_not(problem) is None
    backend.run(*make_inputs(problem), problem)
    causal = problem.with_(causal=True)
    out, lse = backend.run(*make_inputs(causal), causal)
    assert told == [(False, (5, -1)), (True, (5, 0))]
    empty = causal.seqlen_q - causal.seqlen_k
    assert empty > 0 and not out[:, :, :empty].any() and bool((lse[:, :, :empty] == -math.inf).all())
    assert bool((out[:, :, empty:] == 1).all())
    wheel.CONFIG["build_flags"]["FLASHATTENTION_DISABLE_LOCAL"] = True
    fa3._left_out.cache_clear()
    assert backend.why_not(problem) == "this build of FlashAttention-3 has no kernels for windows"
    assert backend.why_not(problem.with_(window_left=-1)) is None


def test_a_softcap_and_a_ragged_batch_are_said_in_its_words_where_the_build_has_kernels_for_them(monkeypatch, wheel):
    problem = UNEQUAL.with_(dtype="bfloat16", batch=3, softcap=30.0, lengths="ragged")
    masks = make_masks(problem, lengths="uniform")
    q, k, v = make_inputs(problem, masks=masks, spare=0)
    told = []

    def function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, softcap):
        told.append((tuple(q.shape), tuple(k.shape), max_seqlen_q, max_seqlen_k, causal, softcap))
        assert cu_seqlens_q is masks.cu_seqlens_q and cu_seqlens_k is masks.cu_seqlens_k
        return q, torch.zeros(q.shape[1], q.shape[0])

    backend, module = backends.get("fa3"), sys.modules["fa3_fwd_interface"]
    with pytest.raises(Unsupported, match="no function for ragged batches"):
        backend.run(q, k, v, problem, masks=masks)
    module.flash_attn_varlen_func = function
    fa3._ragged.cache_clear()
    assert backend.why_not(problem) is None
    out, lse = backend.run(q, k, v, problem, masks=masks)
    rows, keys = (int(places[-1]) for places in (masks.cu_seqlens_q, masks.cu_seqlens_k))
    assert told == [((rows, 4, 24), (keys, 2, 24), 70, 50, True, 30.0)]
    assert torch.equal(out, q) and lse is None, "its lse is not given on"
    for flag, words in (("VARLEN", "ragged batches"), ("SOFTCAP", "softcaps")):
        wheel.CONFIG["build_flags"] = {f"FLASHATTENTION_DISABLE_{flag}": True}
        fa3._left_out.cache_clear()
        assert backend.why_not(problem) == f"this build of FlashAttention-3 has no kernels for {words}"
        assert backend.why_not(UNEQUAL.with_(dtype="bfloat16")) is None
    fa3._ragged.cache_clear()


def test_what_the_package_itself_refuses_is_unsupported_and_any_other_error_stays_one(monkeypatch, wheel):
    said = ["This flash attention build does not support local attention.\nException raised from mha_fwd", "a fault"]

    def function(q, k, v, softmax_scale, causal, window_size):
        raise RuntimeError(said.pop(0))

    monkeypatch.setattr(sys.modules["fa3_fwd_interface"], "flash_attn_func", function)
    fa3._interface.cache_clear()
    problem = UNEQUAL.with_(dtype="bfloat16", window_left=5)
    with pytest.raises(Unsupported, match="the package says: This flash attention build does not support local"):
        backends.get("fa3").run(*make_inputs(problem), problem)
    with pytest.raises(RuntimeError, match="a fault"):
        backends.get("fa3").run(*make_inputs(problem), problem)


@pytest.mark.parametrize("config", [{"build_flags": None}, {}, None])
def test_a_build_that_does_not_say_what_it_lacks_is_taken_at_its_word(wheel, config):
    wheel.CONFIG = config
    fa3._left_out.cache_clear()
    assert backends.get("fa3").why_not(square(1, 1, 8, 64)) is None


def test_without_a_module_there_is_no_version(monkeypatch):
    monkeypatch.setattr(fa3, "MODULES", ("no_such_module_xyz",))
    assert backends.get("fa3").software() is None
    state = backends.get("fa3").availability()
    assert not state.ok and "flashcore[peers]" in state.fix
