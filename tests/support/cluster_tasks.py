"""Tasks for workers of tests: other processes have to be able to import them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from flashcore.records import Trial


def count(number: int):
    """One trial that holds a number, and the process that made it."""
    yield Trial(kind="correctness", data={"number": number, "pid": os.getpid()})


def threads_given():
    """One trial that holds how many threads this process was given."""
    yield Trial(kind="correctness", data={"number": os.environ.get("OMP_NUM_THREADS"), "pid": os.getpid()})


def nap(seconds: float):
    """One trial after a while."""
    time.sleep(seconds)
    yield Trial(kind="correctness", data={"slept": seconds, "pid": os.getpid(), "ended": time.time()})


def meet(folder: str, name: str, number: int, seconds: float = 120.0):
    """Come to a folder and wait there until so many have come; says whether they did, as they do only side by side."""
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / name).touch()
    wait_until(lambda: len(os.listdir(folder)) >= number, seconds)
    met = len(os.listdir(folder)) >= number
    yield Trial(kind="correctness", data={"met": met, "pid": os.getpid()})


def await_file(path: str, seconds: float = 120.0):
    """One trial once there is a file; says whether it came."""
    wait_until(Path(path).exists, seconds)
    yield Trial(kind="correctness", data={"came": Path(path).exists(), "pid": os.getpid()})


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)


def nap_until(path: str, seconds: float):
    """Say in a file which process works on this, then sleep; whoever finds the file there already does not."""
    file = Path(path)
    first = not file.exists()
    if first:
        file.write_text(f"{os.getpid()} {os.getppid()}")
        time.sleep(seconds)
    yield Trial(kind="correctness", data={"first": first, "pid": os.getpid()})


def hang(path: str):
    """Hang the first time, as a kernel does that never ends."""
    yield from nap_until(path, 1e4)


def stop_worker(path: str):
    """Stop the Dask worker above this process the first time, so that nobody answers for it."""
    file = Path(path)
    if not file.exists():
        file.write_text(f"{os.getppid()}")
        os.kill(os.getppid(), signal.SIGSTOP)
    yield Trial(kind="correctness", data={"pid": os.getpid()})


def die():
    """Take the process with it, every time."""
    os.kill(os.getpid(), signal.SIGKILL)
    yield Trial(kind="correctness")


def refuse():
    """Raise, every time."""
    raise ValueError("this cannot be measured")
    yield Trial(kind="correctness")


def lose_card(path: str):
    """Lose the CUDA context the first time, as a kernel does that reads where it must not."""
    file = Path(path)
    first = not file.exists()
    if first:
        file.write_text(f"{os.getpid()} {os.getppid()}")
        import torch

        index = torch.tensor([1 << 30], device="cuda")
        torch.zeros(1, device="cuda")[index]  # a device-side assertion, after which nothing launches any more
        torch.cuda.synchronize()
    yield Trial(kind="correctness", data={"first": first, "pid": os.getpid()})
