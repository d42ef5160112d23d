"""A new kernel is one `.cu` file and one small module: this adds a toy one from outside, as CONTRIBUTING.md says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL = r"""
// A toy: one thread a query row, two passes over the keys. Adds nothing and is slow at everything.
// Variants: head_dim 64, dtype float16
#include "attention.cuh"
#include "trace.cuh"

constexpr int ROWS = 32;
extern "C" __device__ const LaunchShape attention_toy_shape = {ROWS, 1, ROWS, 0};

extern "C" __global__ void attention_toy(const AttentionParams params TRACE_PARAM) {
  const Tile tile = tile_by_number(params, ROWS, blockIdx.x);
  const int row = tile.first_row + threadIdx.x;
  if (row >= params.seqlen_q) return;
  const Element* q = params.q_gmem + tile.batch * params.q.batch + tile.head * params.q.head + row * params.q.row;
  const Element* k = params.k_gmem + tile.batch * params.k.batch + tile.head_kv * params.k.head;
  const Element* v = params.v_gmem + tile.batch * params.v.batch + tile.head_kv * params.v.head;
  const int keys = visible_keys(params, row);

  auto score = [&](int key) {
    float sum = 0.f;
    for (int d = 0; d < HEAD_DIM; ++d) sum += to_float(q[d]) * to_float(k[key * params.k.row + d]);
    return sum * params.softmax_scale;
  };
  float row_max = -INFINITY, row_sum = 0.f, accum[HEAD_DIM] = {};
  for (int key = 0; key < keys; ++key) row_max = fmaxf(row_max, score(key));
  for (int key = 0; key < keys; ++key) {
    const float prob = exp2f((score(key) - row_max) * LOG2_E);
    row_sum += prob;
    for (int d = 0; d < HEAD_DIM; ++d) accum[d] += prob * to_float(v[key * params.v.row + d]);
  }
  Element* out = params.out_gmem + tile.batch * params.out.batch + tile.head * params.out.head + row * params.out.row;
  for (int d = 0; d < HEAD_DIM; ++d) out[d] = from_float<Element>(keys ? accum[d] / row_sum : 0.f);
  const Index lse = (Index(tile.batch) * params.num_heads_q + tile.head) * params.seqlen_q + row;
  params.lse_gmem[lse] = keys ? row_max + log2f(row_sum) * LN_2 : -INFINITY;
}
"""

MODULE = '''
"""Backend `toy`."""

from flashcore.backends import register
from flashcore.backends import CudaBackend


@register
class Toy(CudaBackend):
    id = "toy"
    title = "A toy kernel"
    kernel = "attention_toy"
    dtypes = ("float16",)
    head_dims = (64,)
    traceable = False
'''


@pytest.fixture
def plugins(tmp_path) -> Path:
    """A folder outside FlashCore with the two files, and with another kernel that has no backend."""
    (tmp_path / "attention_toy.cu").write_text(KERNEL)
    (tmp_path / "attention_other.cu").write_text(KERNEL.replace("toy", "other"))
    (tmp_path / "toy.py").write_text(MODULE)
    return tmp_path


def python(plugins: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A Python of its own, since a registry is filled once a process."""
    environment = {
        **os.environ,
        "FLASHCORE_PLUGINS": str(plugins),
        "FLASHCORE_CACHE": str(plugins / "cache"),  # so that no run before this one has compiled the toy
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.exhaustive  # by default, the build table shows that it is found
@pytest.mark.slow
def test_it_is_registered_hashed_and_in_the_sweep_which_says_why_it_cannot_run_without_a_gpu(plugins, run):
    program = f"""
from flashcore import backends
from flashcore.gpu import build
from flashcore.measure.sweep import sweep
from flashcore.problem import PRESETS, parse_problem, square
from flashcore.records import RunFolder
toy = backends.get("toy")
assert toy in backends.select("all") and toy in backends.select("all", device="cuda")
assert [b.id for b in backends.select("toy,cpu")] == ["toy", "cpu"]
assert toy.why_not(PRESETS["report"]) is None
assert "head_dim 128" in toy.why_not(square(1, 1, 8, 128))
assert build.source_hashes()["attention_toy"] == toy.source_hash()
print(len(toy.source_hash()))
run = RunFolder({str(run.path)!r})
sweep(run, [parse_problem("B=1,H=1,S=32,D=64")], backends.select("toy"))
print({{t.backend: t.status for t in run.trials(kind="attention_timing")}})
"""
    done = python(plugins, "-c", program)
    assert done.returncode == 0, done.stderr
    from flashcore.gpu import device

    expected = "ok" if device.has_gpu() else "unavailable"
    assert done.stdout.splitlines() == ["16", repr({"toy": expected})]


@pytest.mark.compiler
def test_it_is_compiled_for_real_and_stands_in_the_build_table(plugins):
    done = python(plugins, "-m", "flashcore", "build", "--kernel", "toy,other")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "attention_toy" in line]
    assert len(rows) == 2, "one variant, with and without its trace"
    registers, spilled = rows[0].split("│")[3:5]
    assert int(registers) > 16 and int(spilled) == 0
    assert "attention_other" in done.stdout and "attention_wmma" not in done.stdout
    again = python(plugins, "-m", "flashcore", "build", "--kernel", "toy")
    assert (again.returncode, again.stdout) == (0, "2 variants are up to date.\n")


@pytest.mark.gpu
def test_it_is_right_on_a_gpu(plugins):
    program = """
from flashcore.measure.check import check_attention
from flashcore.problem import parse_problem
for label in ("B=2,H=4,Hkv=2,Sq=33,Sk=70,D=64", "B=1,H=2,S=65,D=64,causal"):
    trial = check_attention("toy", parse_problem(label))
    assert trial.status == "ok", trial.reason
"""
    done = python(plugins, "-c", program)
    assert done.returncode == 0, done.stderr


@pytest.mark.compiler
def test_a_kernel_that_does_not_compile_shows_the_compilers_log_and_exit_code_1(plugins):
    broken = KERNEL.replace("float row_max = -INFINITY,", "float row_max = NO_SUCH_NAME,")
    assert broken != KERNEL
    (plugins / "attention_toy.cu").write_text(broken)
    line = next(n for n, text in enumerate(broken.splitlines(), start=1) if "NO_SUCH_NAME" in text)
    done = python(plugins, "-m", "flashcore", "build", "--kernel", "toy,other")
    assert done.returncode == 1
    assert f"attention_toy.cu({line})" in done.stderr and "NO_SUCH_NAME" in done.stderr
    assert "did not compile" in done.stdout and "attention_other" in done.stdout
    assert "Traceback" not in done.stderr
