"""What the doctor says of peers: each with its version, and a newer cuDNN only where pins say that there is one."""

from __future__ import annotations

import pytest
import torch

from flashcore import backends
from flashcore.backends import Availability
from flashcore.cli import peers
from flashcore.cli.program import app, doctor

PINS = "# CUDA 13\ntorch==2.13.0\nnvidia-cudnn-cu13==9.20.0.48\n"


@pytest.fixture
def constraints(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (tmp_path / "cuda13.txt").write_text(PINS)
    return tmp_path


@pytest.mark.parametrize(
    ("loaded", "newer"),
    [("9.19.0", True), ("9.9.0", True), ("8.9.7", True), ("9.20.0", False), ("9.20.1", False), ("10.0.0", False)],
)
def test_a_newer_cudnn_is_named_with_the_command_that_installs_it(constraints, loaded, newer):
    said = peers.newer_cudnn(loaded, constraints)
    assert said.startswith("9.20.0 is newer: pip install nvidia-cudnn-cu13==9.20.0.48") if newer else said == ""


@pytest.mark.parametrize("cuda", ["12.8", None])
def test_nothing_is_said_of_what_no_pin_is_about(constraints, monkeypatch, cuda):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert peers.newer_cudnn("1.0.0", constraints) == ""
    assert peers.newer_cudnn("1.0.0", constraints / "nowhere") == ""


@pytest.mark.parametrize("cuda", ["12", "13"])
def test_the_pins_of_this_checkout_name_a_cudnn(monkeypatch, cuda):
    monkeypatch.setattr(torch.version, "cuda", f"{cuda}.0")
    assert f"nvidia-cudnn-cu{cuda}==" in peers.newer_cudnn("1.0.0", peers.HOME / "constraints")


def test_each_peer_has_a_line_with_its_version_and_what_mends_it(constraints, monkeypatch):
    states = {"sdpa-cudnn": Availability(True), "fa3": Availability(False, "it is not here", "install it")}
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    for name, state in states.items():
        monkeypatch.setattr(type(backends.get(name)), "availability", lambda self, state=state: state)
    monkeypatch.setattr(type(backends.get("fa3")), "software", lambda self: None)
    found = {check.name: check for check in peers.checks(constraints)}
    assert found.keys() == {f"Peer {b.id}" for b in backends.all_backends() if b.role == "peer"}
    cudnn, fa3, math = (found[f"Peer {name}"] for name in ("sdpa-cudnn", "fa3", "sdpa-math"))
    assert cudnn.ok and cudnn.detail.startswith("cuDNN 9.19.0; 9.20.0 is newer")
    assert (fa3.ok, fa3.detail, fa3.fix) == (False, "it is not here", "install it")
    assert math.ok and math.detail == f"torch {torch.__version__}" and not any(c.needed for c in found.values())


def test_without_torch_the_doctor_has_other_worries(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.checks() == []


def test_the_doctor_prints_them(capsys, monkeypatch):
    assert app and [c for c in peers.checks() if not c.ok and not c.fix] == []
    monkeypatch.setenv("COLUMNS", "200")
    doctor()
    assert "Peer fa4" in capsys.readouterr().out
