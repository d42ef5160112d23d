"""The build: one text a kernel, a hash without comments, a cache that survives damage and company, honest errors."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from flashcore.decision.evidence import recorded_runs
from flashcore.errors import CompileError, UnknownName
from flashcore.gpu import build
from flashcore.gpu.options import INVARIANT, MASKS
from flashcore.paths import data_dir
from flashcore.records import Trial

TINY = """// A kernel of the tests.
// Variants: head_dim 64, dtype float16
#include "attention.cuh"
extern "C" __device__ const LaunchShape tiny_shape = {1, 1, 32, 0};
extern "C" __global__ void tiny(const AttentionParams params) {
  params.lse_gmem[threadIdx.x] = 1.f;  // one store
}
"""


BY_DEFAULT = {("attention_hopper", 128, "bfloat16")}
LARGEST = {kernel for kernel, *_ in BY_DEFAULT}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A kernel from a plug-in folder, and a cache of its own."""
    (tmp_path / "plugins").mkdir()
    source = tmp_path / "plugins" / "tiny.cu"
    source.write_text(TINY)
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(source.parent))
    monkeypatch.setenv("FLASHCORE_CACHE", str(tmp_path / "cache"))
    return source


def compiled(**options):
    return build.compile_kernel("tiny", head_dim=64, dtype="float16", **options)


def test_every_kernel_is_found_with_its_variants(tiny):
    assert {"attention_scalar", "attention_wmma", "page_softmax", "tiny"} <= set(build.kernel_names())
    assert build.variants("tiny") == [(64, "float16")]
    assert build.variants("attention_wmma") == [(d, t) for d in (64, 128) for t in ("float16", "bfloat16")]
    with pytest.raises(UnknownName, match="no kernel 'nothing'.*attention_wmma"):
        build.kernel_path("nothing")


def test_the_source_is_one_text_with_its_own_headers_and_their_lines(tiny):
    text = build.kernel_source("tiny")
    assert text.count("struct AttentionParams {") == 1 and '#include "attention.cuh"' not in text
    assert '#line 1 "attention.cuh"' in text and '#line 4 "tiny.cu"' in text
    assert "#include <cuda_fp16.h>" in text, "CUDA's own headers stay to be included"


def test_the_hash_knows_code_and_neither_comments_nor_white_space(tiny):
    before = build.source_hash("tiny")
    assert len(before) == 16
    tiny.write_text(TINY.replace("// one store", "/* another\n comment */").replace("  params", "\n\n   params"))
    assert build.source_hash("tiny") == before
    tiny.write_text(TINY.replace("1.f", "2.f"))
    assert build.source_hash("tiny") != before


def test_a_comment_inside_a_string_is_code():
    assert build._bare('a = "// no comment"; // one') == 'a="//nocomment";'


@pytest.mark.compiler
def test_a_cubin_says_what_the_compiler_made_and_is_cached(tiny):
    first = compiled()
    assert not first.cached and first.path.is_file() and first.spill_bytes == 0 and 0 < first.registers < 64
    assert first.sass is None or (first.sass["HMMA"] == 0 and first.tensor_instructions == {})
    again = compiled()
    assert again.cached and again.path == first.path and again.registers == first.registers
    assert compiled(defines={"ANYTHING": 1}).path != first.path
    assert compiled(trace=True).path != first.path


@pytest.mark.compiler
def test_instructions_are_counted_when_they_are_asked_for_and_kept(tiny, monkeypatch):
    counted, counts = [], dict.fromkeys(build.AUDITED, 3)
    monkeypatch.setattr(build, "count_sass", lambda path: counted.append(path) or counts)
    cubin = compiled()
    assert counted == [], "a launch does not wait for the disassembler"
    assert cubin.sass == compiled().sass == counts and counted == [cubin.path]
    kept = cubin.path.with_suffix(".sass")
    for damage in ('{"sha256": "of another cubin", "sass": {"HMMA": 7}}', "[]", "{", "null"):
        kept.write_text(damage)
        assert compiled().sass == counts, damage
    facts = json.loads(kept.read_text())
    kept.write_text(json.dumps({**facts, "sass": dict.fromkeys(build.AUDITED, 7)}))
    kept.chmod(0o666)
    assert compiled().sass == counts, "somebody else may have written it"
    assert len(counted) == 6


@pytest.mark.compiler
def test_a_damaged_cache_entry_is_built_again(tiny):
    entry = compiled().path
    facts = entry.with_suffix(".json")
    damages = {
        "empty cubin": lambda: entry.write_bytes(b""),
        "cut off facts": lambda: facts.write_text(facts.read_text()[:20]),
        "no facts": facts.unlink,
        "facts of another": lambda: facts.write_text(json.dumps({**json.loads(facts.read_text()), "unheard_of": 1})),
    }
    for what, damage in damages.items():
        damage()
        mended = compiled()
        assert not mended.cached and mended.path.stat().st_size > 0, what
        assert compiled().cached, what


def _compile_in_a_process(_):
    return build.compile_kernel("tiny", head_dim=64, dtype="float16").path.stat().st_size


@pytest.mark.compiler
def test_several_processes_may_build_the_same_entry_at_once(tiny, tmp_path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        sizes = pool.map(_compile_in_a_process, range(3))
    assert len(set(sizes)) == 1 and sizes[0] > 0
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")], "no half-written file is left"


@pytest.mark.compiler
def test_several_threads_of_a_fresh_process_may_build_at_once_and_build_each_entry_once(tmp_path):
    """As when a server's first requests come together: the compiler is imported by whoever is first."""
    program = (
        "import sys, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from flashcore.gpu import build\n"
        "sys.setswitchinterval(1e-6)\n"
        "together, compiled, nvrtc = threading.Barrier(4), [], build._nvrtc\n"
        "build._nvrtc = lambda *given: compiled.append(given) or nvrtc(*given)\n"
        "def one(number):\n"
        "    together.wait()\n"
        "    text = f'extern \"C\" __global__ void toy(int* x) {{ *x = {number % 2}; }}'\n"
        "    return build.compile_text('toy', text).path.name\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    print(len(set(pool.map(one, range(4)))), len(compiled))\n"
    )
    environment = {**os.environ, "FLASHCORE_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "2"], done.stderr


@pytest.mark.compiler
def test_a_compile_error_shows_the_compilers_log_with_file_and_line(tiny):
    tiny.write_text(TINY.replace("1.f;", "nonsense;"))
    with pytest.raises(CompileError) as caught:
        compiled()
    assert 'tiny.cu(6): error: identifier "nonsense" is undefined' in caught.value.log
    header = build.kernel_source("tiny").replace("to_float(__half x) {", "to_float(__half x) { nonsense;")
    with pytest.raises(CompileError, match=r"attention\.cuh\(\d+\): error"):
        compiled(source=header)


@pytest.mark.compiler
def test_build_all_records_a_kernel_that_does_not_compile(tiny):
    tiny.write_text(TINY.replace("1.f;", "nonsense;"))
    tiny.with_stem("other").write_text(TINY.replace("tiny", "other"))
    told = []
    trials = build.build_all(progress=told.append, kernels=["tiny", "other"])
    assert len(trials) == len(told) == 2 + 2
    broken = [t for t in trials if t.status == "error"]
    assert {t.data["kernel"] for t in broken} == {"tiny"} and "nonsense" in broken[0].reason
    good = next(t for t in trials if t.data["kernel"] == "other" and not t.data["trace"])
    assert good.source_hash == build.source_hash("other") and good.data["spill_bytes"] == 0


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("kernel", "head_dim", "dtype"),
    # One of a kernel, which other tests need too; other tests compile each variant without trace.
    [
        pytest.param(
            k,
            *v,
            marks=() if (k, *v) in BY_DEFAULT or k not in LARGEST and v == (64, "float16") else pytest.mark.exhaustive,
        )
        for k in build.kernel_names()
        for v in build.variants(k)
    ],
)
def test_every_kernel_compiles_with_its_trace(kernel, head_dim, dtype):
    cubin = build.compile_kernel(kernel, head_dim=head_dim, dtype=dtype, trace=True)
    assert cubin.path.stat().st_size > 0 and cubin.warnings == [] and 0 < cubin.registers <= 255


@pytest.mark.compiler
@pytest.mark.exhaustive
def test_every_variant_of_every_kernel_is_built():
    trials = build.build_all()
    assert len(trials) == sum(2 * len(build.variants(k)) for k in build.kernel_names())
    assert [(t.data, t.reason) for t in trials if t.status != "ok"] == []


def test_the_log_of_ptxas_is_read():
    log = """ptxas info    : Function properties for a
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 10368 bytes smem
ptxas info    : Used 168 registers
ptxas warning : (C7508) 'setmaxnreg' ignored"""
    facts = build._read_ptxas_log(log)
    assert (facts["registers"], facts["spill_bytes"], facts["shared_bytes"]) == (168, 16, 10368)
    assert facts["warnings"] == ["ptxas warning : (C7508) 'setmaxnreg' ignored"]


def test_headers_of_another_major_version_are_not_taken(tmp_path, monkeypatch):
    folder = tmp_path / "include"
    shutil.copytree(build.header_dirs()[0], folder, ignore=lambda d, names: [n for n in names if n not in KEPT])
    runtime = folder / "cuda_runtime_api.h"
    runtime.write_text("#define CUDART_VERSION  11080\n")
    monkeypatch.setattr(build, "_wheel_folders", lambda *parts: [folder])
    monkeypatch.setattr(build, "_toolkit_folders", lambda *parts: [])
    with pytest.raises(build.ToolMissing, match="pip install"):
        build.header_dirs.__wrapped__()
    runtime.write_text(f"#define CUDART_VERSION {int(build.nvrtc_version().split('.')[0]) * 1000}\n")
    assert build.header_dirs.__wrapped__() == (folder,)


KEPT = {"cuda_fp16.h", "mma.h", "crt", "cuda_runtime_api.h"}


# ------------------------------------------------------------------------------------- options that are compiled in


@pytest.mark.compiler
@pytest.mark.skipif(build.disassembler() is None, reason="nvdisasm is not installed")
def test_the_invariant_mode_contracts_no_product_with_a_sum(tiny):
    """Which of them are contracted hangs on the code around them, and the mode's kernels differ in that."""
    tiny.write_text(TINY.replace("= 1.f;", "= params.softmax_scale * params.lse_gmem[64 + threadIdx.x] + 3.f;"))
    counts = {}
    masks, mode = {MASKS: 1}, {INVARIANT: 1}
    for name, defines in (("plain", None), ("masks", masks), ("invariant", mode), ("both", masks | mode)):
        sass = build.disassemble(compiled(defines=defines).path)
        counts[name] = tuple(len(re.findall(rf"\b{opcode}\b", sass)) for opcode in ("FFMA", "FMUL", "FADD"))
    assert counts == {"plain": (1, 0, 0), "masks": (1, 0, 0), "invariant": (0, 1, 1), "both": (0, 1, 1)}


@pytest.mark.compiler
def test_a_cubin_has_the_hash_of_what_was_compiled_into_it(tiny):
    tiny.write_text(TINY.replace("1.f;", "1.f MASKED(+ 1.f);").replace('"attention.cuh"', '"online_softmax.cuh"'))
    assert compiled().source_hash == build.source_hash("tiny")
    assert compiled(defines={MASKS: 1}).source_hash == build.source_hash("tiny", options=True)


def test_the_newest_run_recorded_the_hopper_kernel_as_it_is_without_options():
    """Masks were added to it since, and edited: what was measured of it without them still holds."""
    newest = recorded_runs(data_dir("reports") / "recorded")[0][-1]
    hashes = {
        trial.source_hash for trial in newest.trials if trial.backend == "hopper" and trial.kind == "attention_timing"
    }
    assert hashes == {build.source_hash("attention_hopper")}


# ------------------------------------------------------------------------------------- edits while a process lives


def test_an_edited_kernel_has_another_text_hash_and_version_in_the_same_process(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    path = tmp_path / "edited.cu"
    path.write_text('#include "own.cuh"\nint a;\n')
    (tmp_path / "own.cuh").write_text("int b;\n")
    first = build.source_version("edited"), build.source_hash("edited")
    assert "int a;" in build.kernel_source("edited") and "int b;" in build.kernel_source("edited")
    path.write_text('#include "own.cuh"\nint c;\n')
    assert "int c;" in build.kernel_source("edited"), "what compiles and what is hashed is the file as it is now"
    second = build.source_version("edited"), build.source_hash("edited")
    (tmp_path / "own.cuh").write_text("int d;\n")
    assert "int d;" in build.kernel_source("edited"), "a header counts as the kernel's own text"
    third = build.source_version("edited"), build.source_hash("edited")
    assert len({first, second, third}) == 3
    path.write_text('#include "own.cuh"\nint c;  // a comment\n')
    assert build.source_hash("edited") == third[1] and build.source_version("edited") != third[0]


def test_an_edit_of_the_same_size_in_the_same_instant_is_seen(tmp_path, monkeypatch):
    """File systems count time in steps of some milliseconds."""
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    path, now = tmp_path / "edited.cu", time.time_ns() + 3_600 * 10**9  # on a slow machine it is still recent
    for text in ("int a;\n", "int b;\n"):
        path.write_text(text)
        os.utime(path, ns=(now, now))
        assert build.kernel_source("edited").endswith(text)


def test_a_repeated_call_sees_an_edit_after_a_moment_without_reading_the_file_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    clock = [100.0]
    monkeypatch.setattr(build.time, "monotonic", lambda: clock[0])
    path = tmp_path / "watched.cu"
    path.write_text("int a;\n")
    before = build.source_version("watched")
    path.write_text("int abc;\n")
    assert build.source_version("watched") == before, "within a moment nobody waits for the disk"
    clock[0] += 2 * build.LOOK_EVERY_S
    assert build.source_version("watched") != before


@pytest.mark.compiler
def test_a_cache_entry_that_others_may_write_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    monkeypatch.setenv("FLASHCORE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "forged.cu").write_text('extern "C" __global__ void forged(int* out) { out[0] = 1; }\n')
    made = build.compile_kernel("forged", head_dim=64, dtype="float16")
    assert build.compile_kernel("forged", head_dim=64, dtype="float16").cached
    # A forger who may write both files makes them agree; only whose they are tells.
    forged = b"\x7fELF forged"
    facts = json.loads(made.path.with_suffix(".json").read_text())
    made.path.write_bytes(forged)
    made.path.with_suffix(".json").write_text(json.dumps({**facts, "sha256": hashlib.sha256(forged).hexdigest()}))
    made.path.chmod(0o666)
    again = build.compile_kernel("forged", head_dim=64, dtype="float16")
    assert not again.cached and again.path.read_bytes() != forged


@pytest.mark.compiler
def test_build_all_builds_the_kernels_it_is_given_and_tells_of_those_it_had_to_compile(tiny):
    told = []
    first = build.build_all(told.append, kernels=["tiny", "tiny"])
    assert [(t.data["kernel"], t.data["trace"], t.data["cached"]) for t in first] == [
        ("tiny", False, False),
        ("tiny", True, False),
    ]
    assert told == ["tiny D=64 float16", "tiny D=64 float16 trace"]
    again = build.build_all(told.append, kernels=["tiny"])
    assert [t.data["cached"] for t in again] == [True, True] and len(told) == 2


def test_a_kernel_is_known_by_its_stem_and_without_attention_in_front(tiny):
    assert build.kernel_named("wmma") == build.kernel_named("attention_wmma") == "attention_wmma"
    assert build.kernel_named("page_softmax") == "page_softmax"
    (tiny.parent / "attention_tiny.cu").write_text(TINY)
    assert build.kernel_named("tiny") == "tiny", "the stem itself goes first"
    with pytest.raises(UnknownName, match="no kernel 'wmmma'; choose one of: .*attention_wmma"):
        build.build_all(kernels=["tiny", "wmmma"])
    assert not build.cache_dir().exists(), "nothing is compiled when a name is wrong"


def test_build_all_builds_every_variant_of_every_kernel_unless_told_which(tiny, monkeypatch):
    asked = []

    def remember(kernel, head_dim, dtype, trace):
        asked.append((kernel, head_dim, dtype, trace))
        return Trial(kind="build", data={"kernel": kernel, "cached": True})

    monkeypatch.setattr(build, "_build_trial", remember)
    assert len(build.build_all()) == len(set(asked)) == 2 + 8 * (len(build.kernel_names()) - 1)
    assert {kernel for kernel, *_ in asked} == set(build.kernel_names()) >= {"tiny", "attention_hopper"}
