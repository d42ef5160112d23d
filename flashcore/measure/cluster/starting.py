"""Start workers, or join those that run: one a card of this box, a scheduler's, or jobs of Slurm."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashcore.errors import ClusterError, ToolMissing
from flashcore.gpu import device
from flashcore.gpu.cache import keeping_kernels
from flashcore.measure.cluster import slurm
from flashcore.measure.cluster.hands import num_threads
from flashcore.measure.cluster.pools import SCHEDULER
from flashcore.measure.cluster.seats import CREW, HOST, threads_of
from flashcore.measure.cluster.sharing import asked_size, crew_size, host_bytes, host_size
from flashcore.measure.cluster.spreading import Spread

START_S = 180.0
"""Seconds that workers of this box may take to start Python and torch, and to find their card."""
JOIN_S = 60.0
"""Seconds that workers of a running scheduler may take to say what they are."""
MOST_WORKERS = 64
DEAF = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
"""What a worker of this box runs first: Ctrl-C reaches all processes of a terminal, and ours ends the workers."""


@contextlib.contextmanager
def spread(
    *,
    gpus: int | str | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    cluster: str | Path | None = None,
    mixed: bool = False,
    say: Callable[[str], None] | None = None,
) -> Iterator[Spread]:
    """Workers for a while; processes that are started meanwhile, such as notebooks' kernels, use them by `pool`.

    Parameters
    ----------
    gpus
        Cards of this box: a number, or ``all``.
    workers
        That many processes of this box's CPU: the same engine without a card.
    scheduler
        Address of a Dask scheduler whose workers to use, such as ``tcp://10.0.0.1:8786``.
    cluster
        A TOML file for Slurm (see `flashcore.measure.cluster.slurm`).
    mixed
        Take cards of different kinds, as no report does.
    say
        Told in a line what is started, and where Dask's dashboard is.

    Raises
    ------
    ClusterError
        More cards are asked for than there are, nothing answers, or a worker does not start or cannot be used; or not
        exactly one of the four is given.
    ToolMissing
        Dask is not installed.
    """
    given = {"--gpus": gpus, "--workers": workers, "--scheduler": scheduler, "--cluster": cluster}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ClusterError(f"{' and '.join(named) or 'No option'} name the workers; give one of {', '.join(given)}.")
    say = say or (lambda line: None)
    with contextlib.ExitStack() as stack:
        if scheduler is not None:
            address, count, timeout_s = scheduler, None, JOIN_S
            say(f"Joining the scheduler at {address} ...")
        elif cluster is not None:
            asked = slurm.read(cluster)
            say(f"Asking Slurm for {asked.cards} jobs, one card each ...")
            started = slurm.started(asked)
            stack.callback(started.close)
            address, count, timeout_s = started.scheduler_address, asked.cards, asked.wait_s
        else:
            cards = _cards(gpus) if gpus is not None else None
            count, timeout_s = _checked(workers) if cards is None else len(cards), START_S
            say(f"Starting {count} workers, one a {'process' if cards is None else 'card'} ...")
            started = _local(cards, count)
            stack.callback(started.close)
            address = started.scheduler_address
        pool = Spread(address, mixed=mixed)
        stack.callback(pool.close)
        pool.await_workers(count, timeout_s=timeout_s)
        for place in pool.places:
            say(f"  {place.label}: {place.gpu or 'no GPU'}")
        say(_dashboard(pool))
        stack.enter_context(_named(address))
        yield pool


def _cards(gpus: int | str) -> list[str]:
    """The cards to use, as CUDA_VISIBLE_DEVICES of one worker each."""
    import torch

    there = torch.cuda.device_count() if device.has_gpu() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = [part.strip() for part in named.split(",")][:there] if named else [str(i) for i in range(there)]
    if gpus == "all":
        if not cards:
            raise ClusterError("This machine has no GPU that torch can use; leave --gpus out, or try --workers N.")
        return cards
    try:
        wanted = int(gpus)
    except ValueError:
        wanted = 0
    if wanted < 1:
        raise ClusterError(f"--gpus is '{gpus}'; give a number of cards from 1 on, or 'all'.")
    if wanted > len(cards):
        raise ClusterError(f"{wanted} GPUs are asked for and this machine has {len(cards)}; give --gpus {len(cards)}."
                           if cards else "This machine has no GPU that torch can use; leave --gpus out, or try "
                                         "--workers N.")  # fmt: skip
    return cards[:wanted]


def _checked(workers: int | None) -> int:
    if workers is None or not 1 <= workers <= MOST_WORKERS:
        raise ClusterError(f"--workers is {workers}; give a number from 1 to {MOST_WORKERS}.")
    if device.has_gpu():
        raise ClusterError(
            "--workers spreads work over CPU processes and this machine has a GPU; use --gpus, or hide the GPU by "
            "CUDA_VISIBLE_DEVICES=''."
        )
    return workers


def _local(cards: list[str] | None, count: int) -> Any:
    """A scheduler in this process and a worker process for each card, which Dask's nanny starts again when it dies."""
    try:
        from distributed import Nanny, Scheduler, SpecCluster
    except ImportError as error:
        raise ToolMissing("Dask", "pip install 'flashcore[cluster]'") from error
    threads = num_threads(max(1, (os.cpu_count() or 1) // count))
    offered = {"CPU": 1} if cards is None else {"GPU": 1, **_crew(count)}
    workers = {}
    for number in range(count):
        # Dask's nanny would set one thread for each of these.
        env = {name: os.environ.get(name, given) for name, given in threads.items()}
        env |= {name: value for name, value in keeping_kernels().items() if name not in os.environ}
        env["CUDA_VISIBLE_DEVICES"] = "" if cards is None else cards[number]
        options = {"nthreads": threads_of(offered), "resources": offered, "memory_limit": 0, "dashboard": False,
                   "env": env, "host": "127.0.0.1", "name": str(number), "silence_logs": "ERROR",
                   "preload": DEAF}  # fmt: skip
        workers[number] = {"cls": Nanny, "options": options}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard": True,
                                               "dashboard_address": "127.0.0.1:0"}}  # fmt: skip
    try:
        return SpecCluster(workers=workers, scheduler=scheduler, name="flashcore", silence_logs="ERROR")
    except (OSError, RuntimeError) as error:  # a port or a process that the machine does not give, a worker that dies
        said = " ".join(str(error).split()).rstrip(".")
        raise ClusterError(
            f"The workers of this machine do not start ({type(error).__name__}: {said}); ask for fewer, or leave the "
            "option out."
        ) from error


def _crew(cards: int) -> dict[str, int]:
    """The processes that each of some cards of this box gets beside the one that times, as resources of its worker."""
    if not device.is_shared():
        return {}
    cores = os.cpu_count() or 1
    size = asked_size() or crew_size(cores, device.memory_bytes(), host_bytes(), cards)
    return {CREW: size, HOST: host_size(cores, cards)} if size > 1 else {}


def _dashboard(pool: Spread) -> str:
    try:
        import bokeh  # noqa: F401 - what Dask's dashboard is made of
    except ImportError:
        return "Dask's dashboard needs bokeh; pip install 'flashcore[cluster]' brings it."
    return f"Dask's dashboard: {pool.client.dashboard_link}"


_naming = threading.RLock()
"""Held while processes that are started find a scheduler: by the environment, which is that of all threads."""


@contextlib.contextmanager
def _named(address: str) -> Iterator[None]:
    """Let processes that are started meanwhile find the scheduler."""
    if not _naming.acquire(blocking=False):
        raise ClusterError(
            "Another thread of this process has workers already, and what is started now would not know which ones are "
            "meant; wait until it has given them up, or use a process of its own."
        )
    before = os.environ.get(SCHEDULER)
    os.environ[SCHEDULER] = address
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(SCHEDULER, None)
        else:
            os.environ[SCHEDULER] = before
        _naming.release()
