"""What a verdict may use: the run's own records, and a recorded run where it had no GPU."""

from __future__ import annotations

from support import synthetic_records as synthetic
from support.decisions import GOOD, decide, recorded

from flashcore.decision import verdict
from flashcore.decision.evidence import Evidence, Recorded, gather, label, recorded_runs
from flashcore.records import RunFolder, Trial


def test_a_recorded_run_of_older_source_is_stale_and_says_so():
    edited = {**synthetic.HASHES, "attention_wmma": "f" * 16}
    environment = synthetic.environment(None)
    decision = decide(synthetic.cpu_trials(), environment=environment, recorded=recorded(), current=edited)
    assert decision.verdict == "INCONCLUSIVE" and "kernel sources differ: attention_wmma" in decision.evidence


def test_gather_reads_the_run_and_the_newest_recorded_run(tmp_path):
    run = synthetic.write_run(tmp_path / "run", synthetic.cpu_trials(), synthetic.environment(None))
    for name, date in (("h100", "2001-01-01"), ("h200", "2002-02-02")):
        environment = synthetic.environment(f"SYNTHETIC {name}", date=date)
        synthetic.write_run(tmp_path / "recorded" / name, synthetic.gpu_trials(), environment)
    evidence = verdict.gather(run, recorded_dir=tmp_path / "recorded")
    assert evidence.recorded.gpu == "SYNTHETIC h200" and len(evidence.trials) == len(synthetic.cpu_trials())
    assert evidence.gpu_trials == evidence.recorded.trials and not evidence.problems


def test_gather_without_a_recorded_run_says_there_is_none(tmp_path):
    run = synthetic.write_run(tmp_path / "run", synthetic.cpu_trials(), synthetic.environment(None))
    evidence = verdict.gather(run, recorded_dir=tmp_path / "nowhere")
    assert evidence.recorded is None and "no recorded run" in evidence.label


def test_a_recorded_run_that_cannot_be_read_is_left_out_aloud(tmp_path):
    run = synthetic.write_run(tmp_path / "run", synthetic.cpu_trials(), synthetic.environment(None))
    newer = RunFolder.create(tmp_path / "recorded" / "h300")
    newer.records_path.write_text('{"schema_version": 99, "kind": "ceiling"}\n', encoding="utf-8")
    evidence = verdict.gather(run, recorded_dir=tmp_path / "recorded")
    assert evidence.recorded is None and "h300" in evidence.problems[0]


def test_a_kernel_that_was_never_recorded_is_named_and_does_not_make_the_recorded_run_stale():
    with_new = {**synthetic.HASHES, "attention_mine": "f" * 16}
    none = synthetic.environment(None)
    decision = decide(synthetic.cpu_trials(), environment=none, recorded=recorded(), current=with_new)
    assert decision.verdict == "GO"
    assert decision.evidence.endswith(
        "; kernel sources match the current ones. Not measured there, since they are newer: attention_mine."
    )
    silent = decide(synthetic.cpu_trials(), environment=none, recorded=recorded(kernels=None))
    assert silent.evidence.endswith("; it does not say which kernel sources were measured.")


def test_the_recorded_run_that_counts_is_the_newest_to_the_second(tmp_path):
    days = {"h100": "2001-02-03T09:00:00+00:00", "h200": "2001-02-03T07:00:00+00:00", "old": None}
    for name, date in days.items():
        synthetic.write_run(tmp_path / name, GOOD[:1], synthetic.environment(date=date))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "environment.json").write_text("{")
    runs, left_out = recorded_runs(tmp_path)
    assert [found.folder for found in runs] == ["old", "h200", "h100"]
    assert len(left_out) == 1 and left_out[0].startswith("The recorded run in broken was left out: ")


def test_a_recorded_fleet_is_no_evidence_of_kernels_however_new(tmp_path):
    synthetic.write_run(tmp_path / "h200", GOOD[:1], synthetic.environment(date="2001-02-03T07:00:00+00:00"))
    cards = [Trial(kind="fleet", environment=synthetic.ENV_ID, data={"what": "card"})]
    synthetic.write_run(tmp_path / "h200-x2", cards, synthetic.environment(date="2001-02-03T09:00:00+00:00"))
    assert [found.folder for found in recorded_runs(tmp_path)[0]] == ["h200"]
    synthetic.write_run(tmp_path / "both", [*cards, *GOOD[:1]], synthetic.environment(date="2001-02-03T08:00:00+00:00"))
    assert [found.folder for found in recorded_runs(tmp_path)[0]] == ["h200", "both"]


def test_a_seal_that_is_gone_is_missed_where_the_newest_verdict_had_one(tmp_path):
    said = [Trial(kind="verdict", data=data) for data in ({"verdict": "GO"}, {"verdict": "GO", "sealed": True})]
    for name, trials, missed in (
        ("sealed", said, True), ("then more", [*said, *GOOD[:1]], True), ("then anew", said[::-1], False),
        ("never", GOOD[:1], False),
    ):  # fmt: skip
        run = synthetic.write_run(tmp_path / name, trials, synthetic.environment())
        assert any("seal.json is gone" in problem for problem in gather(run).problems) is missed, name


def test_a_run_on_a_gpu_says_which_kernels_have_changed_since_it_was_made():
    fresh = decide(GOOD, environment=synthetic.environment())
    assert fresh.evidence == "Measured live on SYNTHETIC H200, 2001-02-03."
    stale = decide(GOOD, environment=synthetic.environment(), current={**synthetic.HASHES, "attention_wmma": "f" * 16})
    assert stale.evidence == "Measured live on SYNTHETIC H200, 2001-02-03; kernel sources differ now: attention_wmma."


# --- where figures come from -----------------------------------------------------------------------------------------


def test_a_kernel_that_changed_or_was_never_recorded_is_told_apart_and_one_that_is_gone_is_neither():
    then, now = recorded(kernels={"a": "1", "b": "2", "gone": "3"}), {"a": "1", "b": "other", "new": "4"}
    assert then.changed(now) == ["b"] and then.added(now) == ["new"]
    assert recorded(kernels="damaged").changed({"a": "1"}) == [] and recorded(kernels="damaged").added({"a": "1"}) == [
        "a"
    ]


def test_what_a_recorded_run_does_not_say_is_said_to_be_unknown():
    bare = Recorded((), {})
    assert (bare.gpu, bare.date) == ("an unknown GPU", "an unknown date")
    assert recorded().date == "2001-02-03"


def test_the_label_says_where_the_gpus_figures_come_from():
    live = label(None, synthetic.environment(), {})
    assert live == "Measured live on SYNTHETIC H200, 2001-02-03."
    assert label(None, {"gpu": "H100"}, {}) == "Measured live on H100, date not known."
    assert label(None, synthetic.environment(None), {}).startswith("No GPU evidence")
    then = recorded(kernels={"a": "1", "b": "2"})
    assert label(then, {}, {"a": "1"}).endswith("kernel sources match the current ones.")
    assert label(then, {}, {"a": "x", "b": "y"}).endswith("kernel sources differ: a, b.")


def test_forms_of_a_kernel_that_differ_are_told_in_words_and_not_by_the_marks_of_their_hashes():
    then = recorded(kernels={"a": "1", "b": "2"})
    forms = {"a": "1", "a with options": "3", "b": "2", "b with options": "4"}
    assert label(then, {}, forms).endswith(
        "kernel sources match the current ones. Not measured there, since they are newer: the masked and "
        "batch-invariant forms of a and b."
    )
    assert label(then, {}, {**forms, "c": "5", "d": "6"}).endswith(
        "since they are newer: c, d, and the masked and batch-invariant forms of a and b."
    )
    whole = {**forms, "c": "5", "c with options": "6", "d with options": "7", "e with options": "8"}
    assert label(recorded(kernels={**then.kernels, "d": "1", "e": "1"}), {}, whole).endswith(
        "since they are newer: c, and the masked and batch-invariant forms of a, b, d and e."
    )
    live = synthetic.environment(kernels=forms)
    assert label(None, live, {**forms, "b with options": "7"}).endswith(
        "; kernel sources differ now: the masked and batch-invariant forms of b."
    )


def test_in_brief_kernels_are_counted_and_a_form_is_no_kernel_of_its_own():
    def brief(hashes, then=None, **environment):
        return Evidence((), synthetic.environment(**environment) if then is None else {}, hashes, then).brief

    assert brief({}) == "Measured live on SYNTHETIC H200, 2001-02-03."
    assert brief({"a": "2"}, kernels={"a": "1"}).endswith("2001-02-03; 1 of its kernels changed since.")
    assert brief({}, gpu=None).startswith("No GPU evidence")
    assert brief({}, recorded(kernels={})).endswith("2001-02-03; it does not say which kernels it measured.")
    then = recorded(kernels={"a": "1", "b": "2"})
    assert brief({"a": "1"}, then) == "Recorded on SYNTHETIC H200, 2001-02-03; its kernels are unchanged."
    newer = {"a": "1", "c": "3", "c with options": "4"}
    assert brief(newer, then).endswith("; its kernels are unchanged, and 1 newer one was not measured.")
    changed = {"a": "x", "b": "y", "c": "3", "d with options": "4"}
    assert brief(changed, then).endswith("; 2 of its kernels changed since, and 2 newer ones were not measured.")


def test_the_gpus_trials_and_machine_are_those_of_the_recorded_run_where_there_is_one():
    own, other = tuple(synthetic.cpu_trials()), recorded()
    alone = Evidence(own, synthetic.environment(None), {})
    assert alone.gpu_trials == own and alone.gpu_environment["gpu"] is None
    helped = Evidence(own, synthetic.environment(None), {}, other)
    assert helped.gpu_trials == other.trials and helped.gpu_environment["gpu"] == "SYNTHETIC H200"
    assert helped.trials == own and helped.label.startswith("Recorded on SYNTHETIC H200")


def test_a_run_with_a_gpu_borrows_nothing_and_a_recorded_run_without_one_lends_nothing(tmp_path):
    synthetic.write_run(tmp_path / "recorded" / "cpu", synthetic.cpu_trials(), synthetic.environment(None))
    own = synthetic.write_run(tmp_path / "own", synthetic.cpu_trials(), synthetic.environment(None))
    assert gather(own, recorded_dir=tmp_path / "recorded").recorded is None
    synthetic.write_run(tmp_path / "recorded" / "h200", synthetic.gpu_trials(), synthetic.environment())
    assert gather(own, recorded_dir=tmp_path / "recorded").recorded.folder == "h200"
    gpu = synthetic.write_run(tmp_path / "gpu", synthetic.gpu_trials(), synthetic.environment())
    assert gather(gpu, recorded_dir=tmp_path / "recorded").recorded is None


def test_a_damaged_line_of_either_run_is_told_apart(tmp_path):
    other = synthetic.write_run(tmp_path / "recorded" / "h200", synthetic.gpu_trials(), synthetic.environment())
    own = synthetic.write_run(tmp_path / "own", synthetic.cpu_trials(), synthetic.environment(None))
    other.records_path.write_text(other.records_path.read_text() + '{"kind": "cei')
    found = gather(own, recorded_dir=tmp_path / "recorded")
    assert found.problems == () and "records.jsonl" in found.recorded.problems[0]
    assert len(found.recorded.trials) == len(synthetic.gpu_trials())
