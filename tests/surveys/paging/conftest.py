"""One survey of everything, which several files of this folder read."""

from __future__ import annotations

import pytest
from support.paging_surveys import PLAN

from flashcore.records import RunFolder
from flashcore.surveys.paging.measuring import WHATS, measure


@pytest.fixture(scope="session")
def surveyed(tmp_path_factory) -> RunFolder:
    """Everything, times included, at the CPU's sizes; measured once, for tests that only read it."""
    run = RunFolder.create(tmp_path_factory.mktemp("surveyed") / "run")
    said = []
    trials = measure(run, PLAN, what=",".join(WHATS), progress=said.append)
    assert trials == [t for t in run.trials() if t.kind == "paging"]
    assert {line.split(":")[0] for line in said} == set(WHATS)
    return run
