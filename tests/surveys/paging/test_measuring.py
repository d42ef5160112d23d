"""A survey of paging runs whole on the CPU, its records are compact, and what fails is a record like any other."""

from __future__ import annotations

import pytest
from support.paging_surveys import PLAN, records

from flashcore.errors import UnknownName
from flashcore.measure.cluster import Here
from flashcore.surveys.paging import append as appending
from flashcore.surveys.paging import facts, measuring
from flashcore.surveys.paging.measuring import ON_CPU, WHATS, measure
from flashcore.surveys.paging.plan import Further, ModelShape, decode_problem, plan_for
from flashcore.surveys.paging.read_speed import NAME


@pytest.mark.slow
def test_a_whole_survey_on_the_cpu(surveyed):
    trials = facts.paging_trials(surveyed.trials())
    assert {t.data["what"] for t in trials} == set(WHATS)
    # A peer may not be installed, and the reference promises no bits.
    beside = [t for t in trials if t.data["what"] in ("serving", "shapes")]
    assert {t.status for t in trials if t not in beside} == {"ok"}
    assert {t.status for t in beside if t.backend != "flashinfer" and t.variant != "batch-invariant"} == {"ok"}
    memory = {t.data["case"]: t.data["saved_percent"] for t in records(surveyed, "memory")}
    assert memory == {"shared_prefix": pytest.approx(70.3, abs=0.05), "mixed_lengths": pytest.approx(47.1, abs=0.05),
                      "no_sharing": pytest.approx(-0.8, abs=0.05)}  # fmt: skip
    assert all("resident K and V pages" in t.data["definition"] for t in records(surveyed, "memory"))
    decode = records(surveyed, "decode")
    assert len({t.timing.round for t in decode}) == 1, "what is compared was interleaved"
    assert len({t.problem for t in decode}) == 1 and decode[0].problem.page_size == PLAN.page_size
    by_name = {t.variant: t for t in decode}
    assert by_name["top_k 50 %"].data["pages_share"] == 0.5 and by_name["top_k 30 %"].data["pages_share"] == 3 / 8
    assert by_name["sink_window 30 %"].data["kv_bytes"] == by_name["top_k 30 %"].data["kv_bytes"]
    every = by_name["all pages"]
    assert every.data["of_dense"] == 1 and every.data["of_floor"] == pytest.approx(
        every.data["floor_us"] / every.timing.latency_us, rel=1e-3)  # fmt: skip
    assert every.data["over_peer"] > 0 and "sdpa-math" in every.data["peer"]
    assert {"dense", "dense, group as rows"} <= set(by_name)
    tokens = records(surveyed, "tokens")[-1]
    assert tokens.data["tokens_per_s"] == pytest.approx(2 / (2 * tokens.timing.latency_us) * 1e6, rel=1e-3)
    assert tokens.data["stated"] is True and tokens.data["definition"].startswith("attention only, batch 2, 2 layers")


@pytest.mark.slow
def test_the_records_are_compact(surveyed):
    sizes = [len(line) for line in surveyed.records_path.read_text().splitlines()]
    assert max(sizes) < 1000 and sum(sizes) < 50_000
    assert all(len(t.timing.samples_us) <= 10 for t in surveyed.trials() if t.timing)


def test_all_leaves_out_on_the_cpu_what_says_nothing_there():
    assert measuring.chosen("all", False) == list(ON_CPU) and measuring.chosen("all", True) == list(WHATS)
    assert measuring.chosen("tokens, memory", False) == ["memory", "tokens"]
    with pytest.raises(UnknownName, match="no measurement of paging 'speed'"):
        measuring.chosen("speed", True)


@pytest.mark.slow
def test_what_is_missing_or_breaks_is_a_record_and_the_rest_goes_on(run, monkeypatch):
    from dataclasses import replace

    gone = replace(PLAN, decode_backend="no-such-kernel", prefill_backend="no-such-kernel")
    monkeypatch.setattr(appending, "_check", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    trials = measure(run, gone, what="decode,prefill,append,tokens,memory")
    of = {what: [t for t in trials if t.data["what"] == what] for what in WHATS}
    assert {t.status for t in of["decode"] if t.backend == "no-such-kernel"} == {"unavailable"}
    assert {t.status for t in of["decode"] if t.backend == "sdpa-math"} == {"ok"}
    assert {t.status for t in of["tokens"]} == {"unavailable"} and "no-such-kernel" in of["tokens"][0].reason
    assert of["prefill"][0].status == "unavailable"
    assert of["append"][0].status == "error" and of["append"][0].reason == "RuntimeError: out of memory"
    assert len(of["memory"]) == 3


def test_beside_a_gpu_what_times_nothing_goes_to_a_crew_which_ends_before_anything_is_timed(run, monkeypatch):
    from dataclasses import replace

    order, asked = [], []

    class Crew:
        places = ()

        def perform(self, works, record, progress=None):
            order.extend(task.name for work in works for task in work.tasks)
            assert not any(task.timing for work in works for task in work.tasks)
            return Here().perform(works, record, progress)

        def close(self):
            order.append("closed")

    monkeypatch.setattr(measuring, "crew", lambda here, most: asked.append(most) or (Crew() if most else here))
    seen = {name: (lambda book, plan, name=name, **_: order.append(name)) for name in ("decode", "append")}
    monkeypatch.setattr(measuring, "WHATS", measuring.WHATS | seen)
    trials = measure(run, replace(PLAN, gpu=True), what="decode,append,memory")
    assert order == ["memory", "closed", "decode", "append"]
    assert len(trials) == 3 and run.trials(kind="paging") == trials
    order.clear()
    measure(run, replace(PLAN, gpu=True), what="append")
    assert order == ["append"] and asked == [1, 0], "as many processes as there are tasks, and none for nothing"


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_measurement_on_a_gpu_at_small_sizes(run):
    from dataclasses import replace

    from flashcore.problem import square

    plan = replace(
        plan_for("quick", True), decode=(decode_problem(4, 8, 2, 1024, 128),), prefill=(square(2, 4, 512, 64),),
        append=decode_problem(8, 2, 2, 100, 64), accuracy=PLAN.accuracy, rounds=5, batches=(1, 2),
        models=(ModelShape("tiny", 2, 8, 2, 128, 1024, stated_batch=2),),
        served=(ModelShape("tiny", 2, 8, 2, 128, 1024, stated_batch=2),), served_batches=(1, 2),
        shapes=(decode_problem(4, 8, 2, 1024, 128),), pages=(16, 64), dtypes=("bfloat16",),
        further=Further(decode_problem(4, 8, 2, 1024, 128), (100, 3000), (2,), 896),
    )  # fmt: skip
    trials = measure(run, plan, what="memory,decode,prefill,append,accuracy,tokens,serving,shapes")
    wrong = [(t.data, t.backend, t.reason) for t in trials if t.status in ("failed", "error")]
    assert wrong == []
    assert all(t.timing.method == "graph_replay" for t in trials if t.timing)
    speed = next(t for t in run.trials(kind="ceiling") if t.data["name"] == NAME)
    assert 1.0 < speed.data["value"] < 10.0, "TB/s"
