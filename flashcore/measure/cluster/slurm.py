"""Read the file that says how Slurm starts workers, one job a card, and start them through dask-jobqueue."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashcore.errors import ClusterError, ToolMissing
from flashcore.paths import absolute

TABLE = "slurm"
TEST_S = 60.0
"""Seconds that sbatch may take to look at a job."""


class Slurm(BaseModel):
    """The table ``[slurm]`` of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    cards: int = Field(ge=1)
    """How many jobs to ask for, each with one card and one worker."""
    queue: str | None = None
    """The partition."""
    account: str | None = None
    walltime: str = "01:00:00"
    """After which Slurm ends a job, as ``hours:minutes:seconds``."""
    memory: str = "64 GiB"
    """Of the node, for each job."""
    cores: int = Field(default=8, ge=1)
    """Of the node, for each job."""
    gres: str = "gpu:1"
    """What a job asks for by ``--gres``; empty for workers without a card."""
    directives: list[str] = []
    """Further options of sbatch, such as ``--constraint=h200``."""
    setup: list[str] = []
    """Lines of shell that run before the worker, such as the activation of an environment."""
    python: str | None = None
    """The interpreter on the nodes; by default the path of this one."""
    interface: str | None = None
    """The network interface that nodes reach each other by, such as ``ib0``."""
    wait_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Seconds that all jobs may take to start."""


def read(path: str | Path) -> Slurm:
    """The file's table.

    Raises
    ------
    ClusterError
        The file cannot be read, is no TOML, or holds something else than it should; names the place.
    """
    path = absolute(path)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ClusterError(f"The Slurm file {path} cannot be read ({error.strerror}); name one that exists.") from error
    except ValueError as error:  # of tomllib, or bytes that are no text
        raise ClusterError(f"The Slurm file {path} is no TOML: {str(error).rstrip('.')}.") from error
    other = sorted(found.keys() - {TABLE})
    if other or not isinstance(found.get(TABLE), dict):
        what = f"the entry '{other[0]}'" if other else f"no table [{TABLE}]"
        raise ClusterError(f"The Slurm file {path} has {what}; all that it may hold is one table [{TABLE}].")
    try:
        slurm = Slurm(**found[TABLE])
    except (ValidationError, TypeError) as error:
        raise ClusterError(f"The Slurm file {path} is wrong: {_first(error)}.") from error
    for name, form, example in (("walltime", r"(\d+-)?\d+(:\d{2}){1,2}", "01:30:00"),
                                ("memory", r"\d+(\.\d+)? ?([KMGT]i?)?B", "64 GiB")):  # fmt: skip
        if not re.fullmatch(form, getattr(slurm, name)):
            raise ClusterError(
                f"The Slurm file {path} is wrong: '{name}' is '{getattr(slurm, name)}'; write it as in '{example}'."
            )
    return slurm


def _first(error: ValidationError | TypeError) -> str:
    """The first thing that is wrong, as a clause."""
    if isinstance(error, TypeError):
        return str(error)
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"it has no option '{name}'; the options are {', '.join(Slurm.model_fields)}"
    if first["type"] == "missing":
        return f"it does not say '{name}'"
    return f"'{name}' is {first.get('input')!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def options(slurm: Slurm) -> dict[str, Any]:
    """What `dask_jobqueue.SLURMCluster` is told: one process of one thread a job, with one card."""
    return {
        "queue": slurm.queue, "account": slurm.account, "walltime": slurm.walltime, "memory": slurm.memory,
        "cores": 1, "processes": 1, "job_cpu": slurm.cores, "python": slurm.python, "interface": slurm.interface,
        "job_extra_directives": [*([f"--gres={slurm.gres}"] if slurm.gres else []), *slurm.directives],
        "job_script_prologue": [*slurm.setup, f"export OMP_NUM_THREADS={slurm.cores}"],
        "worker_extra_args": ["--resources", f"{'GPU' if slurm.gres else 'CPU'}=1"],
    }  # fmt: skip


def started(slurm: Slurm) -> Any:
    """A cluster whose jobs are asked for; closing it ends them.

    Raises
    ------
    ToolMissing
        dask-jobqueue is not installed.
    ClusterError
        There is no sbatch here, or it refuses the job.
    """
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise ToolMissing("dask-jobqueue", "pip install 'flashcore[cluster]'") from error
    if shutil.which("sbatch") is None:
        raise ClusterError("There is no sbatch here; use --cluster on a machine from which jobs of Slurm are started.")
    told = {name: value for name, value in options(slurm).items() if value is not None}
    try:
        cluster = SLURMCluster(**told, scheduler_options={"dashboard_address": ":0"})
    except Exception as error:  # an interface that is not there, most likely
        raise ClusterError(f"The jobs of Slurm cannot be prepared: {_line(str(error))}; mend the file.") from error
    try:
        _refuse_what_sbatch_refuses(cluster.job_script())
        cluster.scale(jobs=slurm.cards)
    except BaseException:
        cluster.close()
        raise
    return cluster


def _refuse_what_sbatch_refuses(script: str) -> None:
    """Let sbatch look at the job without starting it: what is wrong is then said before anybody waits."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        try:
            done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True, timeout=TEST_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ClusterError(f"sbatch does not answer ({_line(str(error))}); see that Slurm works here.") from error
    if done.returncode:
        raise ClusterError(f"Slurm does not take the jobs: {_line(done.stderr or done.stdout)}; mend the file.")


def _line(text: str) -> str:
    """What a program said, on one line and without a full stop."""
    return (" ".join(text.split())[:300] or "it did not say why").rstrip(".")
