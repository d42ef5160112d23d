"""Find the scheduler of Dask at an address, or say in a sentence why there is none."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from typing import Any

from flashcore.errors import ClusterError, FlashCoreError, ToolMissing

CONNECT_S = 10.0
"""Seconds that a scheduler may take to answer."""


def connected(address: str) -> Any:
    """A `distributed.Client` of the scheduler at this address.

    Raises
    ------
    ClusterError
        Nothing answers there within `CONNECT_S`, or something that is no scheduler of Dask.
    ToolMissing
        Dask is not installed.
    """
    try:
        import dask
        from distributed import Client
    except ImportError as error:
        raise ToolMissing("Dask", "pip install 'flashcore[cluster]'") from error
    dask.config.set({"distributed.comm.timeouts.connect": f"{CONNECT_S:g}s"})
    fix = "start one with 'dask scheduler', and give the address that it prints"
    try:
        kind = _asked_what_it_is(address)
        if kind == "Scheduler":
            return Client(address, timeout=CONNECT_S, set_as_default=False, name=f"flashcore-{os.getpid()}")
    except FlashCoreError:
        raise
    except Exception as error:  # an address that is none, nobody there, or somebody who speaks otherwise
        said = " ".join(str(error).split())[:120].rstrip(".") or "it says nothing that Dask understands"
        raise ClusterError(f"No scheduler answers at {address or 'no address'} ({said}); {fix}.") from error
    raise ClusterError(f"What answers at {address} is a {kind} of Dask, and no scheduler; {fix}.")


def _asked_what_it_is(address: str) -> str:
    """What kind of Dask's servers answers at an address.

    Dask's client waits for ever where somebody takes the connection and says nothing, and leaves a traceback where the
    address is none. So it is asked here first, in a thread of its own, since a notebook's thread has a loop that runs.

    Raises
    ------
    Exception
        Whatever the connection fails with; `TimeoutError` without words where no answer comes.
    """
    from distributed.comm import connect
    from distributed.security import Security

    async def ask() -> str:
        there = await connect(address, timeout=CONNECT_S, **Security().get_connection_args("client"))
        try:
            await there.write({"op": "identity", "reply": True})
            told = await there.read()
        finally:
            there.abort()
        return str(told["type"])

    told: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()

    def in_a_loop() -> None:
        try:
            told.put(asyncio.run(asyncio.wait_for(ask(), CONNECT_S + 1.0)))
        except Exception as error:
            told.put(error)

    threading.Thread(target=in_a_loop, name="flashcore-asks", daemon=True).start()
    try:
        found = told.get(timeout=CONNECT_S + 5.0)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise found
    return found
