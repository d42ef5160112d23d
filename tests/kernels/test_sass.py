"""What the compiler made of the kernels: no trace code in production, Tensor Cores where they are meant, no spills."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

import pytest
from support.sampling import sampled

from flashcore.gpu import build, options

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(build.disassembler() is None, reason="nvdisasm is not installed"),
]

TRACED = [k for k in build.kernel_names() if re.search(r"\bTRACE\(", build.kernel_path(k).read_text())]
VARIANTS = [(k, head_dim, dtype) for k in TRACED for head_dim, dtype in build.variants(k)]

HOPPER, DECODE, PAIRED = "attention_hopper", "attention_decode", "attention_decode_paired"
FEW_TILES = {head_dim: (("FLASHCORE_NUM_CONSUMERS", 2), ("FLASHCORE_TILE_N", head_dim)) for head_dim in (64, 128)}
"""The other tiles that the backend asks for."""
HOPPER_TILES = [(head_dim, dtype, ()) for head_dim, dtype in build.variants(HOPPER)]
HOPPER_TILES += [(head_dim, dtype, FEW_TILES[head_dim]) for head_dim, dtype in build.variants(HOPPER)]
PAGED_TILES = [(head_dim, dtype, (("FLASHCORE_PAGED", 1),)) for head_dim, dtype in build.variants(HOPPER)]
"""Of the Hopper kernel compiled for pages; it has no entry function that splits keys."""
FOR_PAGES = [
    *((HOPPER, *tile) for tile in PAGED_TILES), *((k, d, t, ()) for k, d, t in VARIANTS if k in (DECODE, PAIRED)),
    *((PAIRED, d, t, ((options.MASKS, union),)) for k, d, t in VARIANTS if k == PAIRED for union in (1, 7)),
]  # fmt: skip
BY_DEFAULT = {
    (64, "float16"): (1, 15),
    (64, "bfloat16"): (8,),
    (128, "float16"): (2,),
    (128, "bfloat16"): (4, 15),
}
"""Each mask by itself at one head_dim, all of them at both, by head_dim and dtype; a few other unions come on top."""
FEW_AND_MASKED = {(128, "float16", 9)}
MASKED_TILES = [
    pytest.param(
        head_dim, dtype, (*tile, (options.MASKS, union)),
        id=f"{head_dim}-{dtype}-{union}{'-few tiles' if tile else ''}",
        marks=() if (union in BY_DEFAULT[head_dim, dtype] if not tile else (head_dim, dtype, union) in FEW_AND_MASKED)
        else pytest.mark.exhaustive,
    )
    for head_dim, dtype in build.variants(HOPPER)
    for tile in ((), FEW_TILES[head_dim])
    for union in range(1, 16)
]  # fmt: skip
"""Of the Hopper kernel compiled with masks besides the causal one."""
KNOWN_SPILLS = {(64, False, 15): 16, **{(128, True, union): 8 for union in range(16) if union & 2}}
"""Bytes, by head_dim, whether the tile is that of few tiles, and union: two registers, or one, are too few there."""
KNOWN_MOVES = {(64, False, 3): 24, (128, False, 3): 34}
"""Moves to uniform registers between the products of a page, likewise: of a window with a softcap and nothing else."""
INVARIANT = (options.INVARIANT, 1)
SHAPES = {
    "plain": (),
    "few tiles": (("FLASHCORE_NUM_CONSUMERS", 2), ("FLASHCORE_TILE_N", 64)),
    "paged": (("FLASHCORE_PAGED", 1),),
}
"""Of the Hopper kernel in the batch-invariant mode: pages have 64 keys whatever the tile, and keys are never split."""
INVARIANT_KERNELS = [
    (kernel, shape, union, head_dim, dtype)
    for kernel, shapes, unions in ((HOPPER, SHAPES, (0, 1, 5, 7)), (DECODE, ("plain",), (0, 7)))
    for shape in shapes for union in unions for head_dim, dtype in build.variants(kernel)
]  # fmt: skip
"""With no mask but the causal one, with a window, with a sink too, and with a softcap too."""
MOVES_OF_DECODE = 8
"""Moves to uniform registers between the products of a unit in the decode kernel, which waits for memory."""
INVARIANT_TEXTS = [
    (kernel, head_dim, dtype) for kernel in (HOPPER, DECODE) for head_dim, dtype in build.variants(kernel)
]
MOST_SPILLS = {(HOPPER, 128): 128}
"""Bytes in that mode, by kernel and head_dim: what a warpgroup has of the chunks before is dear there. Else none."""
WARPGROUP = 128
INSTRUCTION = 16
"""Bytes of one machine instruction."""
REGISTERS_OF_A_MULTIPROCESSOR = 64 * 1024

WITHOUT_TENSOR_CORES = {"attention_scalar", "page_softmax"}
"""Kernels that are meant to compute on plain units."""


SECTION = struct.Struct("<IIQQQQIIQQ")
"""A header in the table of sections of a 64-bit ELF file, which a cubin is: name and type, then where its bytes are."""


def code(cubin: build.Cubin) -> dict[str, bytes]:
    """The machine code of each function of a cubin, by the name of its section.

    Instructions and nothing else: no line numbers, no names. The disassembler would write the same in words, and takes
    as long as the compiler.
    """
    data = cubin.path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", "a 64-bit little-endian ELF file"
    (table,), (size, number, names) = struct.unpack_from("<Q", data, 0x28), struct.unpack_from("<HHH", data, 0x3A)
    assert size == SECTION.size
    headers = [SECTION.unpack_from(data, table + place * size) for place in range(number)]
    start = headers[names][4]
    found = {}
    for name, _, _, _, offset, length, *_ in headers:
        title = data[start + name : data.index(b"\0", start + name)].decode()
        if title.startswith(".text."):
            found[title] = data[offset : offset + length]
    return found


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
    source = defines + "f(int a TRACE_PARAM) {\n  TRACE(g((a),\n h());)\n  k(TRACER(1) TRACE(, trace));\n}\n"
    assert stripped(source) == defines + "f(int a ) {\n  \n\n  k(TRACER(1) );\n}\n"
    for kernel in TRACED:
        lines = stripped(build.kernel_source(kernel)).splitlines()
        code = [line for line in lines if not line.lstrip().startswith(("#", "//"))]
        assert not [line for line in code if "TRACE(" in line or "TRACE_PARAM" in line]
        assert not [line for line in code if re.search(r"\bstage\.", line)], "the stage of a row is used by hooks alone"


def test_there_are_kernels_to_look_at():
    assert {"attention_scalar", "attention_wmma", HOPPER} <= set(TRACED) and len(VARIANTS) >= 12
    assert len(HOPPER_TILES) == 8


class Text(NamedTuple):
    """A kernel and what is defined for it. Texts of one kernel look alike, so that one of them is sampled."""

    kernel: str
    defines: tuple[tuple[str, int], ...] = ()

    def __repr__(self) -> str:
        return self.kernel


TEXTS = [(Text(kernel), head_dim, dtype) for kernel, head_dim, dtype in VARIANTS]
TEXTS += [
    (Text(HOPPER, defined), head_dim, dtype) for head_dim, dtype, defined in HOPPER_TILES + PAGED_TILES if defined
]
"""Every kernel with its defines, which have hooks of their own, in every variant."""


@pytest.mark.parametrize(
    ("text", "head_dim", "dtype"),
    # Each kernel once, and over them all both types and both head_dims; by this seed such as other tests compile too.
    [*sampled(TEXTS, seed=69), *sampled([(Text(kernel, (INVARIANT,)), *one) for kernel, *one in INVARIANT_TEXTS])],
    ids=lambda value: "-".join((value[0], *(name for name, _ in value[1]))) if isinstance(value, tuple) else None,
)
def test_production_sass_is_the_same_with_the_hooks_taken_out(text, head_dim, dtype):
    kernel, defines = text
    variant = {"head_dim": head_dim, "dtype": dtype, "defines": dict(defines)}
    production = code(build.compile_kernel(kernel, **variant))
    without = code(build.compile_kernel(kernel, **variant, source=stripped(build.kernel_source(kernel))))
    assert sum(map(len, production.values())) > 100 * INSTRUCTION
    assert production.keys() == without.keys()
    changed = [name for name, instructions in production.items() if instructions != without[name]]
    assert changed == [], "the trace hooks left something in production"


@pytest.mark.parametrize(
    ("text", "head_dim", "dtype"),
    sampled([case for case in TEXTS if build.has_options(case[0].kernel)], seed=2),  # likewise
    ids=lambda value: "-".join((value[0], *(name for name, _ in value[1]))) if isinstance(value, tuple) else None,
)
def test_sass_is_the_same_with_the_masks_taken_out_of_the_text(text, head_dim, dtype):
    """What was recorded of a kernel holds as long as its text without masks is as it was: the machine code is too."""
    kernel, defines = text
    variant = {"head_dim": head_dim, "dtype": dtype, "defines": dict(defines)}
    source = build.kernel_source(kernel)
    whole = code(build.compile_kernel(kernel, **variant))
    without = code(build.compile_kernel(kernel, **variant, source=options.without_options(source)))
    assert sum(map(len, whole.values())) > 100 * INSTRUCTION and whole == without


@pytest.mark.parametrize(
    ("kernel", "option", "head_dim", "dtype"),
    sampled([
        (kernel, option, head_dim, dtype)
        for kernel, head_dim, dtype in INVARIANT_TEXTS for option in (INVARIANT, (options.MASKS, 7))
    ], seed=8),
)  # fmt: skip
def test_with_one_option_sass_is_the_same_with_the_other_taken_out_of_the_text(kernel, option, head_dim, dtype):
    """A bug of masks is planted in the text with masks alone, and one of the invariant mode in that with the mode."""
    variant = {"head_dim": head_dim, "dtype": dtype, "defines": dict([option])}
    source = build.kernel_source(kernel)
    left = options.without_options(source, but=(option[0],))
    assert options.without_options(source) != left != source
    whole = code(build.compile_kernel(kernel, **variant))
    without = code(build.compile_kernel(kernel, **variant, source=left))
    assert sum(map(len, whole.values())) > 100 * INSTRUCTION and whole == without
    assert whole != code(build.compile_kernel(kernel, head_dim=head_dim, dtype=dtype)), "the option was compiled in"


def test_the_comparison_of_sass_sees_trace_code():
    variant = {"head_dim": 64, "dtype": "float16"}
    plain, traced = (build.compile_kernel("attention_wmma", **variant, trace=trace) for trace in (False, True))
    assert code(plain).keys() == code(traced).keys() == {".text.attention_wmma"}
    assert code(plain) != code(traced)


def test_the_code_of_a_cubin_is_what_the_disassembler_reads():
    """As many instructions of 16 bytes, in each function."""
    cubin = build.compile_kernel(HOPPER, head_dim=64, dtype="float16")
    functions = entry_functions(build.disassemble(cubin.path))
    lengths = {name.removeprefix(".text."): len(text) for name, text in code(cubin).items()}
    assert lengths.keys() == functions.keys()
    for name, function in functions.items():
        addresses = re.findall(r"/\*([0-9a-f]{4,})\*/\s+\S.*;", function["sass"])
        assert int(addresses[-1], 16) + INSTRUCTION == lengths[name] == INSTRUCTION * len(addresses), name


@pytest.mark.parametrize(
    ("kernel", "head_dim", "dtype"),
    # Two of a kernel, which have both types and both head_dims, and which other tests compile too.
    [
        pytest.param(*v, marks=() if v[1:] in ((64, "float16"), (128, "bfloat16")) else pytest.mark.exhaustive)
        for v in VARIANTS
    ],
)
def test_tensor_cores_and_spills(kernel, head_dim, dtype):
    cubin = build.compile_kernel(kernel, head_dim=head_dim, dtype=dtype)
    assert cubin.spill_bytes == 0 and cubin.sass["LDL"] == cubin.sass["STL"] == 0
    assert cubin.registers <= 255 and cubin.warnings == []
    assert bool(cubin.tensor_instructions) == (kernel not in WITHOUT_TENSOR_CORES), f"{kernel}: {cubin.sass}"


@pytest.mark.parametrize(
    ("kernel", "head_dim", "dtype", "defines"),
    sampled(FOR_PAGES, kind=lambda case: case[0]),
)
def test_paged_kernels_multiply_by_warpgroup_copy_by_tensor_and_spill_nothing(kernel, head_dim, dtype, defines):
    cubin = build.compile_kernel(kernel, head_dim=head_dim, dtype=dtype, defines=dict(defines))
    assert cubin.sass["HGMMA"] > 0 and cubin.sass["UTMALDG"] > 0 and cubin.sass["HMMA"] == 0
    assert cubin.spill_bytes == 0 and cubin.sass["LDL"] == cubin.sass["STL"] == 0 and cubin.warnings == []


def test_line_numbers_are_in_every_cubin():
    """compute-sanitizer names file and line from them."""
    for kernel in TRACED:
        cubin = build.compile_kernel(kernel, head_dim=64, dtype="float16")
        assert f"{kernel}.cu".encode() in cubin.path.read_bytes()


# ------------------------------------------------------------------------------------------------ the Hopper kernel


def entry_functions(text: str) -> dict[str, dict]:
    """Of each entry function in a disassembly: its `sass`, the `registers` it starts with, the `threads` of a block."""
    counts = re.findall(r"EIATTR_REGCOUNT\n(?:.*\n)*?.*index@\((\w+)\)\n.*\.word\s+(0x[0-9a-f]+)", text)
    found = {name: {"registers": int(count, 16)} for name, count in counts}
    for title, body in re.findall(r"^//-+ \.(\S+) +-+\n(.*?)(?=^//-+ \.|\Z)", text, flags=re.MULTILINE | re.DOTALL):
        kind, _, name = title.rpartition(".")
        if kind == "text":
            found[name]["sass"] = body
        elif kind == "nv.info" and name in found:
            found[name]["threads"] = int(
                re.search(r"EIATTR_MAX_THREADS\n(?:.*\n)*?.*\.word\s+(0x[0-9a-f]+)", body)[1], 16
            )
    return found


@pytest.mark.parametrize(("head_dim", "dtype", "defines"), sampled(HOPPER_TILES))
def test_both_entry_functions_multiply_by_warpgroup_copy_by_tensor_and_spill_nothing(head_dim, dtype, defines):
    cubin = build.compile_kernel(HOPPER, head_dim=head_dim, dtype=dtype, defines=dict(defines))
    assert cubin.spill_bytes == 0 and cubin.sass["LDL"] == cubin.sass["STL"] == 0
    assert cubin.warnings == [], "C75xx says that products were serialised, or that a wait was missing"
    found = entry_functions(build.disassemble(cubin.path))
    assert sorted(found) == [HOPPER, f"{HOPPER}_split"]
    for name, entry in found.items():
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", entry["sass"])
        products, copies = opcodes.count("HGMMA"), opcodes.count("UTMALDG")
        assert products and copies and not {"HMMA", "LDL", "STL"} & set(opcodes), name
        assert entry["registers"] * entry["threads"] <= REGISTERS_OF_A_MULTIPROCESSOR, name
    assert sum(e["sass"].count("HGMMA.") for e in found.values()) == cubin.sass["HGMMA"]


@pytest.mark.parametrize(("head_dim", "dtype", "defines"), sampled(HOPPER_TILES))
def test_the_registers_that_the_producer_gives_are_those_that_the_consumers_take(head_dim, dtype, defines):
    """A warpgroup that asks for registers which nobody gave back waits for ever."""
    cubin = build.compile_kernel(HOPPER, head_dim=head_dim, dtype=dtype, defines=dict(defines))
    entries = entry_functions(build.disassemble(cubin.path))
    entry = entries[HOPPER]
    assert entry["sass"].count("USETMAXREG") == 2 and "USETMAXREG" not in entries[f"{HOPPER}_split"]["sass"]
    changes = re.findall(r"USETMAXREG\.(TRY_ALLOC|DEALLOC)\.CTAPOOL (?:UP\d, )?(0x[0-9a-f]+) ;", entry["sass"])
    registers = {kind: int(count, 16) for kind, count in changes}
    assert sorted(registers) == ["DEALLOC", "TRY_ALLOC"]
    assert all(count % 8 == 0 and 24 <= count <= 256 for count in registers.values())
    assert registers["DEALLOC"] < entry["registers"] <= registers["TRY_ALLOC"]
    consumers = entry["threads"] - WARPGROUP
    after = registers["DEALLOC"] * WARPGROUP + registers["TRY_ALLOC"] * consumers
    assert after <= entry["registers"] * entry["threads"] <= REGISTERS_OF_A_MULTIPROCESSOR


def flow(sass: str) -> tuple[list[str], list[list[int]]]:
    """The instructions of an entry function, and of each the places of those that may come after it."""
    lines = re.findall(r"^(?:\s*(\.L_\w+):|\s+/\*[0-9a-f]{4,}\*/\s+(.*?) ?;)", sass, flags=re.MULTILINE)
    instructions, places = [], {}
    for label, instruction in lines:
        if label:
            places[label] = len(instructions)
        else:
            instructions.append(instruction)
    after = []
    for place, instruction in enumerate(instructions):
        leaves = re.match(r"(@\S+ )?(BRA|EXIT)\b(.*)", instruction)
        target = re.search(r"\.L_\w+", leaves[3]) if leaves else None
        goes_on = leaves is None or leaves[1] or re.search(r"\bU?P\d", leaves[3])
        after.append([place + 1] * bool(goes_on and place + 1 < len(instructions)))
        after[-1] += [places[target[0]]] if target else []
    return instructions, after


def natural_loops(after: list[list[int]]) -> list[set[int]]:
    """The loops of a flow: of each head that a jump leads back to, all from which that jump is reached without it."""
    unfinished, seen, back = [(0, iter(after[0]))], {0}, []
    under_way = {0}
    while unfinished:
        place, others = unfinished[-1]
        other = next(others, None)
        if other is None:
            under_way.discard(place)
            unfinished.pop()
        elif other in under_way:
            back.append((place, other))
        elif other not in seen:
            seen.add(other)
            under_way.add(other)
            unfinished.append((other, iter(after[other])))
    before: dict[int, list[int]] = {}
    for place in seen:
        for other in after[place]:
            before.setdefault(other, []).append(place)
    loops: dict[int, set[int]] = {}
    for last, head in back:
        loop, reached = loops.setdefault(head, {head}), [last]
        while reached:
            place = reached.pop()
            if place not in loop:
                loop.add(place)
                reached += before[place]
    return list(loops.values())


def test_loops_are_found_wherever_the_compiler_put_their_parts():
    """Of the inner loop, 2 to 4 and 8, one part lies behind the end of the outer one."""
    lines = ("MOV", ".L_a: HGMMA", ".L_b: HGMMA R2", "@P0 BRA `(.L_c)", ".L_d: @!P1 BRA `(.L_b)", "BRA.U UP0, `(.L_a)")
    lines += ("EXIT", "NOP", ".L_c: R2UR", "BRA `(.L_d)")
    sass = "".join(
        f"{label and label + chr(10)}    /*{16 * number:04x}*/ {instruction} ;\n"
        for number, line in enumerate(lines)
        for label, instruction in [re.fullmatch(r"(\.L_\w+:)? ?(.*)", line).groups(default="")]
    )
    instructions, after = flow(sass)
    assert len(instructions) == len(lines) and after[3:7] == [[4, 8], [5, 2], [6, 1], []]
    assert sorted(map(sorted, natural_loops(after))) == [[1, 2, 3, 4, 5, 8, 9], [2, 3, 4, 8, 9]]


def loop_over_pages(sass: str) -> list[str]:
    """The instructions of the innermost loop with warpgroup products, its rarer branches among them."""
    instructions, after = flow(sass)
    loops = [[instructions[place] for place in sorted(loop)] for loop in natural_loops(after)]
    return min((loop for loop in loops if any("HGMMA" in one for one in loop)), key=len)


@pytest.mark.parametrize(("head_dim", "dtype", "defines"), [*sampled(HOPPER_TILES), *sampled(PAGED_TILES)])
def test_slots_and_descriptors_stay_in_uniform_registers(head_dim, dtype, defines):
    """Else each product waits until its descriptor has been moved there: 10 % of the kernel's time.

    A branch that lanes take apart, anywhere between two pages, is enough for the compiler to move them out.
    """
    cubin = build.compile_kernel(HOPPER, head_dim=head_dim, dtype=dtype, defines=dict(defines))
    page = loop_over_pages(entry_functions(build.disassemble(cubin.path))[HOPPER]["sass"])
    assert_the_loop_is_lean(page)


def assert_the_loop_is_lean(page: list[str], most: int = 1) -> None:
    """It is the loop over pages, and at most so many numbers are moved to uniform registers in it."""
    products = sum("HGMMA" in one for one in page)
    assert 8 <= products <= 16 and sum("MUFU.EX2" in one for one in page) >= 64, "this is not the loop over pages"
    assert sum("R2UR" in one for one in page) <= most


@pytest.mark.parametrize(("head_dim", "dtype", "defines"), MASKED_TILES)
def test_masks_leave_the_loop_over_pages_as_lean_and_spill_nothing(head_dim, dtype, defines):
    cubin = build.compile_kernel(HOPPER, head_dim=head_dim, dtype=dtype, defines=dict(defines))
    few, union = len(defines) > 1, dict(defines)[options.MASKS]
    known = KNOWN_SPILLS.get((head_dim, few, union), 0)
    entries = entry_functions(build.disassemble(cubin.path))
    assert sorted(entries) == [HOPPER, f"{HOPPER}_plan"] and cubin.warnings == []
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", entries[HOPPER]["sass"])
    assert "HGMMA" in opcodes and "UTMALDG" in opcodes and "HMMA" not in opcodes
    assert cubin.spill_bytes == known and bool({"LDL", "STL"} & set(opcodes)) == (known > 0)
    assert_the_loop_is_lean(loop_over_pages(entries[HOPPER]["sass"]), KNOWN_MOVES.get((head_dim, few, union), 1))


@pytest.mark.parametrize(("kernel", "shape", "union", "head_dim", "dtype"), sampled(INVARIANT_KERNELS, seed=7))
def test_the_invariant_mode_multiplies_by_warpgroup_and_spills_little_and_never_in_the_loop_over_pages(
    kernel, shape, union, head_dim, dtype
):
    defines = dict((*SHAPES[shape], INVARIANT, *([(options.MASKS, union)] if union else [])))
    cubin = build.compile_kernel(kernel, head_dim=head_dim, dtype=dtype, defines=defines)
    assert cubin.warnings == [], "C75xx says that products were serialised, or that a wait was missing"
    assert cubin.spill_bytes <= MOST_SPILLS.get((kernel, head_dim), 0) and cubin.registers <= 255
    entries = entry_functions(build.disassemble(cubin.path))
    assert set(entries) - {f"{HOPPER}_plan"} == {kernel}, "no entry function splits keys"
    sass = entries[kernel]["sass"]
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass)
    assert {"HGMMA", "UTMALDG"} <= set(opcodes) and "HMMA" not in opcodes
    page = loop_over_pages(sass)
    assert not [one for one in page if re.search(r"\b(LDL|STL)\b", one)]
    assert_the_loop_is_lean(page, 1 if kernel == HOPPER else MOVES_OF_DECODE)
    sums = re.findall(r"\bREDG?\.[\w.]+", sass)
    if kernel == DECODE:
        assert sums == [], "its parts lie apart"
    else:  # four sums each, and small ones as 0, as the additions that bring them together again take them
        assert len(sums) == head_dim // 8 and all(".ADD.F32x4.FTZ.RN" in one for one in sums), sums


def test_the_audit_sees_a_wait_that_is_missing():
    """The compiler puts a wait back where one is missing, so that no result is wrong: only its remark tells."""
    source = build.kernel_source(HOPPER)
    first_product = "multiply_q_k<TILE_ROWS, PAGE_KEYS>(s, q, k_slots);\n  wgmma_commit();\n"
    assert source.count(f"{first_product}  wgmma_wait<0>();\n") == 1
    source = source.replace(f"{first_product}  wgmma_wait<0>();\n", first_product)
    cubin = build.compile_kernel(HOPPER, head_dim=64, dtype="float16", source=source)
    assert any("C7517" in line for line in cubin.warnings)
