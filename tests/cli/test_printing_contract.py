"""What is printed, and to whom, never decides how a command ends."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
from support import synthetic_records as synthetic
from support.sampling import first

from flashcore.cli import printing
from flashcore.decision import verdict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that says NO-GO, so that its exit code is neither that of success nor that of an error."""
    return synthetic.write_run(tmp_path_factory.mktemp("runs") / "run", synthetic.gpu_trials(), synthetic.environment())


def shell(command: str, **variables: str) -> subprocess.CompletedProcess:
    """A shell's line, in which FLASHCORE stands for the command; its status is that of the line's first command."""
    line = command.replace("FLASHCORE", f"{shlex.quote(sys.executable)} -m flashcore")
    return subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **variables},
    )


@pytest.mark.slow
@pytest.mark.parametrize("variables", [
    {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "x"}, {"PYTHONIOENCODING": "latin-1:strict", "MPLBACKEND": ""},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
], ids=str)  # fmt: skip
def test_the_environment_of_a_terminal_changes_no_exit_code(run, variables):
    done = shell(f"FLASHCORE verdict {run.path}", **variables)
    assert done.returncode == verdict.EXIT_CODES["NO-GO"] and "Traceback" not in done.stderr, done.stderr
    assert "Verdict: NO-GO" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    # A pipe without a reader, a full disk, closed files, and the same of errors; the rest is more of these.
    first(["| head -0", ">/dev/full", ">&- 2>&-", "2>/dev/full", "| true", ">&-", "</dev/null >/dev/full"], 4),
)
def test_a_reader_that_is_gone_changes_no_exit_code(run, where):
    done = shell(f"FLASHCORE verdict {run.path} {where}")
    assert done.returncode == verdict.EXIT_CODES["NO-GO"]
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    told = "Standard output takes no more (No space left on device); what was printed is not whole.\n"
    assert done.stderr.count(told) == where.endswith(">/dev/full") - where.startswith("2>") and len(done.stderr) < 200


@pytest.mark.slow
def test_an_error_without_a_reader_is_still_an_error(tmp_path):
    done = shell(f"FLASHCORE verdict {tmp_path}/none 2>/dev/full")
    assert done.returncode == 2
    assert shell("FLASHCORE --help | head -0").returncode == 0


@pytest.mark.slow
def test_json_is_json_in_every_encoding(run):
    found = [
        json.loads(shell(f"FLASHCORE compare --json {run.path} {run.path}", PYTHONIOENCODING=encoding).stdout)
        for encoding in ("utf-8", "ascii")
    ]
    assert found[0] == found[1]
    claims = shell("FLASHCORE claims --json", PYTHONIOENCODING="ascii")
    assert any(ord(letter) > 127 for line in claims.stdout.splitlines() for letter in str(json.loads(line)))


def test_a_letter_that_an_encoding_lacks_is_written_as_json_has_it():
    for text in ("µs", "→ 𝛼", "half: \udc80"):
        error = UnicodeEncodeError("ascii", text, 0, len(text), "no such letter")
        written, end = printing._escaped(error)
        assert json.loads(f'"{written}"') == text and end == len(text) and written.isascii()


@pytest.mark.slow
def test_figures_are_drawn_whatever_backend_a_shell_names(tmp_path):
    code = (
        "import os, flashcore.page.history.views, flashcore.page, matplotlib; "
        "print(os.environ['MPLBACKEND'], matplotlib.get_backend())"
    )
    for name, backend in (("x", "agg"), ("svg", "svg")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "MPLBACKEND": name}
        )
        assert done.stdout.split() == [name, backend], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("out", "code", "says"), [("here", 2, "the current folder is gone"), ("{run}/..", 3, "")])
def test_the_folder_that_one_stands_in_may_be_gone(run, tmp_path, out, code, says):
    program = (
        f"import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir({str(tmp_path / 'gone')!r}); "
        f"sys.argv = ['flashcore', 'verdict', 'run', '--out', {out.format(run=run.path)!r}]; "
        "from flashcore.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code and says in done.stderr and "Traceback" not in done.stderr, done.stderr
