"""What the records of a survey say: regret, correlation and the smallest shape, on records whose answer is known."""

from __future__ import annotations

import pytest
from support import synthetic_survey as synthetic

from flashcore.records import Timing, Trial
from flashcore.survey import facts


def candidate(case: str, rank: int, latency_us: float, workspace_bytes: int = 0, offered: int = 3, **data) -> Trial:
    data = {"group": "report", "product": f"64x64x{len(case)} f16>f16", "limit_mb": 256, "rank": rank, "split_k": 1,
            "workspace_bytes": workspace_bytes, "waves_count": 0.5, "of": offered, **data}  # fmt: skip
    data |= {"case": {"offered": offered}} if rank == 0 else {}
    return Trial(kind="gemm_candidate", backend="cublaslt", variant=case, data=data,
                 timing=Timing(method="graph_replay", latency_us=latency_us, tflops=1.0))  # fmt: skip


def test_regret_is_the_choices_time_over_the_best():
    trials = [candidate("a", 0, 3.0), candidate("a", 1, 2.0), candidate("a", 2, 5.0, workspace_bytes=1 << 20)]
    found = {r.policy: r.ratio for r in facts.regrets(trials)}
    assert found == {"first": 1.5, "largest-workspace": 2.5}
    again = [t.model_copy(update={"variant": "b"}) for t in trials]
    assert len(facts.regrets(trials + again)) == 2, "one product counts once"
    assert facts.regrets([candidate("a", 0, 3.0, offered=1)]) == [], "one candidate leaves no choice"
    assert [r.ratio for r in facts.regrets([candidate("a", 0, 3.0, offered=2)])] == [1, 1]
    failed = candidate("a", 0, 3.0).model_copy(update={"status": "error"})
    assert facts.regrets([failed, *trials[1:]]) == [], "without the first there is nothing to compare"


@pytest.mark.parametrize(
    ("times", "value", "words"),
    [
        ((1.0, 2.0, 3.0), 1.0, "a strong relation to time: rank correlation 1.0"),
        ((3.0, 2.0, 1.0), -1.0, "more workspace is faster"),
        ((2.0, 5.0, 2.0), 0.0, "no relation"),
    ],
)
def test_the_rank_correlation_of_workspace_and_time(times, value, words):
    trials = [candidate("a", rank, us, workspace_bytes=rank * 1024) for rank, us in enumerate(times)]
    found = facts.workspace_correlation(trials)
    assert found == (pytest.approx(value), 3, 1)
    assert "too few to tell" in facts.correlation_words(found), "one product proves nothing"
    assert words in facts.correlation_words((found[0], 9, 3))


def test_no_correlation_is_made_of_equal_workspaces_or_of_a_part_of_the_candidates():
    equal = [candidate("a", rank, 1.0 + rank) for rank in range(3)]
    assert facts.workspace_correlation(equal) is None
    assert "differ in workspace" in facts.correlation_words(None)
    part = [candidate("a", rank, 1.0 + rank, workspace_bytes=rank, offered=9) for rank in range(3)]
    assert facts.workspace_correlation(part) is None, "the few that were kept are no sample"


def test_the_smallest_shape_is_the_one_of_least_work():
    trials = synthetic.survey_trials("full")
    assert facts.smallest_shape(trials) == (16, 16, 16)
    grid = facts.small_grid(trials)
    assert grid[1, 1, 16] == "refused" and grid[8, 128, 16] == "none" and grid[16, 16, 64] == "first"
    assert facts.smallest_shape([]) is None
