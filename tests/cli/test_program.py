"""The command line: exit codes, and errors in one sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import flashcore
from flashcore.cli import program
from flashcore.cli.program import app
from flashcore.errors import FlashCoreError
from flashcore.gpu import device
from flashcore.pipeline import reporting
from flashcore.records import Trial

runner = CliRunner()


def test_the_version():
    done = runner.invoke(app, ["--version"])
    assert (done.exit_code, done.stdout.strip()) == (0, f"flashcore {flashcore.__version__}")


@pytest.mark.slow
def test_help_needs_neither_torch_nor_cuda():
    program = (
        "import sys; from flashcore.cli.program import app; "
        "app(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("False")
    for command in ("report", "render", "verdict", "build", "doctor"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["bogus"], ["report", "--profile", "fast"], ["report", "--seed", "x"], ["report", "--nonsense"],
        ["report", "--backend", "wmm"], ["report", "--problem", "reprot"], ["report", "--problem", "B=0,H=1,S=8,D=64"],
        ["verdict", "no-such-run"], ["render", "no-such-run"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_usage_errors_are_exit_code_2_without_a_traceback(tmp_path, arguments):
    done = runner.invoke(app, [*arguments, *(["--out", str(tmp_path / "runs")] if len(arguments) > 1 else [])])
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["verdct", "x"], "verdict"), (["report", "--backend", "wmm"], "wmma"),
        (["report", "--problem", "latenci"], "latency"), (["bisect", "--backend", "cudnn"], "sdpa-cudnn"),
        (["bisect", "--backend", "cpu", "--fault", "F88"], "F8"), (["verdict", "--format", "markdwon"], "markdown"),
        (["bisect", "--backend", "cpu", "--pattern", "larg"], "large"),
        (["bisect", "--backend", "cpu", "--problem", "B=1,hq=2"], "Hq"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_was_probably_meant_is_asked(arguments, meant):
    done = runner.invoke(app, arguments)
    assert done.exit_code == 2 and f"Did you mean '{meant}'" in done.output


def test_the_question_is_asked_with_any_release_of_typer(monkeypatch):
    group = typer.main.get_command(app)
    monkeypatch.setattr(typer.core.TyperGroup, "resolve_command", lambda self, ctx, args: (_ for _ in ()).throw(
        program._UsageError(f"No such command '{args[0]}'.")))  # fmt: skip
    with pytest.raises(program._UsageError, match="No such command 'verdct'. Did you mean 'verdict'?"):
        group.resolve_command(group.context_class(group), ["verdct"])


def test_an_error_is_one_sentence_on_stderr_and_debug_shows_where(monkeypatch):
    def fail(*args, **kwargs):
        raise FlashCoreError("It broke [here]. Mend it so.")

    monkeypatch.setattr(reporting, "report", fail)
    done = runner.invoke(app, ["report"])
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", "It broke [here]. Mend it so.\n")
    done = runner.invoke(app, ["--debug", "report"])
    assert isinstance(done.exception, FlashCoreError)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_that_ends_a_job_ends_it_in_order(number, code):
    program = (
        "import signal, sys, time; from flashcore.cli import program, verdict; from flashcore.pipeline import folders\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored by what a shell starts in the background
        "def stuck(*_):\n"
        "    try:\n"
        "        print('begun', flush=True); time.sleep(60)\n"
        "    finally:\n"
        "        print('cleared up', flush=True)\n"
        "folders.find_run = stuck; sys.argv[1:] = ['verdict', 'x']; program.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "cleared up\n") and said.startswith("Interrupted; ")
    assert said.count("\n") == 1


def test_doctor_says_the_state_in_words_and_a_missing_gpu_is_no_failure(monkeypatch):
    checks = [
        device.Check("torch", True, "2.13", "pip install torch", True),
        device.Check("GPU", False, "none is visible", "run on an H200"),
    ]
    monkeypatch.setattr(device, "checks", lambda: checks)
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert "works" in done.stdout and "not here" in done.stdout and "run on an H200" in done.stdout
    assert "pip install torch" not in done.stdout
    checks.append(device.Check(device.COMPILER, False, "not installed", "pip install 'flashcore[compile]'"))
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 0 and "stays INCONCLUSIVE without NVRTC" in done.stdout
    checks[0] = device.Check("torch", False, "not installed", "pip install torch", True)
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 1 and "MISSING" in done.stdout and "pip install torch" in done.stdout


def test_doctor_on_this_machine():
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 0, done.stdout
    assert ("not here" in done.stdout) or device.has_gpu()


@pytest.mark.slow
def test_python_dash_m_works_from_anywhere_without_an_install(tmp_path):
    home = os.path.dirname(os.path.dirname(flashcore.__file__))
    environment = {**os.environ, "PYTHONPATH": home}
    done = subprocess.run(
        [sys.executable, "-m", "flashcore", "--version"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.startswith("flashcore ")


def _built(kernel: str, *, cached: bool = False, status: str = "ok", warnings=()) -> Trial:
    data = {"kernel": kernel, "head_dim": 64, "dtype": "float16", "trace": False, "arch": "sm_90a"}
    if status == "ok":
        data |= {"registers": 77, "spill_bytes": 0, "shared_bytes": 0, "tensor_instructions": {"HMMA": 8},
                 "compile_seconds": 1.5, "cached": cached, "warnings": list(warnings)}  # fmt: skip
    return Trial(kind="build", status=status, reason="" if status == "ok" else f"{kernel}.cu(3): error", data=data)


@pytest.mark.parametrize(("words", "asked"), [([], None), (["--kernel", "mine, yours"], ["mine", "yours"])])
def test_build_compiles_what_it_is_asked_for_and_shows_only_what_is_new(monkeypatch, words, asked):
    trials = [
        _built("attention_mine", warnings=["of a loop"]),
        _built("attention_old", cached=True, warnings=["of age"]),
    ]

    def build_all(progress, *, kernels):
        assert kernels == asked
        progress("attention_mine D=64 float16")
        return trials

    monkeypatch.setattr("flashcore.gpu.build.build_all", build_all)
    done = runner.invoke(app, ["build", *words])
    assert done.exit_code == 0 and "attention_mine" in done.stdout and "8 HMMA" in done.stdout
    assert "Compiled attention_mine D=64 float16" in done.stderr and "of a loop" in done.stderr
    assert "attention_old" not in done.output and "of age" not in done.output and "up to date" not in done.output
    everything = runner.invoke(app, ["build", *words, "--cached"])
    assert "attention_old" in everything.stdout and "1.50 s, cached" in everything.stdout


def test_build_with_nothing_new_is_one_line_and_a_kernel_that_does_not_compile_is_new(monkeypatch):
    trials = [_built("attention_old", cached=True), _built("attention_older", cached=True)]
    monkeypatch.setattr("flashcore.gpu.build.build_all", lambda progress, *, kernels: trials)
    done = runner.invoke(app, ["build"])
    assert (done.exit_code, done.stdout) == (0, "2 variants are up to date.\n")
    trials.append(_built("attention_mine", status="error"))
    done = runner.invoke(app, ["build"])
    assert done.exit_code == 1 and "attention_mine.cu(3): error" in done.stderr
    assert "did not compile" in done.stdout and "attention_old" not in done.output


def test_build_of_an_unknown_kernel_is_one_sentence_with_the_names_there_are():
    done = runner.invoke(app, ["build", "--kernel", "wmma,nothing"])
    assert done.exit_code == 2 and "Traceback" not in done.output and done.stdout == ""
    assert "There is no kernel 'nothing'; choose one of: attention_decode, " in done.stderr
