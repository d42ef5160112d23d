"""What breaks the promise of the batch-invariant mode is found by who compares bits, and honest backends keep it."""

from __future__ import annotations

import pytest

from flashcore import backends
from flashcore.bisection.faults import breaking
from flashcore.bisection.faults.planting import Override
from flashcore.bisection.faults.plants.invariance import BREAKS, Break
from flashcore.errors import UnknownName
from flashcore.records import Trial
from flashcore.surveys.invariance import measuring

IN_CPU = [one.id for one in BREAKS if "cpu" in one.plants]
ON_GPU = [(one.id, host) for one in BREAKS for host in one.plants if host != "cpu"]


def planted(**methods) -> Break:
    return Break("mine", "what a test breaks", {"cpu": Override(methods)})


@pytest.mark.slow
def test_what_is_planted_in_the_cpu_backend_is_found_among_the_quick_cases():
    trials = list(breaking.prove_breaks(["cpu"], num_cases=60))
    assert [trial.variant for trial in trials] == IN_CPU and 60 < measuring.CASES["quick"]["cpu"]
    for trial in trials:
        assert (trial.kind, trial.status, trial.data["outcome"], trial.reason) == ("fault", "ok", "found", None)
        assert trial.data["cases"] == 60 and trial.data["broken"] > 0 and trial.data["found_stage"] == "bits"
        assert sum(count - kept for kept, count in trial.data["pairs"].values()) == trial.data["broken"]
        assert trial.source_hash == backends.get("cpu").source_hash()


def test_no_bug_is_found_where_none_was_planted(monkeypatch):
    """So that a search that finds something whatever it is given proves nothing."""
    monkeypatch.setattr(breaking, "BREAKS", (planted(title="the same"),))
    (trial,) = breaking.prove_breaks(num_cases=40)
    assert (trial.status, trial.data["outcome"], trial.data["broken"]) == ("failed", "missed", 0)
    assert trial.reason == "mine has to break bits, and all of 40 cases were kept"


def test_what_cannot_be_planted_is_a_record(monkeypatch):
    def raises(self, scores, row_max):
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr(breaking, "BREAKS", (planted(row_max=raises), planted(no_such_method=None)))
    first, second = breaking.prove_breaks(num_cases=5)
    assert (first.status, first.data["outcome"]) == ("error", "not planted") and "no such luck" in first.reason
    assert second.data["outcome"] == "not planted" and second.reason.startswith("FaultError: A planted fault overrides")


def test_who_is_chosen_has_bugs_and_who_cannot_run_says_so():
    with pytest.raises(UnknownName, match=r"backend with a planted break 'hoper'.*cpu.*Did you mean 'hopper'"):
        breaking.prove_breaks(["cpu", "hoper"])
    if backends.get("hopper").availability().ok:
        return
    trials: list[Trial] = []
    told: list[str] = []
    trials += breaking.prove_breaks(["hopper", "decode"], progress=told.append)
    assert [(t.variant, t.backend) for t in trials] == ON_GPU and len(told) == len(ON_GPU)
    assert {(t.status, t.data["outcome"]) for t in trials} == {("unavailable", "not run")}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "host"), ON_GPU)
def test_what_is_planted_in_a_kernel_is_found_among_the_quick_cases(name, host, monkeypatch):
    monkeypatch.setattr(breaking, "BREAKS", [one for one in BREAKS if one.id == name])
    (trial,) = breaking.prove_breaks([host])
    assert (trial.status, trial.data["outcome"]) == ("ok", "found"), trial.reason
    assert trial.data["cases"] <= measuring.CASES["quick"]["cuda"]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["hopper", "decode", "hopper-paged"])
def test_honest_kernels_keep_all_quick_cases(name):
    """`hopper` with both kernels over pages beside it, and each of these alone."""
    trial = measuring.measure(name, "invariant", num_cases=measuring.CASES["quick"]["cuda"])
    assert trial.status == "ok" and trial.data["broken"] == 0, trial.data["breaks"]
    assert trial.data["cases"] == measuring.CASES["quick"]["cuda"], trial.data["stopped"]
