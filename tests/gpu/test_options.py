"""A kernel's source without its options: what is left of it, and which of its hashes an edit changes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from flashcore.gpu import build, options

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
    assert options.without_options(text) == left
    assert options.without_options(left) == left


@pytest.mark.parametrize("kernel", build.kernel_names())
def test_nothing_of_masks_is_left_in_a_kernel_without_them(kernel):
    source = build.kernel_source(kernel)
    left = options.without_options(source)
    code = "\n".join(line.partition("//")[0] for line in left.split("\n"))
    for word in (options.MASKS, "MASKED", "MaskParams", "HAS_WINDOW", "HAS_SOFTCAP", "HAS_SINK", "HAS_LENGTHS"):
        assert word not in code
    assert code.count("{") == code.count("}") and code.count("(") == code.count(")"), "whole calls and blocks went"
    assert (build._bare(left) != build._bare(source)) or not build.has_options(kernel)


def hashes_of(path: Path, text: str) -> tuple[str, str]:
    """The hash of a kernel of this text without its options, and with them."""
    path.write_text(text)
    return build.source_hash(path.stem), build.source_hash(path.stem, options=True)


def test_an_edit_inside_masks_changes_only_the_hash_with_them(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    hashes = functools.partial(hashes_of, tmp_path / "veiled.cu")
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

M, N = options.MASKS, options.INVARIANT
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
        found = options.without_options(text, but=but)
        assert found == (text if wanted is ... else wanted), but
        assert options.without_options(found, but=but) == found
        assert options.without_options(found) == options.without_options(text), "the order makes no difference"


@pytest.mark.parametrize("kernel", [kernel for kernel in build.kernel_names() if build.has_options(kernel)])
@pytest.mark.parametrize("but", [(M,), (N,)], ids=["masks", "invariant"])
def test_of_the_option_that_is_left_out_nothing_is_left(kernel, but):
    source = build.kernel_source(kernel)
    left = options.without_options(source, but=but)
    code = "\n".join(line.partition("//")[0] for line in left.split("\n"))
    (gone,) = set(BOTH) - set(but)
    words = {M: ("MaskParams", "HAS_WINDOW", "HAS_SINK"), N: ("ChunkSum", "ChunkTotals", "totals_gmem", "outgrown")}
    for word in (gone, *(f"{name}(" for name in options.OPTIONS[gone]), *words[gone]):
        assert word not in code, word
    for word in (but[0], *(f"{name}(" for name in options.OPTIONS[but[0]])):
        assert word in code, word
    assert code.count("{") == code.count("}") and code.count("(") == code.count(")")
    assert options.without_options(left) == options.without_options(source)
    assert options.without_options(source, but=BOTH) == source


def test_an_edit_of_the_invariant_mode_leaves_the_hash_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    hashes = functools.partial(hashes_of, tmp_path / "both.cu")
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
            assert build._hash_of(options.without_options(edited)) == build.source_hash(kernel)
            assert build._hash_of(edited) != build.source_hash(kernel, options=True)
