"""Reports whose trials are done by workers: every list can travel, and what was measured outlives the scheduler."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest
from support import notebook_tools as tools

from flashcore import backends, bisection
from flashcore.backends import hopper
from flashcore.bisection import diagnosis
from flashcore.bisection.faults import proving
from flashcore.bisection.faults.catalogue import FAULTS
from flashcore.bisection.faults.sanitizer import sanitizing
from flashcore.decision import verdict
from flashcore.gpu import device
from flashcore.measure import check, compiling, determinism
from flashcore.measure.cluster import Task, starting
from flashcore.measure.cluster.tasks import packed
from flashcore.measure.exploits import proving as judging
from flashcore.measure.sweep import sweep, sweep_problems
from flashcore.pipeline import reporting
from flashcore.problem import square
from flashcore.records import RunFolder, Trial
from flashcore.surveys.cublaslt import measuring as surveying
from flashcore.surveys.cublaslt.grid import survey_grid
from flashcore.surveys.invariance import measuring as invariance
from flashcore.surveys.models import measuring as modelling
from flashcore.surveys.models.plan import plan_for as model_plan
from flashcore.surveys.paging import measuring as paging
from flashcore.surveys.paging.plan import plan_for


class Packs:
    """A pool that sees whether every task can travel, and does none."""

    places = ("one", "two")

    def __init__(self):
        self.packed: list[str] = []

    def perform(self, works, record, progress=None):
        for work in works:
            for task in work.tasks:
                if isinstance(task, Task):
                    assert len(packed(task.function, task.arguments, task.keywords)) > 0
                    assert all("kind" in fields and Trial(**fields) for fields in task.owed), task.name
                    self.packed.append(task.name)
        return [[] for _ in works]


@pytest.fixture
def everywhere(monkeypatch):
    """Every backend is there, as on a machine with a GPU and all peers."""
    for one in backends.all_backends():
        monkeypatch.setattr(type(one), "availability", lambda self: backends.AVAILABLE)
    return backends.all_backends()


def test_every_list_of_a_full_report_on_a_gpu_can_travel_to_another_process(everywhere, run, monkeypatch):
    monkeypatch.setattr(compiling.device, "has_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(hopper, "multiprocessors", lambda number: 132)
    pool, ours = Packs(), [one for one in everywhere if one.role == "ours"]
    problems = check.named_problems("default", "full", gpu=True)[0]
    pairs = [(one, square(1, 2, 256, 64)) for one in ours]
    lists = (
        compiling.tasks(check.pairs(problems, everywhere)),
        check.tasks(check.pairs(problems, everywhere)), bisection.tasks(pairs, seed=0, pattern="normal"),
        determinism.tasks(pairs, runs=5), proving.clean_tasks(ours), judging.tasks(("cpu", "records")),
        diagnosis.conform_tasks([one.id for one in everywhere]),
        invariance.tasks([one.id for one in everywhere], "full"),
    )  # fmt: skip
    for found in lists:
        pool.perform([proving.Work(found)], run.append)
    pool.perform([proving.fault_work(ours)], run.append)
    sweep(run, sweep_problems("full", True), everywhere, gpu=True, pool=pool)
    sanitizing.sanitize(run, ours, tools="all", pool=pool)
    paging.measure(run, plan_for("full", True), pool=pool)
    modelling.measure(run, model_plan("full", True), pool=pool)
    roofs = surveying.Roofs({"float16": 700.0}, 4.1)
    assert packed(surveying.surveyed, (survey_grid("full"), roofs))
    words = " ".join(pool.packed)
    for name in ("compile attention_hopper D=64", "check B=",
                 "bisect hopper", "repeat hopper", "clean runs of decode", "promises of sdpa-cudnn",
                 "the bits of hopper, invariant mode",
                 "1 of ", "memcheck on hopper", "decode: B=64", "tokens: model, batch 256",
                 "correctness: heads", "serving: Qwen3-30B-A3B, batch 64", "shapes: plain, B=256",
                 "shapes: shared prefix", "model "):  # fmt: skip
        assert name in words, name
    planted = {name.split(" in ")[0] for name in pool.packed if " in hopper: " in name}
    assert planted == {fault.id for fault in FAULTS if fault.why_not("hopper") is None and not fault.held_by}


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.skipif(device.has_gpu(), reason="CPU workers stand for cards where there are none")
def test_when_the_scheduler_goes_the_notebook_fails_and_what_was_measured_stays(tmp_path):
    pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
    folder = tmp_path / "notebooks"
    tools.finishing_notebook(
        folder, "01_spread",
        f"import sys\nsys.path.append({str(Path(tools.__file__).parents[1])!r})\n"
        "from flashcore.measure.cluster import Task, connecting, perform, pool\n"
        "from support.cluster_tasks import count, nap\n"
        "workers = pool()\n"
        "connecting.CONNECT_S = 5.0",
        'tasks = [Task("first", count, (1,), cost_s=9.0), Task("long", nap, (600.0,))]\n'
        "perform(tasks, run=run, pool=workers)",
    )  # fmt: skip
    run = RunFolder.create(tmp_path / "run")
    common = {"profile": "quick", "backends": "cpu", "problems": "default", "seed": 0}
    with starting.spread(workers=1) as workers:
        device.record_environment(run, "before", {**common, "notebooks": ["01_spread"]})

        def end():
            until = time.monotonic() + 600  # on a busy machine
            while not run.trials(kind="correctness") and time.monotonic() < until:
                time.sleep(0.2)
            with contextlib.suppress(Exception):  # it answers no more, which is what is asked of it
                workers.client.sync(workers.client.scheduler.terminate)

        thread = threading.Thread(target=end)
        thread.start()
        failed = reporting.measure(run, ["01_spread"], common, folder=folder)
        thread.join()
    assert "ClusterLost: The scheduler at tcp://" in failed["01_spread"]
    assert [t.data["number"] for t in run.trials(kind="correctness")] == [1]
    assert verdict.judge(run).verdict == "INCONCLUSIVE"
