"""Addresses at which no scheduler answers: one sentence each, at once, and nothing left behind."""

from __future__ import annotations

import gc
import os
import socket

import pytest

from flashcore.errors import ClusterError
from flashcore.measure.cluster import pools, starting


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_an_error_and_nothing_is_left_behind(monkeypatch):
    pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
    monkeypatch.setattr("flashcore.measure.cluster.connecting.CONNECT_S", 0.5)
    for address in ("tcp://127.0.0.1:9", "nonsense"):
        with pytest.raises(ClusterError, match=f"No scheduler answers at {address} .*start one with 'dask scheduler'"):
            with starting.spread(scheduler=address):
                pass
    assert pools.SCHEDULER not in os.environ


@pytest.mark.slow
def test_somebody_who_takes_the_connection_and_says_nothing_is_no_scheduler(monkeypatch):
    pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
    monkeypatch.setattr("flashcore.measure.cluster.connecting.CONNECT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"No scheduler answers at {address} .it says nothing that Dask unders"):
            with starting.spread(scheduler=address):
                pass


@pytest.mark.slow
@pytest.mark.parametrize(("address", "why"), [("", "no address .missing port number"), ("127.0.0.1", "missing port"),
                                              ("http://127.0.0.1:9", "unknown address scheme 'http'")])  # fmt: skip
def test_an_address_that_is_none_is_told_at_once(address, why, capfd, monkeypatch):
    """Dask's client would wait for twenty seconds, and leave a traceback."""
    pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")

    def waits(*_, **__):
        raise AssertionError("Dask's client was asked")

    monkeypatch.setattr("distributed.Client", waits)
    with pytest.raises(ClusterError, match=f"No scheduler answers at .*{why}.*start one with 'dask scheduler'"):
        with starting.spread(scheduler=address):
            pass
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_of_dask_is_no_scheduler(monkeypatch):
    pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
    monkeypatch.setattr("flashcore.measure.cluster.connecting._asked_what_it_is", lambda address: "Worker")
    with pytest.raises(ClusterError, match="What answers at tcp://box:1 is a Worker of Dask, and no scheduler; start"):
        with starting.spread(scheduler="tcp://box:1"):
            pass
