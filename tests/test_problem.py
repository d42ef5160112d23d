"""Problem: its arithmetic, its labels, and what it refuses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashcore.errors import InvalidProblem, UnknownName
from flashcore.problem import PRESETS, Problem, parse_problem, square

counts = st.integers(min_value=1, max_value=4096)


@st.composite
def problems(draw):
    heads_kv = draw(st.integers(1, 16))
    return Problem(
        batch=draw(counts),
        num_heads_q=heads_kv * draw(st.integers(1, 8)),
        num_heads_kv=heads_kv,
        seqlen_q=draw(counts),
        seqlen_k=draw(counts),
        head_dim=draw(counts),
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        causal=draw(st.booleans()),
        softmax_scale=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
        page_size=draw(counts),
        batch_invariant=draw(st.booleans()),
    )


@st.composite
def masked_problems(draw):
    small = st.integers(1, 12)
    causal = draw(st.booleans())
    return Problem(
        batch=draw(small), num_heads_q=2, num_heads_kv=1, seqlen_q=draw(small), seqlen_k=draw(small), head_dim=8,
        causal=causal, window_left=draw(st.integers(-1, 14)),
        window_right=draw(st.sampled_from([-1, 0]) if causal else st.integers(-1, 14)),
        softcap=draw(st.none() | st.floats(0, 1e6, exclude_min=True)), sink=draw(st.booleans()),
        lengths=draw(st.sampled_from(["", "right", "left", "ragged"])),
    )  # fmt: skip


@given(masked_problems())
def test_a_label_with_masks_reads_back_and_the_pairs_of_a_window_are_those_that_can_be_counted(problem):
    assert parse_problem(problem.label()) == problem
    left, right = problem.window
    offset = problem.seqlen_k - problem.seqlen_q
    seen = [
        (i, j)
        for i in range(problem.seqlen_q)
        for j in range(problem.seqlen_k)
        if (left < 0 or j >= i + offset - left) and (right < 0 or j <= i + offset + right)
    ]
    assert problem.visible_pairs() == len(seen)
    if "window" in problem.masks:
        assert problem.flops() == 4 * problem.batch * 2 * len(seen) * 8
        columns = 2 * len({j for _, j in seen})
        assert problem.bytes() == problem.batch * 2 * 8 * (2 * 2 * problem.seqlen_q + columns)
    else:
        plain = problem.with_(softcap=None, sink=False, lengths="")
        assert (problem.flops(), problem.bytes()) == (plain.flops(), plain.bytes())


def test_bits_that_are_the_same_in_every_batch_are_other_numbers_and_no_other_work():
    plain = square(1, 2, 8, 64, causal=True)
    asked = plain.with_(batch_invariant=True)
    assert asked != plain and hash(asked) != hash(plain) and asked.mathematics != plain.mathematics
    assert asked.label() == f"{plain.label()},batch_invariant" and parse_problem(asked.label()) == asked
    assert asked.masks == () and (asked.flops(), asked.bytes()) == (plain.flops(), plain.bytes())
    with pytest.raises(InvalidProblem, match="batch_invariant"):
        plain.with_(batch_invariant="perhaps")
    with pytest.raises(InvalidProblem, match="nor one of causal, sink, batch_invariant, nor a key=value pair"):
        parse_problem("B=1,H=2,S=8,D=64,invariant")


def test_masks_are_named_in_one_order_and_causal_is_none_of_them():
    plain = square(1, 2, 8, 64, causal=True)
    assert plain.masks == () and plain.window == (-1, 0) and plain.label() == "B=1,H=2,S=8,D=64,causal"
    everything = plain.with_(window_left=3, softcap=30.0, sink=True, lengths="left")
    assert everything.masks == ("window", "softcap", "sink", "lengths")
    assert everything.label().endswith("causal,window=3:0,softcap=30.0,sink,lengths=left")
    assert plain.with_(lengths="ragged").masks == ("ragged",)
    assert plain.with_(window_right=0) == plain and plain.with_(window_right=0).masks == ()
    assert plain.with_(causal=False, window_right=0).masks == ("window",)
    assert parse_problem("B=1,H=1,S=8,D=64,window=-1:2").window == (-1, 2)


@given(problems())
def test_a_label_reads_back_as_the_same_problem(problem):
    assert parse_problem(problem.label()) == problem


@given(problems())
def test_causal_halves_the_work_and_pages_cover_the_keys(problem):
    dense, causal = problem.with_(causal=False), problem.with_(causal=True)
    assert causal.flops() == dense.flops() // 2
    assert problem.page_size * (problem.num_pages() - 1) < problem.seqlen_k <= problem.page_size * problem.num_pages()


def test_the_reports_workload_is_274_9_gflop_and_its_traffic_is_counted_by_hand():
    report = PRESETS["report"]
    assert report.flops() == 4 * 16 * 16 * 2048 * 2048 * 64 == 274_877_906_944
    assert report.bytes() == 4 * (16 * 16 * 2048 * 64) * 2
    grouped = Problem(batch=2, num_heads_q=8, num_heads_kv=2, seqlen_q=3, seqlen_k=5, head_dim=64, dtype="float32")
    assert grouped.bytes() == 4 * 64 * 2 * ((8 * 3) + (2 * 5) + (2 * 5) + (8 * 3))


def test_the_scale_defaults_to_one_over_the_root_of_head_dim():
    assert square(1, 1, 8, 64).scale == 1 / math.sqrt(64)
    assert square(1, 1, 8, 64, softmax_scale=0.0).scale == 0.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch", 0), ("num_heads_q", -1), ("num_heads_kv", 0), ("seqlen_q", 0), ("seqlen_k", 0), ("head_dim", 0),
        ("page_size", 0), ("dtype", "float8"), ("softmax_scale", math.inf), ("softmax_scale", math.nan),
        ("num_heads_kv", 3), ("seqlen_q", 1.5), ("window_left", -2), ("window_right", -7), ("softcap", 0.0),
        ("softcap", -30.0), ("softcap", math.inf), ("softcap", math.nan), ("lengths", "both"), ("sink", "maybe"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_the_field_or_the_rule_named(field, value):
    good = {"batch": 1, "num_heads_q": 4, "num_heads_kv": 2, "seqlen_q": 8, "seqlen_k": 8, "head_dim": 64}
    with pytest.raises(InvalidProblem, match=field):
        Problem(**{**good, field: value})


def test_a_window_to_the_right_contradicts_causal():
    with pytest.raises(InvalidProblem, match=r"window_right \(2\) lets a query see keys after its own position"):
        square(1, 1, 8, 64, causal=True, window_right=2)


@pytest.mark.parametrize("part", ["window=3", "window=3:x", "window=1:2:3", "softcap=thirty", "lengths=both", "sinks"])
def test_a_mask_that_no_label_has_is_refused(part):
    with pytest.raises(InvalidProblem, match=part.partition("=")[0]):
        parse_problem(f"B=1,H=1,S=8,D=64,{part}")


def test_an_unknown_field_is_refused():
    with pytest.raises(InvalidProblem, match="heads"):
        Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=1, seqlen_k=1, head_dim=64, heads=3)


def test_a_problem_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        PRESETS["tiny"].batch = 2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_found_by_name(name):
    assert parse_problem(f" {name} ") is PRESETS[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("B=1,H=2,S=x,D=64", "not a number"),
        ("B=1,H=2,S=8,D=64,Q=3", "no key of a problem"),
        ("B=1,H=2,S=8,D=64,fp8", "neither a dtype"),
        ("B=1,H=2,S=8", "head_dim"),
        ("B=1,H=2,S=8,D=64,scale=inf", "softmax_scale"),
    ],
)
def test_a_bad_label_says_what_is_wrong_with_it(text, message):
    with pytest.raises(InvalidProblem, match=message):
        parse_problem(text)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(UnknownName, match="report-causal"):
        parse_problem("reprot")


def test_operations_of_sequences_with_lengths_are_those_of_each_one():
    problem = square(3, 4, 64, 16, causal=True, lengths="ragged")
    assert problem.flops_of([64, 64, 64], [64, 64, 64]) == problem.flops()
    assert problem.flops_of([10, 0, 7], [20, 5, 0]) == 4 * 4 * 10 * 20 * 16 // 2
    window = problem.with_(window_left=3)
    assert window.flops_of([8], [8]) == 4 * 4 * (1 + 2 + 3 + 5 * 4) * 16
