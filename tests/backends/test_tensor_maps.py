"""Tensor maps: what the driver is asked for, and what is said when it refuses."""

from __future__ import annotations

import ctypes

import pytest

from flashcore.backends import _tensor_maps
from flashcore.backends._tensor_maps import MAP_BYTES, tensor_map
from flashcore.errors import LaunchError


class FakeMap:
    def __init__(self):
        self.bytes = ctypes.create_string_buffer(bytes(range(MAP_BYTES)), MAP_BYTES)

    def getPtr(self):  # noqa: N802  the driver's name
        return ctypes.addressof(self.bytes)


def test_a_tensor_map_is_asked_for_innermost_dimension_first_and_in_bytes(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    calls = []

    def encode(*arguments):
        calls.append(arguments)
        return driver.CUresult.CUDA_SUCCESS, FakeMap()

    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", encode)
    made = tensor_map(4096, (2, 4, 100, 128), (51200, 128, 512), rows=64, dtype="bfloat16")
    assert made == bytes(range(MAP_BYTES))
    kind, rank, address, sizes, steps, box = calls[0][:6]
    assert kind == driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 and (rank, address) == (4, 4096)
    assert [int(n) for n in sizes] == [128, 100, 4, 2] and [int(n) for n in steps] == [1024, 256, 102400]
    assert [int(n) for n in box] == [64, 64, 1, 1], "128 bytes of columns, the widest swizzle"
    # The stride of a dimension of one means nothing, and the driver would refuse one that is no multiple of 16 bytes.
    tensor_map(4096, (1, 1, 100, 64), (7, 3, 64), rows=64, dtype="float16")
    assert [int(n) for n in calls[1][4]] == [128, 128, 128]


def test_a_map_that_the_driver_refuses_is_an_error_that_names_the_tensor(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    refused = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", lambda *_: (refused, None))
    with pytest.raises(LaunchError, match=r"k of shape \(1, 2, 100, 64\) and strides \(12800, 6400, 64\)") as raised:
        tensor_map(8, (1, 2, 100, 64), (12800, 6400, 64), rows=64, dtype="float16", name="k")
    assert "CUDA_ERROR_INVALID_VALUE" in str(raised.value)


@pytest.fixture
def driver():
    """The driver's library, which describes tensors without a GPU as well."""
    bindings = pytest.importorskip("cuda.bindings.driver")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pytest.skip("libcuda is not installed")
    if int(bindings.cuInit(0)[0]):
        pytest.skip("the driver does not start here")
    return bindings


def test_what_the_driver_itself_takes_and_refuses(driver):
    shape, strides = (2, 4, 100, 64), (25600, 6400, 64)
    right = tensor_map(1 << 20, shape, strides, rows=256, dtype="float16")
    assert len(right) == MAP_BYTES and right != tensor_map(1 << 20, shape, strides, rows=256, dtype="bfloat16")
    bshd = tensor_map(1 << 20, shape, (25600, 64, 256), rows=64, dtype="float16")
    assert len(bshd) == MAP_BYTES, "strides may come in any order of size"
    wrong = [
        {"address": (1 << 20) + 8},  # no multiple of 16 bytes
        {"rows": 257},
        {"strides": (25600, 6400, 68)},  # rows that start at odd multiples of 8 bytes
        {"shape": (2, 4, 0, 64)},
    ]
    for change in wrong:
        given = {"address": 1 << 20, "shape": shape, "strides": strides, "rows": 64, "dtype": "float16", **change}
        with pytest.raises(LaunchError, match="cuTensorMapEncodeTiled"):
            _tensor_maps.tensor_map(given.pop("address"), given.pop("shape"), given.pop("strides"), **given)


@pytest.fixture
def asked(monkeypatch):
    """What the driver is asked for, call by call."""
    bindings = pytest.importorskip("cuda.bindings.driver")
    calls = []

    def encode(*arguments):
        calls.append(arguments)
        return bindings.CUresult.CUDA_SUCCESS, FakeMap()

    monkeypatch.setattr(bindings, "cuTensorMapEncodeTiled", encode)
    return calls


def test_a_box_may_hold_rows_of_several_heads(asked):
    tensor_map(4096, (2, 8, 3, 128), (3072, 384, 128), rows=3, heads=8, dtype="float16")
    assert [int(n) for n in asked[0][5]] == [64, 3, 8, 1] and [int(n) for n in asked[0][6]] == [1, 1, 1, 1]


def test_swizzle_fill_and_promotion_are_what_kernels_read_by(asked):
    from cuda.bindings import driver as bindings

    for promote in (True, False):
        tensor_map(4096, (1, 1, 8, 64), (512, 512, 64), rows=8, dtype="float16", promote=promote)
    for call, promotion in zip(asked, ("L2_256B", "NONE"), strict=True):
        kind, interleave, swizzle, promoted, filled = call[0], *call[7:]
        assert kind == bindings.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        assert interleave == bindings.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE
        assert swizzle == bindings.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B
        assert promoted == getattr(bindings.CUtensorMapL2promotion, f"CU_TENSOR_MAP_L2_PROMOTION_{promotion}")
        zeros = bindings.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
        assert filled == zeros, "what lies outside is read as zeros, which a row of V past the end has to be"
