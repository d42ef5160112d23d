"""The file that says how Slurm starts workers, its errors in one sentence, and jobs of a made-up sbatch."""

from __future__ import annotations

import os
import stat
import sys

import pytest
from support.cluster_tasks import count

from flashcore.errors import ClusterError
from flashcore.gpu import device
from flashcore.measure.cluster import slurm, starting
from flashcore.measure.cluster.tasks import Task, Work

WHOLE = """
[slurm]
cards = 2
queue = "hopper"
account = "attention"
walltime = "00:20:00"
memory = "32 GiB"
cores = 4
gres = "gpu:h200:1"
directives = ["--exclusive"]
setup = ["source env.sh"]
interface = "ib0"
"""


def written(folder, text):
    path = folder / "slurm.toml"
    path.write_text(text)
    return path


def command(folder, name, text):
    """A program of that name, for a PATH that begins with the folder."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_file_becomes_the_options_of_one_job_a_card(tmp_path):
    asked = slurm.read(written(tmp_path, WHOLE))
    told = slurm.options(asked)
    assert asked.cards == 2 and (told["cores"], told["processes"], told["job_cpu"]) == (1, 1, 4)
    assert told["job_extra_directives"] == ["--gres=gpu:h200:1", "--exclusive"]
    assert told["worker_extra_args"] == ["--resources", "GPU=1"] and told["job_script_prologue"][0] == "source env.sh"


def test_the_job_that_slurm_gets_says_all_of_it(tmp_path):
    jobqueue = pytest.importorskip("dask_jobqueue", reason="the extra 'cluster' is not installed")
    options = slurm.options(slurm.read(written(tmp_path, WHOLE))) | {"interface": None, "python": "/opt/python"}
    job = jobqueue.slurm.SLURMJob("tcp://10.0.0.1:8786", name="one", **{k: v for k, v in options.items() if k != "x"})
    script = job.job_script()
    for line in ("#SBATCH -p hopper", "#SBATCH -A attention", "#SBATCH --gres=gpu:h200:1", "#SBATCH -t 00:20:00",
                 "#SBATCH --cpus-per-task=4", "source env.sh"):  # fmt: skip
        assert line in script, script
    assert "/opt/python -m distributed.cli.dask_worker tcp://10.0.0.1:8786" in script
    assert "--nthreads 1" in script and "--resources GPU=1" in script


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[slurm\n", r"is no TOML: .*line 1"),
        ("cards = 2\n", r"has the entry 'cards'; all that it may hold is one table \[slurm\]"),
        ("", r"has no table \[slurm\]"),
        ("[slurm]\nqueue = 'x'\n", "is wrong: it does not say 'cards'"),
        ("[slurm]\ncards = 0\n", "'cards' is 0: input should be greater than or equal to 1"),
        ("[slurm]\ncards = '2'\n", "'cards' is '2': input should be a valid integer"),
        ("[slurm]\ncards = 2\npartition = 'x'\n", "has no option 'partition'; the options are cards, queue"),
        ("[slurm]\ncards = 2\nwalltime = 'soon'\n", "'walltime' is 'soon'; write it as in '01:30:00'"),
        ("[slurm]\ncards = 2\nwait_s = inf\n", "'wait_s' is inf: input should be a finite number"),
        ("[slurm]\ncards = 2\nmemory = 'lots'\n", "'memory' is 'lots'; write it as in '64 GiB'"),
    ],
)
def test_a_file_with_an_error_is_refused_in_one_sentence(tmp_path, text, words):
    with pytest.raises(ClusterError, match=words) as caught:
        slurm.read(written(tmp_path, text))
    assert str(caught.value).startswith(f"The Slurm file {tmp_path}/slurm.toml") and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ClusterError, match="nothing.toml cannot be read"):
        slurm.read(tmp_path / "nothing.toml")


@pytest.mark.slow
def test_without_sbatch_the_file_names_a_cluster_that_is_not_here(tmp_path, monkeypatch):
    pytest.importorskip("dask_jobqueue", reason="the extra 'cluster' is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = slurm.read(written(tmp_path, "[slurm]\ncards = 1\n"))
    with pytest.raises(ClusterError, match="There is no sbatch here"):
        slurm.started(asked)
    command(tmp_path, "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    with pytest.raises(
        ClusterError, match="Slurm does not take the jobs: sbatch: error: invalid partition .*: x; mend"
    ):
        slurm.started(asked)


@pytest.mark.slow
@pytest.mark.skipif(device.has_gpu(), reason="CPU workers stand for cards where there are none")
def test_jobs_that_slurm_starts_work_for_the_report(tmp_path, monkeypatch):
    """An sbatch that runs the script here, and an scancel that ends it, stand for Slurm."""
    pytest.importorskip("dask_jobqueue", reason="the extra 'cluster' is not installed")
    log = tmp_path / "log"
    test = '[ "$1" = --test-only ] && exit 0\n'
    command(
        tmp_path,
        "sbatch",
        f'{test}cp "$1" {log}.sh\nsetsid bash {log}.sh > {log} 2>&1 &\necho "Submitted batch job $!"\n',
    )
    command(tmp_path, "scancel", 'kill -9 -- "-$1"\n')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    file = written(tmp_path, "[slurm]\ncards = 1\ngres = ''\ncores = 1\nmemory = '1 GiB'\nwait_s = 60.0\n")
    with starting.spread(cluster=file) as pool:
        [found] = pool.perform([Work([Task("count", count, (4,))])], lambda trial: trial)
    assert [t.data["number"] for t in found] == [4]
