"""What kernels are told of masks: the macro, the struct, and series that stand for a tanh."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import launch_structs

from flashcore import backends
from flashcore.backends import _masks
from flashcore.backends._masks import MASK_PARAMS, OVER_PAGES, TANH_ERROR, cap_params, mask_defines, mask_params
from flashcore.gpu import build, options
from flashcore.numerics.masking import MaskTensors
from flashcore.problem import square

PLAIN = square(2, 4, 128, 64)


@pytest.mark.parametrize("kernel", ["attention_hopper", "attention_decode"])
def test_the_host_packs_the_struct_that_kernels_declare(kernel):
    letters = launch_structs.declared(kernel, "MaskParams")
    assert letters == launch_structs.packed(MASK_PARAMS) == "Q" * 7 + "i" * 5 + "f" * 10
    assert MASK_PARAMS.size == launch_structs.size_in_c(letters)


def test_each_mask_is_a_bit_of_the_macro():
    assert mask_defines(PLAIN) == () == mask_defines(PLAIN.with_(causal=True))
    for changes, bits in (
        ({"window_left": 3}, 1), ({"window_right": 0}, 1), ({"softcap": 2.0}, 2), ({"sink": True}, 4),
        ({"lengths": "left"}, 8), ({"lengths": "ragged"}, 8), ({"window_left": 0, "sink": True}, 5),
    ):  # fmt: skip
        assert mask_defines(PLAIN.with_(**changes)) == ((options.MASKS, bits),)
    text = build.kernel_source("attention_decode")
    for name, has in (("window", "HAS_WINDOW"), ("softcap", "HAS_SOFTCAP"), ("sink", "HAS_SINK")):
        assert f"constexpr bool {has} = {options.MASKS} & {_masks.MASK_BITS[name]};" in text


def test_window_sink_and_cap_go_into_the_struct_and_a_plain_problem_has_none():
    sink = torch.zeros(4)
    problem = PLAIN.with_(causal=True, window_left=7, softcap=30.0, sink=True)
    fields = MASK_PARAMS.unpack(mask_params(problem, MaskTensors(sink=sink), 0.125))
    assert fields[:10] == (sink.data_ptr(), *(0,) * 9) and fields[10:12] == (7, 0), "causal ends the window"
    assert fields[12:] == tuple(np.float32(cap_params(30.0, 0.125)).tolist())
    fields = MASK_PARAMS.unpack(mask_params(PLAIN, None, 0.125, range(1, 7), (7, 8, 9)))
    assert fields == (0, *range(1, 10), -1, -1, *(0.0,) * 10)
    far = MASK_PARAMS.unpack(mask_params(PLAIN.with_(window_left=2**40, window_right=2**31), None, 0.125))
    assert far[10:12] == (1 << 30, 1 << 30), "a position plus that is still 32 bits"


@pytest.mark.parametrize(("softcap", "scale"), [(30.0, 0.125), (0.5, 1.0), (50.0, -0.09), (1.0, 20.0)])
def test_the_series_are_the_tanh_as_far_as_they_are_said_to_be(softcap, scale):
    cap, by_cap, *rest = cap_params(softcap, scale)
    assert (cap, by_cap) == (softcap, scale / softcap)
    for terms, square_up_to in ((rest[:4], rest[4]), (rest[5:7], rest[7])):
        score = np.linspace(-1, 1, 4001) * math.sqrt(square_up_to)
        exponent = sum(term * score ** (2 * i + 1) for i, term in enumerate(terms))
        exact = softcap * math.log2(math.e) * np.tanh(scale * score / softcap)
        assert np.abs(exponent - exact).max() < softcap * math.log2(math.e) * TANH_ERROR
    assert rest[7] < rest[4], "the shorter one holds for less"


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e5])
def test_where_no_power_is_a_float_of_full_precision_no_score_is_near(scale):
    params = cap_params(1.0, scale)
    assert params[:2] == (1.0, scale) and params[6] == -1.0 == params[9]
    assert cap_params(None, scale) == (0.0,) * 10


def test_kernels_over_pages_take_all_masks_but_lengths():
    for name in ("decode", "hopper-paged"):
        backend = backends.get(name)
        assert backend.masks == backend.paged_masks == OVER_PAGES == ("window", "softcap", "sink")
        assert backend.tanh_error == TANH_ERROR == backends.get("hopper").tanh_error
        asked = square(1, 2, 8, 64, page_size=64, window_left=3, softcap=1.0, sink=True)
        assert backend.why_not(asked) is None is backend.why_not_paged(asked)
        assert backend.why_not_paged(asked.with_(lengths="right")) == "it does not take lengths of padded sequences"
    told = dict(backends.get("hopper-paged").defines(asked, 0))
    assert told == {"FLASHCORE_PAGED": 1, options.MASKS: 7} and backends.get("decode").defines(asked, 0) == (
        (options.MASKS, 7),
    )
    other = backends.get("cublaslt-paged")
    assert other.why_not_paged(asked.with_(sink=False)) == "it does not take a window or a softcap"


def test_a_softcap_that_the_tanh_is_too_coarse_for_is_refused_and_a_large_one_goes_without_the_short_series():
    capped = square(1, 2, 8, 64, softcap=1000.0)
    for name in ("hopper", "hopper-paged", "decode"):
        assert backends.get(name).why_not(capped) is None
        assert "up to 1000" in backends.get(name).why_not(capped.with_(softcap=1001.0))
    assert _masks.cap_params(100.0, 0.125)[-1] > 0 > _masks.cap_params(101.0, 0.125)[-1]
