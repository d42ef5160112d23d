"""SYNTHETIC runs of many records, to see what reading them costs: invented numbers, and nothing was measured.

The mix is that of a real run: checks first, then planted bugs, products, timings, and the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import cycle, islice
from pathlib import Path

from flashcore.records import RunFolder, Trial
from support import synthetic_records as synthetic

BEGAN = datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC)


def _patterns() -> list[Trial]:
    """One record of each sort, as a run holds them."""
    problems, backends = synthetic.problems(), list(synthetic.SPEED)
    checks = [synthetic.correctness(backend, problem) for problem in problems for backend in backends]
    timings = [
        synthetic.timing(b, p, synthetic.latency_of(b, p, synthetic.SPEED), round_=f"round-{n}")
        for n, p in enumerate(problems)
        for b in backends
    ]
    common = {"environment": synthetic.ENV_ID, "backend": "wmma", "source_hash": synthetic.source_hash("wmma")}
    faults = [
        Trial(
            kind="fault", **common, problem=problem,
            data={"fault": f"F{n}", "expected": "scores", "found": "scores", "outcome": "found", "title": "a bug"},
        )
        for n, problem in enumerate(problems[:20], start=1)
    ]  # fmt: skip
    products = [
        Trial(
            kind="gemm_candidate", backend="cublaslt", environment=synthetic.ENV_ID,
            timing={"method": "graph_replay", "latency_us": 40.0 + n, "samples_us": [40.0 + n] * 5},
            data={"group": "grid", "product": "scores", "m": 128 * (n + 1), "n": 2048, "k": 64, "rank": n,
                  "algorithm": {"id": n, "tile": 20, "stages": 14, "split_k": 1, "swizzle": 0}},
        )
        for n in range(40)
    ]  # fmt: skip
    return [*checks, *checks, *faults, *products, *timings]


def lines(count: int) -> Iterator[str]:
    """`count` lines of records, each with a time of its own; the last ones say that the notebooks finished."""
    ends = [synthetic.finished(name) for name in synthetic.NOTEBOOKS]
    bodies = [trial.model_dump(mode="json", exclude_none=True) for trial in _patterns()]
    for number, body in enumerate(islice(cycle(bodies), count - len(ends))):
        when = BEGAN + timedelta(milliseconds=10 * number)
        yield json.dumps({**body, "time": when.isoformat(timespec="milliseconds")}, separators=(",", ":")) + "\n"
    for trial in ends:
        yield trial.model_dump_json() + "\n"


def write_large_run(folder: Path, count: int, **changes) -> RunFolder:
    """A run folder of `count` records, with an environment whose fields `changes` replace."""
    run = RunFolder.create(folder)
    run.environment_path.write_text(json.dumps(synthetic.environment(**changes)), encoding="utf-8")
    with run.records_path.open("w", encoding="utf-8") as file:
        file.writelines(lines(count))
    return run
