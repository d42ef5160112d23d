"""`flashcore fleet`: what it asks for, what it prints, and its exit codes; the cards are made up."""

from __future__ import annotations

import contextlib
import json

import pytest
from support import synthetic_fleet as synthetic
from typer.testing import CliRunner

from flashcore.cli import spreading
from flashcore.cli.program import app
from flashcore.decision import fleet as judging
from flashcore.gpu import device
from flashcore.pipeline import fleet as fleets

runner = CliRunner()


@pytest.fixture
def asked(monkeypatch, run):
    """What the command asks for; the cards are as `made` says."""
    found = {"odd": {}}

    @contextlib.contextmanager
    def spread(err, **options):
        found["options"] = options
        yield "pool"

    def compare(pool, *, out):
        found["out"] = out
        return run, judging.judge(synthetic.cards(**found["odd"])), run.path / "fleet.html"

    monkeypatch.setattr(spreading, "spread", spread)
    monkeypatch.setattr(fleets, "compare_cards", compare)
    return found


def test_all_cards_of_this_machine_are_compared_unless_others_are_named(asked):
    done = runner.invoke(app, ["fleet"])
    assert done.exit_code == 0 and "0 of 8 cards are off" in done.stdout and "fleet.html" in done.stdout
    assert asked["options"] == {"gpus": "all", "workers": None, "scheduler": None, "cluster": None, "mixed": True}
    runner.invoke(app, ["fleet", "--scheduler", "tcp://10.0.0.1:8786"])
    assert asked["options"]["gpus"] is None and asked["options"]["scheduler"] == "tcp://10.0.0.1:8786"


def test_a_card_that_is_off_is_exit_code_3_and_named(asked):
    asked["odd"] = {"factors": {"attention": 0.5}}
    done = runner.invoke(app, ["fleet"])
    assert done.exit_code == 3 and "GPU-00000007 on box: Attention, D=64" in done.stdout and "OFF" in done.stdout


def test_json_is_all_that_is_printed(asked):
    asked["odd"] = {"bits": {"hopper": ["ff"]}}
    done = runner.invoke(app, ["fleet", "--json"])
    told = json.loads(done.stdout)
    assert done.exit_code == 3 and told["ok"] is False and told["page"].endswith("fleet.html")


def test_without_a_card_the_command_says_what_to_do(monkeypatch):
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    done = runner.invoke(app, ["fleet"])
    assert done.exit_code == 2 and "This machine has no GPU that torch can use" in done.stderr
