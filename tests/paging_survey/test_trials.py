"""Records of the survey: compact timings, and ratios of samples of one round."""

from __future__ import annotations

from flashcore.paging_survey.trials import compact, over
from flashcore.records import Timing


def test_ratios_are_of_samples_of_one_round():
    ours = Timing(method="graph_replay", latency_us=2.0, samples_us=[2.0, 4.0, 2.0], round="a")
    theirs = Timing(method="graph_replay", latency_us=3.0, samples_us=[3.0, 6.0, 3.0], round="a")
    assert over(ours, theirs) == (1.5, [1.5, 1.5])
    assert compact(ours).samples_us == [2.0, 4.0, 2.0] and compact(ours).model_extra["n"] == 3
