"""The short list of a fleet on one card: figures, bits that hash alike, and results that are wrong."""

from __future__ import annotations

import pytest
import torch

from flashcore import backends
from flashcore.backends import with_methods
from flashcore.decision import fleet
from flashcore.measure import cards, ceilings
from flashcore.problem import square

SMALL = square(1, 2, 64, 64, dtype="float32")


@pytest.fixture
def quick(monkeypatch):
    """The list of a CPU without the plain kernels, which take a second."""
    found = [{"name": "copy_bandwidth", "value": 20.123456, "unit": "GB/s"},
             {"name": "launch_overhead", "value": 3.0, "unit": "us"}]  # fmt: skip
    monkeypatch.setattr(ceilings, "_cpu", lambda: found)
    monkeypatch.setattr(cards.device, "has_gpu", lambda: False)
    monkeypatch.setattr(ceilings, "has_gpu", lambda: False)


def test_a_cpu_gets_the_same_list_and_says_that_it_is_one(quick):
    [trial] = cards.measured()
    assert (trial.kind, trial.status) == ("fleet", "ok") and trial.data["cpu"] is True
    assert trial.data["figures"]["copy_bandwidth"] == {"value": 20.123, "unit": "GB/s"}
    assert trial.data["figures"]["attention"]["unit"] == "TFLOPS" and "launch_overhead" not in trial.data["figures"]
    assert list(trial.data["bits"]) == ["cpu", "sdpa-math"] and all(len(b) == 1 for b in trial.data["bits"].values())
    assert trial.data["load"] == {} and trial.data["wrong"] == []
    assert fleet.judge([trial]).ok


def test_equal_results_have_equal_bits_and_one_bit_more_is_seen(monkeypatch):
    one = backends.get("cpu")
    plain = cards._bits(one, SMALL, "cpu")
    assert plain == cards._bits(one, SMALL, "cpu") and len(plain) == 1

    def flipped(self, q, k, v, problem):
        out, lse = type(one).run(one, q, k, v, problem)
        out[0, 0, 0, 0] = torch.nextafter(out[0, 0, 0, 0], torch.tensor(9.0))
        return out, lse

    assert cards._bits(with_methods(one, {"run": flipped}), SMALL, "cpu") != plain


def test_a_backend_whose_bits_change_is_seen():
    one, calls = backends.get("cpu"), []

    def drifting(self, q, k, v, problem):
        calls.append(1)
        out, lse = type(one).run(one, q, k, v, problem)
        return out + len(calls), lse

    assert len(cards._bits(with_methods(one, {"run": drifting}), SMALL, "cpu")) == cards.REPEATS


def test_a_wrong_result_and_a_call_that_cannot_be_timed_fail_the_card(quick, monkeypatch):
    one = backends.get("cpu")

    def wrong(self, q, k, v, problem):
        out, lse = type(one).run(one, q, k, v, problem)
        return out + 1.0, lse

    def lost(*_):
        raise RuntimeError("out of memory")

    planted = with_methods(one, {"run": wrong})
    monkeypatch.setattr(cards.backends, "get", lambda name: planted if name == "cpu" else one)
    monkeypatch.setattr(cards, "_timed", lost)
    [trial] = cards.measured()
    assert trial.status == "failed" and "attention" not in trial.data["figures"]
    assert trial.data["wrong"][0] == "cpu was not timed: out of memory"
    assert trial.data["wrong"][1].startswith("cpu: out: ")
    assert len(fleet.judge([trial]).off) == 1


@pytest.mark.gpu
def test_a_real_card_gets_all_figures_and_stable_bits():
    [trial] = cards.measured()
    assert trial.status == "ok", trial.reason
    assert set(fleet.FIGURES) - {"matmul_fp32"} <= set(trial.data["figures"])
    assert trial.data["load"]["sm_clock_mhz"] > 500 and trial.data["load"]["power_w"] > 100
    assert {len(bits) for bits in trial.data["bits"].values()} == {1} and "hopper" in trial.data["bits"]
