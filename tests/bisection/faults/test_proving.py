"""The matrix of faults and the clean runs as records: every outcome has its word, its status and its place."""

from __future__ import annotations

import copy
import os
import signal

import pytest

from flashcore import backends, tables
from flashcore.backends import AVAILABLE, Availability
from flashcore.backends.cpu import CpuBackend
from flashcore.bisection.faults import proving
from flashcore.bisection.faults.catalogue import get
from flashcore.bisection.faults.planting import Fault, Override, Source
from flashcore.errors import CublasLtError
from flashcore.numerics.inputs import make_inputs
from flashcore.paging import PAGE_SIZES, TopK
from flashcore.paging.stability import SelectionFinding
from flashcore.records import Trial

CPU = backends.get("cpu")


@pytest.fixture
def catalogue(monkeypatch):
    """Put faults of the test's own beside the catalogue's."""

    def put(*more: Fault) -> tuple[Fault, ...]:
        named = {f.id: f for f in more}
        monkeypatch.setattr(proving, "get", lambda name: named.get(name) or get(name))
        return more

    return put


def one(trials: list[Trial], name: str) -> Trial:
    return next(t for t in trials if t.variant == name)


def test_each_outcome_has_its_word_and_status(run, catalogue):
    chosen = catalogue(
        get("F8"), get("F10"), get("F16"), get("G7"), get("F4"),
        Fault("X1", "nothing", "probs", "right", {"cpu": Override({})}),
        Fault("X2", "elsewhere", "lse", "wrong", dict(get("G6").plants)),
        Fault("X3", "gone", "scores", "wrong", {"cpu": Override({"no_such": lambda self: None})}),
        Fault("X4", "raises", "scores", "nothing", {"cpu": Override({"scores": lambda self, *_: 1 / 0})}),
    )  # fmt: skip
    said = []
    trials = proving.run_faults(run, [CPU], faults=chosen, progress=said.append)
    assert {t.variant: (t.data["outcome"], t.status) for t in trials} == {
        "F8": ("found", "ok"), "F10": ("not applicable", "unsupported"), "F16": ("not applicable", "unsupported"),
        "G7": ("not applicable", "unsupported"), "F4": ("not applicable", "unsupported"), "X1": ("missed", "failed"),
        "X2": ("found elsewhere", "failed"), "X3": ("not planted", "error"), "X4": ("not planted", "error"),
    }  # fmt: skip
    kept = [t.model_dump_json() for t in run.trials(kind="fault")]
    assert kept == [t.model_dump_json() for t in trials] and len(said) == 5
    found = one(trials, "F8").data
    assert found["found_stage"] == found["expected_stage"] == "scores" and found["producers"][0] == "scores"
    assert found["output_finite"] is found["check_passed"] is True and found["first_bad"]["column"] == 16
    assert one(trials, "X2").data["found_stage"] == "scores" and "ZeroDivisionError" in one(trials, "X4").reason
    assert one(trials, "F16").backend is None
    assert one(trials, "F4").backend == "cpu" and one(trials, "F4").reason == "makes no sense in cpu"
    assert one(trials, "F16").reason.startswith("no bug of a backend: ")


def test_a_bug_of_the_page_selection_is_of_no_backend_and_runs_once(monkeypatch):
    fault = get("F13")
    assert fault.found_by == "selection" and list(fault.plants) == ["page_selection"]
    two = [CPU, backends.get("reference")]
    absent = Availability(False, "this GPU has another compute capability", "run on an H100 or H200")
    monkeypatch.setattr(proving.CudaBackend, "availability", lambda self: absent)
    [trial] = proving.run_faults(None, two, faults=[fault])
    assert (trial.backend, trial.status, trial.data["outcome"]) == ("page_selection", "unavailable", "not run")
    assert trial.reason == absent.reason and trial.source_hash and trial.problem == fault.problem
    assert "page_selection: not run" in tables.faults_sentence([trial])

    asked = []

    def check_selection(policy, q, cache):
        asked.append((policy, q.shape[2], cache.max_pages))
        return SelectionFinding(20, repeats, (0, 1, 2) if repeats else None, None)

    monkeypatch.setattr(proving, "check_selection", check_selection)
    monkeypatch.setattr(proving.CudaBackend, "availability", lambda self: AVAILABLE)
    monkeypatch.setattr(proving, "make_inputs", lambda problem, **_: make_inputs(problem))
    for differing, outcome, status in ((7, "found", "ok"), (0, "missed", "failed")):
        repeats = differing
        [trial] = proving.run_faults(None, two, faults=[fault])
        assert (trial.backend, trial.data["outcome"], trial.status) == ("page_selection", outcome, status)
        assert trial.data["expected_stage"] == "page table" and trial.data["fault"] == trial.variant == "F13"
        assert trial.data["found_by"] == "selection"
        assert ("KV head 1, place 2" in trial.data["finding"]) == (status == "ok")
    policy, tokens, pages = asked[0]
    assert policy.source != TopK.source and (tokens, pages) == (1, 256) and TopK.source is None


def refuse(stage: str | None):
    """A stage that raises a typed error, as a status code of a library does; it carries `stage`."""

    def scores(self, *_):
        error = CublasLtError("cublasLtMatmul", "CUBLAS_STATUS_INVALID_VALUE", "m=100,n=20,k=64")
        if stage:
            error.stage = stage
        raise error

    return {"cpu": Override({"scores": scores})}


@pytest.mark.parametrize(
    ("fault", "outcome", "status", "stage"),
    [
        (Fault("X6", "refused", "scores", "code", refuse("scores"), error_is_found=True), "found", "ok", "scores"),
        (Fault("X7", "elsewhere", "scores", "code", refuse("accum"), error_is_found=True), "found elsewhere", "failed",
         "accum"),
        (Fault("X8", "nowhere", "scores", "code", refuse(None), error_is_found=True), "not planted", "error", None),
        (Fault("X9", "no finding", "scores", "code", refuse("scores")), "not planted", "error", None),
    ],
    ids=lambda value: getattr(value, "id", ""),
)  # fmt: skip
def test_a_typed_error_is_a_finding_only_where_the_bug_says_so_and_at_the_stage_it_carries(
    catalogue, fault, outcome, status, stage
):
    catalogue(fault)
    [trial] = proving.run_faults(None, [CPU], faults=[fault])
    assert (trial.data["outcome"], trial.status, trial.data["found_stage"]) == (outcome, status, stage)
    [close] = proving.bisect_planted(fault, "cpu")
    if stage:
        assert "CUBLAS_STATUS_INVALID_VALUE" in trial.data["finding"] and trial.data["error"] == "CublasLtError"
        assert close.status == "failed" and close.data["producers"] == [stage] and "m=100" in close.reason
    else:
        assert close.status == "error" and "m=100" in close.reason and "m=100" in trial.reason


def test_a_wrong_label_is_found_by_the_labels_alone(catalogue, monkeypatch):
    [fault] = catalogue(Fault("X10", "label", "survey", "unlike the kernel", {"cpu": Override({})}, found_by="labels"))
    asked = []

    def wrong_labels(planted, problem):
        asked.append((type(planted).__name__, problem))
        return said

    monkeypatch.setattr(proving, "wrong_labels", wrong_labels)
    said = ["m=1: the survey saw a for this algorithm, and b ran"]
    [trial] = proving.run_faults(None, [CPU], faults=[fault])
    assert (trial.data["outcome"], trial.status, trial.data["found_stage"]) == ("found", "ok", "survey")
    assert trial.data["finding"] == said[0] and asked == [("Planted", fault.problem)]
    bisection, labels = proving.bisect_planted(fault, "cpu")
    assert bisection.status == "ok", "every stage of such a backend is right"
    assert labels.status == "failed" and labels.reason == said[0] and labels.variant == "planted-X10-labels"
    said = []
    [trial] = proving.run_faults(None, [CPU], faults=[fault])
    assert (trial.data["outcome"], trial.status) == ("missed", "failed")
    assert [t.status for t in proving.bisect_planted(fault, "cpu")] == ["ok", "ok"]


def test_a_nan_fools_no_check():
    [trial] = proving.run_faults(None, [CPU], faults=[get("F3")])
    assert trial.data["output_finite"] is trial.data["check_passed"] is False


class OnAnotherDevice(CpuBackend):
    """The cpu backend, said to run on a GPU, so that its dangerous faults run in a process of their own."""

    id = "cpu"
    device = "cuda"
    role = "ours"

    def availability(self):
        return AVAILABLE


@pytest.mark.slow
def test_a_fault_that_kills_its_process_is_crashed_and_the_rest_goes_on(monkeypatch):
    """For F11 a death is a finding, since it reads out of bounds; for G1 it is not."""
    proved = proving.prove
    monkeypatch.setattr(proving, "prove", crash_or_prove)
    trials = proving.run_faults(None, [OnAnotherDevice()], faults=[get("F11"), get("G1")])
    monkeypatch.setattr(proving, "prove", proved)
    trials += proving.run_faults(None, [CPU], faults=[get("F8")])
    assert [(t.variant, t.data["outcome"], t.status) for t in trials] == [
        ("F11", "crashed", "ok"), ("G1", "crashed", "failed"), ("F8", "found", "ok"),
    ]  # fmt: skip
    assert all("SIGSEGV" in t.reason for t in trials[:2])
    assert "process died" in tables.fault_matrix(trials).set_index("fault").loc["F11", "cpu"]


def crash_or_prove(fault_id, backend_id):
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_backend_that_does_not_work_here_is_not_run():
    absent = Availability(False, "no GPU", "buy one")
    gone = copy.copy(CPU)
    gone.__class__ = type("Gone", (CpuBackend,), {"availability": lambda self: absent})
    [trial] = proving.run_faults(None, [gone], faults=[get("F8")])
    assert (trial.status, trial.data["outcome"]) == ("unavailable", "not run")
    assert trial.reason == "no GPU; to mend it: buy one"
    [clean] = proving.clean_runs(None, [gone])
    assert clean.status == "unavailable" and clean.data["runs"] == 0


@pytest.mark.slow
def test_one_hundred_clean_runs_raise_no_alarm(run):
    [trial] = proving.clean_runs(run, [CPU])
    assert trial.status == "ok" and trial.data["runs"] == 100 and trial.data["alarms"] == 0, trial.reason
    data = trial.data
    assert set(data["dtypes"]) == {"float16", "bfloat16", "float32"} and len(data["patterns"]) == 11
    assert set(data["layouts"]) == {"bhsd", "bshd", "apart"} and data["causal"] > 20 and data["grouped_heads"] > 20
    assert data["values"] > 1_000_000 and data["seeds"] == [0, 99]
    assert (trial.kind, trial.variant) == ("bisection", "clean-runs") and run.trials(kind="bisection") == [trial]


@pytest.mark.slow
def test_an_alarm_is_counted_and_can_be_run_again():
    """A backend that is off by a little at the last key of long rows only: some runs see it, and say which."""

    class Alarming(CpuBackend):
        id = "alarming"

        def scores(self, q, k, problem, page):
            scores = super().scores(q, k, problem, page)
            return scores * 1.001 if problem.seqlen_k > 100 else scores

    [trial] = proving.clean_runs(None, [Alarming()], n=20)
    assert trial.status == "failed" and 0 < trial.data["alarms"] < 20
    first = trial.data["first_alarm"]
    assert "scores goes wrong first" in first["finding"] and first["problem"] in trial.reason
    from flashcore.bisection.bisecting import bisect
    from flashcore.problem import parse_problem

    again = bisect(Alarming(), parse_problem(first["problem"]), seed=first["seed"], pattern=first["pattern"],
                   layout=first["layout"])  # fmt: skip
    assert not again.passed


def test_the_random_problems_are_the_same_again_and_fit_the_kernels():
    cases = list(proving.random_cases(backends.get("wmma"), 60))
    assert cases == list(proving.random_cases(backends.get("wmma"), 60))
    assert {p.head_dim for _, p, _, _ in cases} == {64, 128}
    assert {p.dtype for _, p, _, _ in cases} == {"float16", "bfloat16"}
    assert any(p.causal and p.seqlen_q > p.seqlen_k for _, p, _, _ in cases), "rows without keys have to be among them"


def test_a_backend_that_takes_masks_draws_every_other_problem_under_some():
    problems = [problem for _, problem, _, _ in proving.random_cases(CPU, 120)]
    masked = [problem for problem in problems if problem.masks]
    assert {name for problem in masked for name in problem.masks} == set(CPU.masks)
    assert 30 < len(masked) < 70 and any(len(problem.masks) > 2 for problem in masked)
    assert not any(p.masks for _, p, _, _ in proving.random_cases(backends.get("wmma"), 60))


def test_a_backend_over_pages_draws_problems_of_its_own():
    for name in ("decode", "decode-paired", "hopper-paged", "cublaslt-paged"):
        problems = [problem for _, problem, _, _ in proving.random_cases(backends.get(name), 60)]
        assert {p.page_size for p in problems} == set(PAGE_SIZES), name
        assert {1, 2, 3, 5, 8} <= {p.seqlen_q for p in problems} and any(p.causal for p in problems)
        assert any(p.num_heads_q // p.num_heads_kv * p.seqlen_q > 64 for p in problems), "more than a tile of rows"


def test_a_planted_bug_looked_at_closely_is_no_record_of_the_backend():
    trials = proving.bisect_planted(get("F8"), "cpu", repeat=2)
    assert [t.variant for t in trials] == ["planted-F8-bisection", "planted-F8-determinism"]
    assert [t.status for t in trials] == ["failed", "ok"] and all(t.data["fault"] == "F8" for t in trials)


@pytest.mark.compiler
def test_precompile_leaves_what_does_not_compile_to_the_trial():
    broken = Fault("X5", "no code", "scores", "nothing", {"scalar": Source((("float row_sum = 0.f;", "not code"),))})
    assert proving.precompile([broken, get("F11")], [backends.get("scalar")]) == 2
    pair = backends.select("cublaslt,cublaslt-batched")
    assert proving.precompile([get("G14")], pair) == 2, "two backends of one kernel share what is compiled"


@pytest.mark.gpu
@pytest.mark.slow
def test_clean_runs_of_every_kernel_raise_no_alarm():
    for trial in proving.clean_runs(None, backends.select("all", device="cuda")):
        if trial.status != "unavailable":
            assert trial.status == "ok", trial.reason
