"""On a GPU: a kernel edited between two calls is what the second call runs, and what its record names."""

from __future__ import annotations

import shutil
import time

import pytest

import flashcore
from flashcore import backends
from flashcore.gpu import build
from flashcore.measure.check import check_attention
from flashcore.problem import square

PLUGIN = """
from flashcore.backends import CudaBackend, register


@register
class Edited(CudaBackend):
    id = "edited"
    title = "A kernel that is edited while the process lives"
    kernel = "edited_attention"
"""


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """The scalar kernel under another name in a plug-in's folder, with its backend."""
    source = (build.kernels_dir() / "attention_scalar.cu").read_text().replace("attention_scalar", "edited_attention")
    (tmp_path / "edited_attention.cu").write_text(source)
    (tmp_path / "edited_plugin.py").write_text(PLUGIN)
    shutil.copytree(build.kernels_dir() / "include", tmp_path / "include")
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    yield tmp_path / "edited_attention.cu"
    from flashcore.backends import _registry

    _registry._REGISTRY.pop("edited", None)


@pytest.mark.gpu
def test_an_edited_kernel_is_what_the_next_call_runs(edited):
    import torch

    q, k, v = (torch.randn(1, 2, 64, 64, dtype=torch.float16, device="cuda") for _ in range(3))
    problem = square(1, 2, 64, 64)
    right = flashcore.attention(q, k, v, backend="edited")
    first = check_attention(backends.get("edited"), problem)
    assert first.status == "ok" and first.source_hash == build.source_hash("edited_attention")
    text = edited.read_text()
    wrong = text.replace("params.softmax_scale", "(2.f * params.softmax_scale)")
    assert wrong != text
    edited.write_text(wrong)
    time.sleep(2 * build.LOOK_EVERY_S)
    assert not torch.equal(flashcore.attention(q, k, v, backend="edited"), right)
    second = check_attention(backends.get("edited"), problem)
    assert second.status == "failed" and second.source_hash == build.source_hash("edited_attention")
    assert second.source_hash != first.source_hash
    edited.write_text(text)
    time.sleep(2 * build.LOOK_EVERY_S)
    assert torch.equal(flashcore.attention(q, k, v, backend="edited"), right)


def test_a_source_that_is_edited_while_it_is_measured_is_an_error(edited):
    from flashcore.measure.check import guarded
    from flashcore.records import Trial

    backend = backends.get("edited")

    def measure() -> Trial:
        edited.write_text(edited.read_text() + "\nint more;\n")
        return Trial(kind="correctness", backend="edited", problem=square(1, 2, 64, 64))

    import unittest.mock

    with unittest.mock.patch.object(type(backend), "require", lambda self, problem: None):
        trial = guarded("correctness", backend, square(1, 2, 64, 64), measure)
    assert trial.status == "error" and "edited while it was measured" in trial.reason
