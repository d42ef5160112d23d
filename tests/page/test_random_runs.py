"""Any subset of records makes a page, and none says GO without complete, fresh evidence: random runs, seeded."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from support import mutations
from support import synthetic_paging as paging
from support import synthetic_records as synthetic
from support.drawing_here import page_text
from support.sampling import first

from flashcore import tables
from flashcore.decision import verdict
from flashcore.paths import data_dir
from flashcore.records import RunFolder, Trial

SEEDS = range(14)  # each of the seven ways to lack something twice; three of them once by default
_ALL = [t for t in synthetic.gpu_trials(synthetic.FAST) if t.kind != "paging"]
WHOLE = [*_ALL[:-3], *paging.everything(), *_ALL[-3:]]
"""A whole run that says GO; the records that its notebooks finished come last."""
ODD = ("nan", "inf", "-inf")


def damaged(trial: Trial, rng: random.Random) -> Trial:
    """The trial as a bad day leaves it."""
    what = rng.choice(["failed", "error", "unavailable", "nan", "machine", "source", "empty", "huge"])
    if what in ("failed", "error", "unavailable"):
        return trial.model_copy(update={"status": what, "reason": rng.choice([None, "<b>it</b> broke & burnt\nhere"])})
    if what in ("nan", "huge") and trial.timing is not None:
        odd = float(rng.choice(ODD)) if what == "nan" else 10.0 ** rng.choice([-300, 300])
        samples = [odd if rng.random() < 0.5 else s for s in trial.timing.samples_us]
        changes = {"latency_us": odd, "samples_us": samples, "tflops": odd}
        return trial.model_copy(update={"timing": trial.timing.model_copy(update=changes)})
    if what == "nan" and trial.correctness is not None:
        changes = {"max_abs_error": float("nan"), "num_nan": 3, "passed": False}
        return trial.model_copy(update={"correctness": trial.correctness.model_copy(update=changes)})
    if what == "machine":
        return trial.model_copy(update={"environment": "env-of-another-machine"})
    if what == "source":
        return trial.model_copy(update={"source_hash": "0" * 16})
    return trial.model_copy(update={"data": {}, "timing": None, "correctness": None}) if what == "empty" else trial


def drawn(seed: int) -> tuple[list[Trial], dict]:
    """Records and environment of a random run that lacks something a GO rests on."""
    rng = random.Random(seed)
    kinds = sorted({t.kind for t in WHOLE})
    backends = sorted({t.backend for t in WHOLE if t.backend})
    mode = seed % 7
    if mode == 0:  # some records
        trials = [t for t in WHOLE if rng.random() < rng.choice([0.02, 0.3, 0.9])]
    elif mode == 1:  # one backend
        only = rng.choice(backends)
        trials = [t for t in WHOLE if t.backend in (None, only)]
    elif mode == 2:  # some kinds
        some = rng.sample(kinds, k=len(kinds) // 2)
        trials = [t for t in WHOLE if t.kind in some]
    elif mode == 3:  # many damaged
        trials = [damaged(t, rng) if rng.random() < 0.3 else t for t in WHOLE]
    elif mode == 4:  # two machines in one file
        trials = [t.model_copy(update={"environment": "env-b"}) if rng.random() < 0.5 else t for t in WHOLE]
    elif mode == 5:  # a run that died
        trials = WHOLE[: rng.randrange(len(WHOLE) - 4)]
    else:  # none
        trials = []
    environment = synthetic.environment(rng.choice(["SYNTHETIC H200", "SYNTHETIC H100", None]) if mode != 4 else "A")
    for key in rng.sample(["before", "after", "git", "kernels", "date"], k=rng.randrange(3)):
        environment[key] = None
    return trials, environment


@pytest.mark.slow
@pytest.mark.parametrize("seed", first(SEEDS, 2))
def test_any_records_make_a_page_and_none_says_go(tmp_path, seed):
    trials, environment = drawn(seed)
    run = synthetic.write_run(tmp_path / "run", trials, environment)
    decision = verdict.judge(run)
    text = page_text(run)
    said = re.search(r'class="fc-verdict"><span class="fc-small">Verdict</span> ([A-Z-]+)<', text)[1]
    assert said == decision.verdict
    # Without a GPU the figures are those of the committed recorded run, which may well say GO, and the page says whose.
    assert said != "GO" or (environment["gpu"] is None and "Recorded on" in text)
    fourth = tables.fault_counts(verdict.gather(run).gpu_trials) or "Memory saved</h2>" in text
    assert text.count('class="fc-card-title"') == (4 if fourth else 3) and len(text) < 2_000_000
    assert "Traceback" not in text and "<b>it</b>" not in text.split('id="fc-records"')[0]


@pytest.mark.slow
def test_the_whole_run_says_go_so_that_the_others_are_held_back_by_what_they_lack(tmp_path):
    run = synthetic.write_run(tmp_path / "run", WHOLE, synthetic.environment())
    text = page_text(run)
    assert verdict.judge(run).verdict == "GO" and "Nothing blocks" in text and "could not be drawn" not in text


def every_sort(lines: list[bytes], most: int = 3) -> list[bytes]:
    """A few records of each sort that a whole run holds."""
    kept: Counter = Counter()
    found = []
    for line in lines:
        fields = json.loads(line)
        data = fields.get("data", {})
        sort = (fields["kind"], *(str(data.get(key)) for key in ("what", "group", "outcome")), fields.get("status"))
        kept[sort] += 1
        found += [line] if kept[sort] <= most or fields["kind"] == "notebook" else []
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", first(range(20), 2))
def test_a_record_that_makes_no_sense_costs_no_more_than_its_own_part(tmp_path, seed):
    """Values of any place in a few records changed, of every kind that a run on a GPU holds."""
    rng, recorded = random.Random(seed), data_dir("reports") / "recorded" / "h100"
    lines = every_sort((recorded / "records.jsonl").read_bytes().splitlines())
    run = RunFolder.create(tmp_path / "run")
    (run.path / "environment.json").write_bytes((recorded / "environment.json").read_bytes())
    for at in rng.sample(range(len(lines)), 12):
        how, value, raw = mutations.value_changed(rng, json.loads(lines[at]))
        if not how.startswith("schema_version"):  # a newer one is refused, and rightly makes no page
            lines[at] = mutations.written(value, raw)
    run.records_path.write_bytes(b"".join(line + b"\n" for line in lines))
    text = page_text(run).split('id="fc-records"')[0]
    assert mutations.MARKUP not in text and text.count("<h2") > 8
    assert text.count("could not be drawn") <= 3, "one part's trouble is not another's"


REQUIRED = [t for t in WHOLE if t.kind in ("correctness", "attention_timing", "notebook")]


@pytest.mark.parametrize("seed", first(range(40), 6))
def test_no_verdict_survives_the_loss_of_what_it_rests_on(tmp_path: Path, seed):
    """Of every kind, backend and problem that the gates ask for: left out, failed, stale, or of another machine."""
    rng = random.Random(1000 + seed)
    target = rng.choice(
        [t for t in REQUIRED if t.kind == "notebook" or (t.backend in ("wmma", "cpu") and t.kind == "correctness")]
    )
    way = rng.choice(["gone", "error", "machine", "source"])
    if target.kind == "notebook" and way in ("machine", "source"):
        way = "gone"
    if way == "gone" and target.kind == "correctness":
        way = "error"  # fewer checks are fewer checks, and no doubt
    if way == "source" and target.source_hash is None:
        way = "machine"
    changes = {
        "error": {"status": "error", "reason": "it broke"}, "machine": {"environment": "env-b"},
        "source": {"source_hash": "0" * 16},
    }.get(way)  # fmt: skip
    trials = [t if t is not target else t.model_copy(update=changes or {}) for t in WHOLE if t is not target or changes]
    run = synthetic.write_run(tmp_path / "run", trials, synthetic.environment())
    assert verdict.judge(run).verdict != "GO", f"{way}: {target.kind} {target.backend} {target.problem}"
