"""What a verdict may use: the run's own records, and a recorded run where it had no GPU."""

from __future__ import annotations

from support import synthetic_records as synthetic
from support.decisions import GOOD, decide, recorded

from flashcore.decision import verdict
from flashcore.decision.evidence import recorded_runs
from flashcore.records import RunFolder


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
    assert decision.evidence.endswith("; kernel sources match the current ones; new since then: attention_mine.")
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


def test_a_run_on_a_gpu_says_which_kernels_have_changed_since_it_was_made():
    fresh = decide(GOOD, environment=synthetic.environment())
    assert fresh.evidence == "Measured live on SYNTHETIC H200, 2001-02-03."
    stale = decide(GOOD, environment=synthetic.environment(), current={**synthetic.HASHES, "attention_wmma": "f" * 16})
    assert stale.evidence == "Measured live on SYNTHETIC H200, 2001-02-03; kernel sources differ now: attention_wmma."
