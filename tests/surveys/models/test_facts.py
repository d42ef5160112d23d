"""What records of models say, on SYNTHETIC ones: the last of each step, ratios of one round, and no smoke tests."""

from __future__ import annotations

import pytest
from support import synthetic_models as synthetic

from flashcore.records import Trial
from flashcore.surveys.models import facts


def test_steps_are_grouped_and_the_last_of_each_counts():
    again = synthetic.step("flashcore", 4500.0)
    found = facts.steps([*synthetic.survey(), again])
    assert [(one.shape, one.what, list(one.by_mode)) for one in found] == [
        ("llama-64", "prefill", ["graph", "eager"]), ("llama-64", "decode", ["graph"]),
    ]  # fmt: skip
    assert found[0].by_mode["graph"]["flashcore"] is again
    mode, ways = found[0].shown()
    assert mode == "graph" and set(ways) == set(synthetic.STEP), "the quickest one"
    assert facts.best_peer(ways).backend == "sdpa-cudnn"


def test_the_mode_shown_is_the_quickest_of_those_in_which_ours_was_timed():
    def shown(*trials: Trial) -> str:
        [step] = facts.steps(trials)
        return step.shown()[0]

    peer, left_out = synthetic.step("sdpa", 9000.0), synthetic.step("left out", 1.0)
    ours = synthetic.step("flashcore", 9000.0, mode="eager")
    assert shown(peer, ours.model_copy(update={"timing": peer.timing})) == "eager"
    assert shown(left_out, synthetic.step("flashcore", 6000.0), synthetic.step("flashcore", 5000.0, mode="eager")) == (
        "eager"
    ), "a step without attention is no quick one"
    for trials in (
        (peer, synthetic.step("left out", 1.0, mode="eager")),
        (left_out, synthetic.step("sdpa", 1.0, mode="eager")),
    ):
        assert shown(*trials) == trials[[t.backend for t in trials].index("sdpa")].data["mode"]
    assert facts.model_trials([Trial(kind="ceiling"), peer]) == [peer]


def test_what_is_wrong_or_a_smoke_test_has_no_speed():
    wrong = [t.model_copy(update={"status": "failed", "reason": "other tokens"}) for t in synthetic.steps()]
    smoke = [t.model_copy(update={"data": t.data | {"smoke": True}}) for t in synthetic.steps("decode")]
    unsaid = [t.model_copy(update={"data": {k: v for k, v in t.data.items() if k != "smoke"}}) for t in smoke]
    assert facts.steps(wrong) == facts.steps(smoke) == facts.steps(unsaid) == []
    assert len(facts.troubles(wrong)) == 4 and facts.troubles(smoke) == []
    assert facts.steps([synthetic.step("left out", 1.0)]) == [], "nothing to compare"


def test_a_ratio_is_of_one_round():
    mine, other = synthetic.steps()[:2]
    value, (low, high) = facts.faster(mine, other)
    assert value == pytest.approx(1.6) and low <= 1.6 <= high and high - low < 0.02
    elsewhere = synthetic.steps(mode="eager")[1]
    assert facts.faster(mine, elsewhere) is None
    assert facts.faster(mine, other.model_copy(update={"environment": "another"})) is None
    fewer = other.model_copy(update={"timing": other.timing.model_copy(update={"samples_us": [8000.0]})})
    assert facts.faster(mine, fewer) == (pytest.approx(1.6), None)
    assert facts.faster(mine, synthetic.generated("sdpa")) is None
    beside = [t.model_copy(update={"timing": t.timing.model_copy(update={"samples_us": [us] * 30})})
              for t, us in ((mine, 5000.0), (other, 9000.0))]  # fmt: skip
    assert facts.faster(*beside) == (pytest.approx(1.6), (pytest.approx(1.6), pytest.approx(1.8)))
    assert facts.faster(*reversed(beside)) == (pytest.approx(5 / 8), (pytest.approx(5 / 9), pytest.approx(5 / 8)))


def test_tokens_are_summed():
    trials = synthetic.survey()
    assert facts.tokens(trials, smoke=False) == facts.Tokens(11, 2 * 64 + 900, 2 * 60 + 720, 2 * 60 + 720, 0)
    wrong = synthetic.generated("sdpa", status="failed", reason="other tokens", data={"agreed": 58})
    assert facts.tokens([*trials, wrong], smoke=False).wrong == 1
    assert facts.tokens([*trials, wrong], smoke=True).records == 0
    assert [t.backend for t in facts.troubles([*trials, wrong])] == ["fa3", "sdpa"]
