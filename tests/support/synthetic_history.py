"""SYNTHETIC runs over time: one timing repeated with known changes and known noise. Nothing here was measured."""

from __future__ import annotations

import random
from collections import Counter

from flashcore.page import history
from flashcore.page.history.runs import Snapshot
from flashcore.problem import PRESETS
from support import synthetic_records as synthetic

REPORT = PRESETS["report"]
OURS_US, PEER_US = 500.0, 600.0
KEPT = [p for p in synthetic.problems() if p.seqlen_q <= 2048][:12]


def timing(backend, us, noise, *, seed, problem=REPORT, samples=30, **changes):
    """A SYNTHETIC timing: the latency, and how much its samples scatter."""
    rng = random.Random(f"{seed} {backend} {problem.label()}")
    taken = [us * max(0.05, rng.gauss(1.0, noise)) for _ in range(samples)]
    trial = synthetic.timing(backend, problem, us, round_=f"round {problem.label()}", **changes)
    return trial.model_copy(update={"timing": trial.timing.model_copy(update={"samples_us": taken, "latency_us": us})})


def snapshot(name="now", *, faster=1.0, noise=0.005, samples=30, peers=True, clock=1.0, trials=None, **environment):
    """A SYNTHETIC run: wmma beside two peers at twelve problems; `clock` scales all of it alike."""
    if trials is None:
        trials = []
        for problem in [REPORT, *(p for p in KEPT if p != REPORT)]:
            common = {"seed": name, "problem": problem, "samples": samples}
            trials.append(timing("wmma", OURS_US / faster / clock, noise, **common))
            if peers:
                trials.append(timing("sdpa-cudnn", PEER_US / clock, noise, **common))
                trials.append(timing("sdpa-flash", 1.5 * PEER_US / clock, noise, **common))
    return Snapshot(name, tuple(trials), synthetic.environment(**environment))


def words(before, now, backend="wmma"):
    return Counter(row.word for row in history.compare_runs(before, now).rows if row.backend == backend)


def at_report(comparison, backend="wmma"):
    return next(r for r in comparison.rows if r.backend == backend and r.problem == REPORT.label())


def write(folder, run, date, **environment):
    env = synthetic.environment(**{"date": date, **environment})
    trials = [*run.trials, *(synthetic.finished(n) for n in synthetic.NOTEBOOKS)]
    return synthetic.write_run(folder / run.name, trials, env)


def one(**changes):
    return snapshot(trials=[timing("wmma", OURS_US, 0.005, seed="now", **changes)])


def retimed(**changes):
    trial = timing("wmma", OURS_US, 0.005, seed="now")
    return snapshot(trials=[trial.model_copy(update={"timing": trial.timing.model_copy(update=changes)})])
