"""One survey of everything, which several files of this folder read."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paging_surveys import PLAN
from support.sharing import made_once

from flashcore.records import RunFolder
from flashcore.surveys.paging.measuring import WHATS, measure


@pytest.fixture(scope="session")
def surveyed(shared_folder) -> RunFolder:
    """Everything, times included, at the CPU's sizes; measured once, for tests that only read it."""
    return RunFolder(made_once(shared_folder / "surveyed", survey))


def survey(folder: Path) -> None:
    run, said = RunFolder.create(folder), []
    trials = measure(run, PLAN, what=",".join(WHATS), progress=said.append)
    assert trials == [t for t in run.trials() if t.kind == "paging"]
    assert {line.split(":")[0] for line in said} == set(WHATS)
