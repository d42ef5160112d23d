"""Records of the survey: compact timings, and ratios of samples of one round."""

from __future__ import annotations

import pytest

from flashcore import backends
from flashcore.backends import Backend
from flashcore.errors import BackendUnavailable, PageTableError, UnknownName, Unsupported
from flashcore.measure.timing import Candidate
from flashcore.problem import square
from flashcore.records import Timing
from flashcore.surveys.paging import trials
from flashcore.surveys.paging.trials import Book, compact, outcome, over, ready, time_calls, worth


def test_ratios_are_of_samples_of_one_round():
    ours = Timing(method="graph_replay", latency_us=2.0, samples_us=[2.0, 4.0, 2.0], round="a")
    theirs = Timing(method="graph_replay", latency_us=3.0, samples_us=[3.0, 6.0, 3.0], round="a")
    assert over(ours, theirs) == (1.5, [1.5, 1.5])
    assert compact(ours).samples_us == [2.0, 4.0, 2.0] and compact(ours).model_extra["n"] == 3


@pytest.mark.parametrize(("error", "status", "reason"), [
    (BackendUnavailable("decode", "no GPU", "bring one"), "unavailable", "no GPU; to mend it: bring one"),
    (Unsupported("decode", "head_dim 32"), "unsupported", "head_dim 32"),
    (PageTableError("The table\n  is wrong."), "error", "The table is wrong."),
    (RuntimeError("out of\nmemory"), "error", "RuntimeError: out of memory"),
    (ValueError(), "error", "ValueError: no message"),
    (RuntimeError("x" * 900), "error", "RuntimeError: " + "x" * 500),
])  # fmt: skip
def test_what_was_raised_as_status_and_reason(error, status, reason):
    assert outcome(error) == (status, reason)


def test_an_unknown_name_is_something_that_is_not_here():
    status, reason = outcome(UnknownName("backend", "fast", ["decode"] * 200))
    assert status == "unavailable" and "fast" in reason and len(reason) == 300


class Choosy(Backend):
    id, title, role, device, paged = "choosy", "takes no selection", "ours", "any", True

    def why_not_paged(self, problem, *, selected=False):
        return "it takes no selection" if selected else None

    def run(self, q, k, v, problem):
        raise NotImplementedError


def test_a_backend_that_is_ready_or_says_why_not(monkeypatch):
    problem = square(1, 1, 64, 64)
    assert ready("reference", problem).id == "reference"
    assert ready("sdpa-math", problem, paged=False).id == "sdpa-math"
    with pytest.raises(Unsupported, match="reads no page table"):
        ready("sdpa-math", problem)
    with pytest.raises(UnknownName, match="no-such-kernel"):
        ready("no-such-kernel")
    monkeypatch.setattr(trials.backends, "get", lambda name: Choosy())
    assert ready("choosy", problem).id == "choosy"
    with pytest.raises(Unsupported, match="it takes no selection"):
        ready("choosy", problem, selected=True)


def test_a_record_is_written_at_once_with_figures_of_four_digits(run):
    book = Book(run, lambda line: None)
    written = book.write(
        "decode", backend="decode", data={"share": 1 / 3, "count": 123456, "name": "x", "list": [1 / 3]}
    )
    assert written.data == {"what": "decode", "share": 0.3333, "count": 123456, "name": "x", "list": [1 / 3]}
    assert written.source_hash == backends.get("decode").source_hash() is not None
    assert [t.data for t in run.trials(kind="paging")] == [written.data] and book.trials == [written]
    assert book.write("decode", backend="no-such-kernel").source_hash is None
    assert book.write("decode", backend="decode", source_hash="abc").source_hash == "abc"
    failed = book.failed("append", RuntimeError("full"), data={"batch": 3})
    assert (failed.status, failed.reason, failed.data) == (
        "error",
        "RuntimeError: full",
        {"what": "append", "batch": 3},
    )


def test_a_speed_of_a_wrong_result_counts_for_nothing():
    assert worth(None) == ("ok", None)
    assert worth("row 3 is off") == ("failed", "its result is wrong, so its speed counts for nothing (row 3 is off)")


def test_a_compact_timing_keeps_what_its_samples_said():
    timing = Timing(method="graph_replay", latency_us=2.3456789, samples_us=[1.23456] * 40, tflops=3.0, round="a",
                    l2="rotating", quartiles_us=[2.3456789, 9.87654321], launch_us=7.5)  # fmt: skip
    kept = compact(timing)
    assert kept.latency_us == 2.3457 and kept.samples_us == [1.235] * 3 and kept.tflops is None
    assert kept.model_extra == {"n": 40, "quartiles_us": [2.3457, 9.8765], "launch_us": 7.5}
    assert (kept.method, kept.round, kept.l2) == ("graph_replay", "a", "rotating")


def test_a_ratio_of_single_samples_has_itself_as_quartiles():
    ours, theirs = (Timing(method="host", latency_us=us, samples_us=[us], round="a") for us in (2.0, 5.0))
    assert over(ours, theirs) == (2.5, [2.5, 2.5])
    drifting = Timing(method="host", latency_us=3.0, samples_us=[2.0, 3.0, 4.0, 5.0], round="a")
    twice = Timing(method="host", latency_us=6.0, samples_us=[4.0, 6.0, 8.0, 10.0], round="a")
    assert over(drifting, twice) == (2.0, [2.0, 2.0]), "clock drift cancels"


def test_calls_on_the_cpu_share_a_round_and_one_that_raises_is_kept():
    called = []

    def broken(i):
        raise RuntimeError("broken")

    candidates = [Candidate("good", called.append), Candidate("bad", broken), Candidate("too", called.append)]
    found = time_calls(candidates, square(1, 1, 64, 64), gpu=False, sets=1, rounds=4)
    assert found["good"].round == found["too"].round and len(found["good"].samples_us) == 4
    assert isinstance(found["bad"], RuntimeError) and len(called) == 2 * (1 + 4)
