"""What the compiler made of the kernels: no trace code in production, Tensor Cores where they are meant, no spills."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from flashcore import build

pytestmark = pytest.mark.skipif(build.disassembler() is None, reason="nvdisasm is not installed")

TRACED = [k for k in build.kernel_names() if re.search(r"\bTRACE\(", build.kernel_path(k).read_text())]
VARIANTS = [(k, head_dim, dtype) for k in TRACED for head_dim, dtype in build.variants(k)]

WITHOUT_TENSOR_CORES = {"attention_scalar", "page_softmax"}
"""Kernels that are meant to compute on plain units."""


def instructions(cubin: build.Cubin) -> list[str]:
    """The instructions of a cubin, each with its address."""
    text = build.disassemble(cubin.path)
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S.*;", text, flags=re.MULTILINE)


def stripped(source: str) -> str:
    """The source without its trace hooks: each ``TRACE(...)`` with its balanced parentheses, and ``TRACE_PARAM``.

    Line breaks stay, and so do the lines that define the two.
    """
    out, position = [], 0
    for found in re.finditer(r"\bTRACE\(|\bTRACE_PARAM\b", source):
        line = source[source.rfind("\n", 0, found.start()) + 1 : found.start()]
        if found.start() < position or line.lstrip().startswith("#"):
            continue
        out.append(source[position : found.start()])
        end = found.end()
        if found[0].endswith("("):
            depth = 1
            while depth:
                depth += {"(": 1, ")": -1}.get(source[end], 0)
                end += 1
        out.append("\n" * source.count("\n", found.start(), end))
        position = end
    return "".join(out) + source[position:]


def test_the_stripper_takes_hooks_away_and_nothing_else():
    defines = "#define TRACE(...)\n#define TRACE_PARAM\n"
    source = defines + "f(int a TRACE_PARAM) {\n  TRACE(g((a),\n h());)\n  k(TRACER(1));\n}\n"
    assert stripped(source) == defines + "f(int a ) {\n  \n\n  k(TRACER(1));\n}\n"
    for kernel in TRACED:
        lines = stripped(build.kernel_source(kernel)).splitlines()
        code = [line for line in lines if not line.lstrip().startswith(("#", "//"))]
        assert not [line for line in code if "TRACE(" in line or "TRACE_PARAM" in line]
        assert not [line for line in code if re.search(r"\bstage\.", line)], "the stage of a row is used by hooks alone"


def test_there_are_kernels_to_look_at():
    assert {"attention_scalar", "attention_wmma"} <= set(TRACED) and len(VARIANTS) >= 8


@pytest.mark.slow
def test_production_sass_is_the_same_with_the_hooks_taken_out():
    pytest.importorskip("cuda.core")  # before the threads: its first import is not safe in several at once

    def compile_one(job):
        kernel, head_dim, dtype, source, trace = job
        return build.compile_kernel(kernel, head_dim=head_dim, dtype=dtype, source=source, trace=trace)

    jobs = [(*v, source, False) for v in VARIANTS for source in (None, stripped(build.kernel_source(v[0])))]
    traced = [(*VARIANTS[0], None, True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        *cubins, with_trace = pool.map(compile_one, jobs + traced)
    for number, variant in enumerate(VARIANTS):
        production, without = (instructions(cubin) for cubin in cubins[2 * number : 2 * number + 2])
        assert len(production) > 100
        assert production == without, f"{variant}: the trace hooks left something in production"
    assert instructions(with_trace) != instructions(cubins[0]), "the comparison has to see trace code"


@pytest.mark.parametrize(("kernel", "head_dim", "dtype"), VARIANTS)
def test_tensor_cores_and_spills(kernel, head_dim, dtype):
    cubin = build.compile_kernel(kernel, head_dim=head_dim, dtype=dtype)
    assert cubin.spill_bytes == 0 and cubin.sass["LDL"] == cubin.sass["STL"] == 0
    assert cubin.registers <= 255 and cubin.warnings == []
    assert bool(cubin.tensor_instructions) == (kernel not in WITHOUT_TENSOR_CORES), f"{kernel}: {cubin.sass}"


def test_line_numbers_are_in_every_cubin():
    """compute-sanitizer names file and line from them."""
    for kernel in TRACED:
        cubin = build.compile_kernel(kernel, head_dim=64, dtype="float16")
        assert f"{kernel}.cu".encode() in cubin.path.read_bytes()
