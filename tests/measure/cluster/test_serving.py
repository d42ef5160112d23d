"""What a Dask worker does with a call: a clean process answers, and its death is an answer too."""

from __future__ import annotations

import os

import pytest
from support.cluster_tasks import count, die, nap, refuse

from flashcore.measure.cluster import serving
from flashcore.measure.cluster.tasks import packed

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _closed():
    yield
    serving._worker.close()


def test_another_process_answers_and_stays_warm():
    told = serving.answer(packed(count, (3,)), 60.0)
    again = serving.answer(packed(count, (4,)), 60.0)
    assert told.ok and told.value[0].data["number"] == 3
    assert again.value[0].data["pid"] == told.value[0].data["pid"] != os.getpid()


def test_what_a_function_raises_is_no_crash_and_what_kills_or_hangs_is_one():
    told = serving.answer(packed(refuse), 60.0)
    assert (told.ok, told.how, told.crashed) == (False, "raised", False) and "cannot be measured" in told.reason
    told = serving.answer(packed(die), 60.0)
    assert (told.how, told.crashed) == ("signal", True) and "SIGKILL" in told.reason
    told = serving.answer(packed(nap, (60.0,)), 0.2)
    assert (told.how, told.crashed) == ("timeout", True) and "0.2 s" in told.reason
    assert serving.answer(packed(count, (5,)), 60.0).ok, "the process that died is replaced"
