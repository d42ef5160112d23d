"""What the template wants besides the notebook's cells."""

from __future__ import annotations

from support import synthetic_records as synthetic

from flashcore.decision import verdict
from flashcore.page.resources import embedded_records
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
