"""What the template wants besides the notebook's cells."""

from __future__ import annotations

from support import synthetic_records as synthetic

from flashcore.decision import verdict
from flashcore.page import _resources
from flashcore.page._resources import embedded_records, resources
from flashcore.page.variants import variant
from flashcore.records import Trial


def test_records_are_embedded_as_written_and_cannot_end_the_script(gpu_run):
    gpu_run.append(Trial(kind="ceiling", reason="</script><script>"))
    [found] = embedded_records(gpu_run, verdict.gather(gpu_run))
    assert "<" not in found["text"]
    lines = found["text"].splitlines()
    assert [Trial.model_validate_json(line) for line in lines] == gpu_run.trials()


def test_a_page_without_a_gpu_carries_the_recorded_records_too(tmp_path):
    run = synthetic.write_run(tmp_path / "cpu", synthetic.cpu_trials(), synthetic.environment(None))
    found = embedded_records(run, verdict.gather(run))
    assert [f["id"] for f in found] == ["fc-records", "fc-records-recorded"]


def made(run, **more) -> dict:
    return resources(run, verdict.judge(run), **more)


def test_the_head_says_the_verdict_first_and_the_summary_its_reason(gpu_run):
    found = made(gpu_run, variant=variant(title="Our page", organisation="Us"))
    assert found["page_title"] == "GO: Our page, SYNTHETIC H200, Us"
    assert (found["title"], found["organisation"], found["run"]) == ("Our page", "Us", gpu_run.name)
    assert found["summary"].startswith("GO. Ship option B") and found["summary"].endswith("SYNTHETIC H200, 2001-02-03.")
    assert found["date"] == "2001-02-03 04:05" and found["recorded"] is None
    assert found["decision"]["verdict"] == "GO" and "GO" in found["banner"]


def test_the_parts_follow_the_variant(gpu_run):
    shown = [{"title": "One", "html": "<p>"}]
    found = made(gpu_run, evidence_html=shown, left_out=["Two"])
    assert found["evidence"] == shown and found["left_out"] == ["Two"] and "make it again" in found["provenance"]
    leadership = made(gpu_run, evidence_html=shown, variant=variant(audience="leadership"))
    assert leadership["evidence"] is None and leadership["provenance"]
    only = made(gpu_run, variant=variant(sections="speed"))
    assert only["provenance"] is None and only["evidence"] is None and only["records"]


def test_the_last_word_of_a_notebook_says_whether_it_failed(gpu_run):
    gpu_run.append(synthetic.finished("04_tflops_sweep", status="error", reason="it died"))
    gpu_run.append(synthetic.finished("01_environment", status="error"))
    gpu_run.append(synthetic.finished("01_environment"))
    assert made(gpu_run)["failed"] == {"04_tflops_sweep": "it died"}
    gpu_run.append(synthetic.finished("04_tflops_sweep", status="error"))
    assert made(gpu_run)["failed"] == {"04_tflops_sweep": "no reason recorded"}


def test_the_recorded_records_give_way_in_a_page_that_would_be_too_large(tmp_path, monkeypatch):
    run = synthetic.write_run(tmp_path / "cpu", synthetic.cpu_trials(), synthetic.environment(None))
    evidence = verdict.gather(run)
    assert len(embedded_records(run, evidence)) == 2
    monkeypatch.setattr(_resources, "MOST_RECORD_BYTES", len(run.records_path.read_text()) + 10)
    assert [f["id"] for f in embedded_records(run, evidence)] == ["fc-records"]


def test_a_run_without_records_embeds_none(tmp_path):
    run = synthetic.write_run(tmp_path / "empty", [], synthetic.environment())
    assert embedded_records(run, verdict.gather(run)) == []
