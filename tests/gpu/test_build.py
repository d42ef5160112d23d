"""The build: one text a kernel, a hash without comments, a cache that survives damage and company, honest errors."""

import hashlib
import json
import multiprocessing
import re
import shutil

import pytest

from flashcore.decision.evidence import recorded_runs
from flashcore.errors import CompileError, UnknownName
from flashcore.gpu import build
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
    # One of a kernel, which other tests need too, and of the largest one that differs in both; other tests
    # compile each variant without trace.
    [
        pytest.param(k, *v, marks=() if v == (64, "float16") or (k, *v) in BY_DEFAULT else pytest.mark.exhaustive)
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


# ------------------------------------------------------------------------------------- the source without its masks

WITH_MASKS = """#ifdef FLASHCORE_MASKS
#define MASKED(...) __VA_ARGS__
#else
#define MASKED(...)
#endif
int f(int a MASKED(, int b)) {
  MASKED(if (b) return g((a), h(b));)
  return a MASKED(+ b);
}
"""


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a\n#ifdef FLASHCORE_MASKS\nb\n#endif\nc", "a\nc"),
        ("#ifdef FLASHCORE_MASKS\nb\n#else\nc\n#endif", "c"),
        ("#ifndef FLASHCORE_MASKS\nb\n#else\nc\n#endif", "b"),
        ("#ifndef FLASHCORE_MASKS\n#ifdef X\nb\n#else\nc\n#endif\n#endif", "#ifdef X\nb\n#else\nc\n#endif"),
        ("#ifdef X\n#ifdef FLASHCORE_MASKS\nb\n#else\nc\n#endif\n#endif\nd", "#ifdef X\nc\n#endif\nd"),
        ("#ifdef FLASHCORE_MASKS\n#ifdef X\nb\n#else\nc\n#endif\nd\n#endif\ne", "e"),
        (
            "#if defined(FLASHCORE_MASKS) && defined(X)\nb\n#elif defined(FLASHCORE_MASKS)\nc\n#else\nd\n#endif\ne",
            "d\ne",
        ),
        ("#if X\nb\n#elif Y\nc\n#else\nd\n#endif", "#if X\nb\n#elif Y\nc\n#else\nd\n#endif"),
        ("  #  ifdef FLASHCORE_MASKS\nb\n  #  endif\nc", "c"),
        ("#define FLASHCORE_OTHER 1\n#define MASKED(...) __VA_ARGS__\na", "#define FLASHCORE_OTHER 1\na"),
        ("f(a MASKED(, b), c)", "f(a, c)"),
        ("f(a MASKED(, g((b), h(c))))", "f(a)"),
        ("MASKED(const) int a", "int a"),
        ("a\n  MASKED(if (HAS(x)) return y;)\nb", "a\nb"),
        ("a\n  MASKED(x;)  b", "a\n  b"),
        ("MASKED(a MASKED(b) c) d", "d"),
        ("UNMASKED(a) MASKED_TOO(b)", "UNMASKED(a) MASKED_TOO(b)"),
        (WITH_MASKS, "int f(int a) {\n  return a;\n}\n"),
    ],
)
def test_a_source_without_its_masks_is_what_the_compiler_sees_without_the_macro(text, left):
    assert build.without_options(text) == left
    assert build.without_options(left) == left


@pytest.mark.parametrize("kernel", build.kernel_names())
def test_nothing_of_masks_is_left_in_a_kernel_without_them(kernel):
    source = build.kernel_source(kernel)
    left = build.without_options(source)
    code = "\n".join(line.partition("//")[0] for line in left.split("\n"))
    for word in (build.MASKS, "MASKED", "MaskParams", "HAS_WINDOW", "HAS_SOFTCAP", "HAS_SINK", "HAS_LENGTHS"):
        assert word not in code
    assert code.count("{") == code.count("}") and code.count("(") == code.count(")"), "whole calls and blocks went"
    assert (build._bare(left) != build._bare(source)) or not build.has_options(kernel)


def test_an_edit_inside_masks_changes_only_the_hash_with_them(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    path = tmp_path / "veiled.cu"

    def hashes(text: str) -> tuple[str, str]:
        path.write_text(text)
        return build.source_hash("veiled"), build.source_hash("veiled", options=True)

    without, with_masks = hashes(WITH_MASKS)
    assert without != with_masks
    for old, new in (("+ b", "- b"), ("h(b)", "h(2 * b)"), ("(, int b)", "(, int c)")):
        assert WITH_MASKS.count(old) == 1
        changed = hashes(WITH_MASKS.replace(old, new))
        assert changed[0] == without and changed[1] != with_masks
    assert hashes(WITH_MASKS.replace("return a ", "return 2 * a "))[0] != without
    assert hashes(WITH_MASKS.replace("return a ", "return a  // the same\n  ")) == (without, with_masks)
    hashes(WITH_MASKS)
    assert build.source_hashes()["veiled"] == without and build.source_hashes()["veiled with options"] == with_masks
    assert "attention_wmma with options" not in build.source_hashes(), "a kernel without masks has one hash"


# ------------------------------------------------------------------------------------- the source with some options

M, N = build.MASKS, build.INVARIANT
BOTH = (M, N)
WITH_BOTH = """#ifdef FLASHCORE_MASKS
#define MASKED(...) __VA_ARGS__
#else
#define MASKED(...)
#endif
#ifdef FLASHCORE_INVARIANT
#define INVARIANT(...) __VA_ARGS__
#ifdef FLASHCORE_MASKS
#define CHUNKED(...)
#else
#define CHUNKED(...) __VA_ARGS__
#endif
#else
#define INVARIANT(...)
#define CHUNKED(...)
#endif
int f(int a MASKED(, int b) INVARIANT(, int c)) {
#if defined(FLASHCORE_MASKS) || defined(FLASHCORE_INVARIANT)
  MASKED(int d = b INVARIANT(+ c);)
#endif
  return a CHUNKED(+ 1) MASKED(+ b);
}
"""


@pytest.mark.parametrize(
    ("text", "left"),
    [
        # one option each: what is left with neither, with masks, with the invariant mode, and with both
        (f"#ifdef {M}\na\n#endif\n#ifdef {N}\nb\n#endif",
         ("", f"#ifdef {M}\na\n#endif", f"#ifdef {N}\nb\n#endif", ...)),
        (f"#ifndef {N}\na\n#else\nb\n#endif", ("a", "a", ..., ...)),
        (f"#ifndef {M}\n#ifndef {N}\na\n#endif\n#endif",
         ("a", f"#ifndef {M}\na\n#endif", f"#ifndef {N}\na\n#endif", ...)),
        # a condition that names both
        (f"#if defined({M}) || defined({N})\na\n#else\nb\n#endif",
         ("b", f"#if defined({M}) || 0\na\n#else\nb\n#endif", f"#if 0 || defined({N})\na\n#else\nb\n#endif", ...)),
        (f"#if defined({M}) && defined({N})\na\n#endif\nb", ("b", "b", "b", ...)),
        (f"#if defined({M}) && !defined({N})\na\n#else\nb\n#endif",
         ("b", f"#if defined({M}) && !0\na\n#else\nb\n#endif", "b", ...)),
        (f"#if !defined({M}) && !defined({N})\na\n#endif",
         ("a", f"#if !defined({M}) && !0\na\n#endif", f"#if !0 && !defined({N})\na\n#endif", ...)),
        (f"#if !(defined({M}) || defined({N}))\na\n#else\nb\n#endif",
         ("a", f"#if !(defined({M}) || 0)\na\n#else\nb\n#endif",
          f"#if !(0 || defined({N}))\na\n#else\nb\n#endif", ...)),
        # one that asks for something else too
        (f"#if X || defined({N})\na\n#endif", ("#if X || 0\na\n#endif", "#if X || 0\na\n#endif", ..., ...)),
        (f"#if X || !defined({N})\na\n#else\nb\n#endif", ("a", "a", ..., ...)),
        (f"#if X && defined({N})\na\n#else\nb\n#endif", ("b", "b", ..., ...)),
        # #elif
        (f"#ifdef {M}\na\n#elif defined({N})\nb\n#else\nc\n#endif",
         ("c", f"#ifdef {M}\na\n#else\nc\n#endif", f"#if defined({N})\nb\n#else\nc\n#endif", ...)),
        (f"#ifdef {M}\na\n#elif X\nb\n#else\nc\n#endif",
         ("#if X\nb\n#else\nc\n#endif", ..., "#if X\nb\n#else\nc\n#endif", ...)),
        (f"#if X\na\n#elif !defined({N})\nb\n#else\nc\n#endif", ("#if X\na\n#else\nb\n#endif",) * 2 + (..., ...)),
        (f"#if X\na\n#elif defined({N})\nb\n#elif Y\nc\n#endif", ("#if X\na\n#elif Y\nc\n#endif",) * 2 + (..., ...)),
        (f"#ifndef {N}\na\n#elif X\nb\n#else\nc\n#endif", ("a", "a", ..., ...)),
        # a comment that names it is no condition
        (f"#ifdef X  // {N}\na\n#endif", (..., ..., ..., ...)),
        # calls
        ("f(a MASKED(, b) INVARIANT(, c))", ("f(a)", "f(a MASKED(, b))", "f(a INVARIANT(, c))", ...)),
        ("MASKED(INVARIANT(a) b) c CHUNKED(d)", ("c", "MASKED(b) c", "c CHUNKED(d)", ...)),
        ("INVARIANT(MASKED(a) b) c", ("c", "c", "INVARIANT(b) c", ...)),
    ],
)  # fmt: skip
def test_a_source_keeps_the_options_that_are_named(text, left):
    """`...` is the text as it is."""
    for but, wanted in zip(((), (M,), (N,), BOTH), left, strict=True):
        found = build.without_options(text, but=but)
        assert found == (text if wanted is ... else wanted), but
        assert build.without_options(found, but=but) == found
        assert build.without_options(found) == build.without_options(text), "the order makes no difference"


@pytest.mark.parametrize("kernel", [kernel for kernel in build.kernel_names() if build.has_options(kernel)])
@pytest.mark.parametrize("but", [(M,), (N,)], ids=["masks", "invariant"])
def test_of_the_option_that_is_left_out_nothing_is_left(kernel, but):
    source = build.kernel_source(kernel)
    left = build.without_options(source, but=but)
    code = "\n".join(line.partition("//")[0] for line in left.split("\n"))
    (gone,) = set(BOTH) - set(but)
    words = {M: ("MaskParams", "HAS_WINDOW", "HAS_SINK"), N: ("ChunkSum", "ChunkTotals", "totals_gmem", "outgrown")}
    for word in (gone, *(f"{name}(" for name in build.OPTIONS[gone]), *words[gone]):
        assert word not in code, word
    for word in (but[0], *(f"{name}(" for name in build.OPTIONS[but[0]])):
        assert word in code, word
    assert code.count("{") == code.count("}") and code.count("(") == code.count(")")
    assert build.without_options(left) == build.without_options(source)
    assert build.without_options(source, but=BOTH) == source


def test_an_edit_of_the_invariant_mode_leaves_the_hash_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    path = tmp_path / "both.cu"

    def hashes(text: str) -> tuple[str, str]:
        path.write_text(text)
        return build.source_hash("both"), build.source_hash("both", options=True)

    without, whole = hashes(WITH_BOTH)
    assert without != whole
    for old, new in (("INVARIANT(, int c)", "INVARIANT(, int e)"), ("+ c", "- c"), ("CHUNKED(+ 1)", "CHUNKED(+ 2)"),
                     ("int d", "int e")):  # fmt: skip
        assert WITH_BOTH.count(old) == 1
        changed = hashes(WITH_BOTH.replace(old, new))
        assert changed[0] == without and changed[1] != whole, old
    assert hashes(WITH_BOTH.replace("return a ", "return 2 * a "))[0] != without


def test_an_edit_of_the_mode_in_a_kernel_leaves_what_was_recorded_of_it():
    """In the kernels as they are: their own names of the mode, in their files and in the headers."""
    for kernel, edits in (
        ("attention_hopper",
         (("totals.add(o, softmax);", "totals.add(o, softmax);;"), ("CHUNK_TILES = 32", "CHUNK_TILES = 16"))),
        ("attention_decode",
         (("int parts = 0;", "int parts = 1;"), ("HIGHER_AT_MOST = 24.f", "HIGHER_AT_MOST = 25.f"))),
    ):  # fmt: skip
        source = build.kernel_source(kernel)
        for old, new in edits:
            assert source.count(old) == 1, old
            edited = source.replace(old, new)
            assert build._hash_of(build.without_options(edited)) == build.source_hash(kernel)
            assert build._hash_of(edited) != build.source_hash(kernel, options=True)


@pytest.mark.compiler
@pytest.mark.skipif(build.disassembler() is None, reason="nvdisasm is not installed")
def test_the_invariant_mode_contracts_no_product_with_a_sum(tiny):
    """Which of them are contracted hangs on the code around them, and the mode's kernels differ in that."""
    tiny.write_text(TINY.replace("= 1.f;", "= params.softmax_scale * params.lse_gmem[64 + threadIdx.x] + 3.f;"))
    counts = {}
    for name, defines in (("plain", None), ("masks", {M: 1}), ("invariant", {N: 1}), ("both", {M: 1, N: 1})):
        sass = build.disassemble(compiled(defines=defines).path)
        counts[name] = tuple(len(re.findall(rf"\b{opcode}\b", sass)) for opcode in ("FFMA", "FMUL", "FADD"))
    assert counts == {"plain": (1, 0, 0), "masks": (1, 0, 0), "invariant": (0, 1, 1), "both": (0, 1, 1)}


@pytest.mark.compiler
def test_a_cubin_has_the_hash_of_what_was_compiled_into_it(tiny):
    tiny.write_text(TINY.replace("1.f;", "1.f MASKED(+ 1.f);").replace('"attention.cuh"', '"online_softmax.cuh"'))
    assert compiled().source_hash == build.source_hash("tiny")
    assert compiled(defines={build.MASKS: 1}).source_hash == build.source_hash("tiny", options=True)


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
