"""The options that name workers, and the board with a line for each card."""

from __future__ import annotations

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flashcore.cli import spreading
from flashcore.cli.program import app
from flashcore.cli.spreading import Board
from flashcore.gpu import device


def shown(board: Board) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(board)
    return console.export_text()


def test_the_board_has_a_line_a_card_with_what_it_does_and_how_much_it_did():
    board = Board()
    for doing in ("ready", "check one", "", "check [two]", "", "sweep"):
        board.hear((0.0, {"key": "GPU-aa", "label": "GPU-aa on box", "doing": doing}))
    board.hear((0.0, {"key": "GPU-bb", "label": "GPU-bb on box", "doing": "ready"}))
    assert [row[:3] for row in board.rows()] == [("GPU-aa on box", 2, "sweep"), ("GPU-bb on box", 0, "ready")]
    lines = shown(board).splitlines()
    assert "GPU-aa on box     2  sweep (0 s)" in lines[1] and lines[2].split()[-1] == "waits"


def test_a_task_in_brackets_is_no_markup_and_a_strange_event_is_nothing():
    board = Board()
    board.hear((0.0, "nonsense"))
    board.hear((0.0, {"key": "a", "label": "[red]a", "doing": "[bold]x"}))
    assert "[red]a" in shown(board) and "[bold]x" in shown(board)


def test_nothing_is_started_where_no_worker_is_named():
    with spreading.spread(Console(), gpus=None, workers=None, scheduler=None, cluster=None) as pool:
        assert pool is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus", "2"], "This machine has no GPU that torch can use; leave --gpus out, or try --workers N."),
        (["--workers", "0"], "--workers is 0; give a number from 1 to 64."),
        (["--gpus", "1", "--scheduler", "tcp://a:1"], "--gpus and --scheduler name the workers; give one of"),
        (["--cluster", "nothing.toml"], "nothing.toml cannot be read"),
        (
            ["--kernel", "mine.py:attention", "--scheduler", "tcp://a:1"],
            "The function of --kernel lies on this machine",
        ),
    ],
)
def test_workers_that_cannot_be_had_are_one_sentence_and_exit_code_2(options, words, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    done = CliRunner().invoke(app, ["report", "--out", str(tmp_path), *options])
    assert done.exit_code == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [], "something was made all the same"
