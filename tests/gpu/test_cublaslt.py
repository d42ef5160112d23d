"""cuBLASLt: impossible products are refused, no attribute has a wrong width, and choices can be told and kept."""

import ctypes
import dataclasses
import gc
import json

import numpy as np
import pytest

from flashcore.errors import CublasLtError, InvalidProblem, ToolMissing, UnknownName
from flashcore.gpu import cublaslt
from flashcore.gpu.cublaslt import Algorithm, Product

QK = Product(m=2048, n=128, k=64, transpose_b=True)


def algorithm(rank: int, workspace: int = 0) -> Algorithm:
    return Algorithm(
        rank=rank, algo_id=66, tile="TILE_64x48", stages="STAGES_64xAUTO", split_k=1, reduction_scheme=0,
        cta_swizzling=0, custom_option=0, inner_shape="UNDEFINED", cluster_shape="SHAPE_2x4x1",
        workspace_bytes=workspace, waves_count=0.65, raw=f"{rank:02x}" * 64,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ products


def test_a_product_counts_its_work_and_packs_its_strides():
    assert QK.flops() == 2 * 2048 * 128 * 64 and QK.bytes() == 2 * (2048 * 64 + 64 * 128 + 2048 * 128)
    assert (QK.row_a, QK.row_b, QK.row_d) == (64, 64, 128)
    assert (QK.next_a, QK.next_b, QK.next_d) == (2048 * 64, 128 * 64, 2048 * 128)
    plain = Product(m=4, n=6, k=8, batch=3, out_dtype="float32")
    assert plain.row_b == 6 and plain.next_b == 48 and plain.bytes() == 3 * (2 * (32 + 48) + 4 * 24)
    assert "m=4" in plain.label() and "batch=3" in plain.label() and "float16->float32" in plain.label()
    shared = dataclasses.replace(QK, batch=3, next_b=0)
    assert shared.next_b == 0 and shared.next_a == 2048 * 64, "0 is one B for the whole batch, and None means packed"


def test_a_product_says_how_its_matrices_lie():
    a, b, d = Product(m=4, n=6, k=8, batch=2, transpose_b=True, out_dtype="float32", row_b=16).matrices()
    assert a == ("float16", 4, 8, 8, 32) and b == ("float16", 6, 8, 16, 96) and d == ("float32", 4, 6, 6, 24)
    assert Product(m=4, n=6, k=8).matrices()[1][1:3] == (8, 6)


def test_a_batch_cannot_be_written_to_one_matrix():
    with pytest.raises(InvalidProblem, match="All 2 matrices of a batch would be written to one D"):
        dataclasses.replace(QK, batch=2, next_d=0)
    assert dataclasses.replace(QK, batch=1, next_d=0).next_d == 0


@pytest.mark.parametrize("wrong", [dict(m=0), dict(n=-1), dict(k=0), dict(batch=0)])
def test_an_empty_product_is_refused(wrong):
    with pytest.raises(InvalidProblem, match="at least 1"):
        Product(**{"m": 8, "n": 8, "k": 8, **wrong})


@pytest.mark.parametrize(("letter", "fields"), [("A", {"row_a": 63}), ("B", {"row_b": 63}), ("D", {"row_d": 127})])
def test_rows_that_overlap_are_refused(letter, fields):
    """The bug it stands for: a tail that sets columns where rows are meant."""
    with pytest.raises(InvalidProblem, match=f"Rows of {letter} .* overlap"):
        dataclasses.replace(QK, **fields)


# ------------------------------------------------------------------------------------------------ attributes


def test_an_attribute_is_always_set_at_its_own_width():
    """The bug it stands for: four bytes given for a 64-bit attribute."""
    calls = []

    def setter(descriptor, attribute, pointer, size):
        calls.append((descriptor, attribute, size))

    cublaslt._set(QK, "set", setter, lambda attribute: np.int64, 7, 6, 1 << 40)
    cublaslt._set(QK, "set", setter, lambda attribute: np.int32, 7, 5, 256)
    cublaslt._set(QK, "set", setter, lambda attribute: np.int64, 7, 6, np.int64(3))
    assert calls == [(7, 6, 8), (7, 5, 4), (7, 6, 8)]


def never(*_):
    raise AssertionError("the value was handed on")


@pytest.mark.parametrize("value", [1 << 40, -(1 << 40)])
def test_a_value_that_does_not_fit_its_attribute_is_refused(value):
    with pytest.raises(InvalidProblem, match=r"does not fit 5 \(int32\) of cuBLASLt, for the product m=2048"):
        cublaslt._set(QK, "set", never, lambda attribute: np.int32, 7, 5, value)


@pytest.mark.parametrize("value", [np.int32(64), np.int16(64)])
def test_a_value_with_a_width_of_its_own_is_refused_unless_it_is_the_attributes(value):
    with pytest.raises(InvalidProblem, match=rf"set takes 8 bytes \(int64\) for 6, and a value of {value.nbytes} "):
        cublaslt._set(QK, "set", never, lambda attribute: np.int64, 7, 6, value)


class Library:
    """cuBLASLt's enumerations and widths from its bindings, and a log of what is made and destroyed."""

    class cuBLASLtError(Exception):  # noqa: N801 - the name that the bindings give it
        status = 7

    def __init__(self):
        from nvmath.bindings import cublasLt as bindings

        self.bindings, self.made, self.destroyed, self.set, self.refused = bindings, [], [], [], None

    def __getattr__(self, name):
        return getattr(self.bindings, name)

    def get_status_name(self, status):
        return {7: "CUBLAS_STATUS_INVALID_VALUE"}[status]

    def _make(self, *what):
        self.made.append(what)
        return len(self.made) - 1

    def matmul_desc_create(self, *what):
        return self._make("operation", *what)

    def matrix_layout_create(self, *what):
        return self._make("layout", *what)

    def _destroy(self, handle):
        self.destroyed.append(handle)

    matmul_desc_destroy = matrix_layout_destroy = _destroy

    def matrix_layout_set_attribute(self, handle, attribute, pointer, size):
        if self.refused == attribute:
            raise self.cuBLASLtError("no")
        value = np.ctypeslib.as_array((ctypes.c_byte * size).from_address(pointer)).view(f"i{size}")[0]
        self.set.append((handle, attribute, int(value)))

    def matmul_desc_set_attribute(self, handle, attribute, pointer, size):
        self.set.append((handle, attribute, 1))


@pytest.fixture
def bindings(monkeypatch):
    stand_in = Library()
    monkeypatch.setattr(cublaslt, "library", lambda: stand_in)
    return stand_in


STRIDED_BATCH_OFFSET = 6


@pytest.mark.parametrize("order", ["column", "row"])
def test_the_layouts_are_those_of_the_matrices_and_are_destroyed(bindings, order):
    product = Product(m=4, n=6, k=8, batch=2, transpose_b=True, row_b=16, order=order)
    descriptors = cublaslt._Descriptors(product)
    wanted = {"row": [(4, 8, 8), (6, 8, 16), (4, 6, 6)], "column": [(8, 6, 16), (8, 4, 8), (6, 4, 6)]}[order]
    assert [what[2:] for what in bindings.made if what[0] == "layout"] == wanted
    offsets = [value for _, attribute, value in bindings.set if attribute == STRIDED_BATCH_OFFSET]
    assert offsets == {"row": [32, 96, 24], "column": [96, 32, 24]}[order]
    del descriptors
    assert sorted(bindings.destroyed) == list(range(len(bindings.made)))


def test_four_bytes_for_a_stride_are_refused_and_nothing_is_left_behind(bindings):
    product = Product(m=4, n=6, k=8, batch=2, transpose_b=True, next_b=np.int32(48))
    with pytest.raises(InvalidProblem, match=r"8 bytes \(int64\) for STRIDED_BATCH_OFFSET, and a value of 4 \(int32\)"):
        cublaslt._Descriptors(product)
    gc.collect()
    assert len(bindings.made) == 2 and sorted(bindings.destroyed) == [0, 1]


def test_a_status_of_a_setter_is_an_error_with_its_name_the_call_and_the_shapes(bindings):
    bindings.refused = STRIDED_BATCH_OFFSET
    with pytest.raises(CublasLtError, match="cublasLtMatrixLayoutSetAttribute gave CUBLAS_STATUS_INVALID_VALUE .*m=4"):
        cublaslt._Descriptors(Product(m=4, n=6, k=8))
    with pytest.raises(ZeroDivisionError):
        cublaslt._checked("a call", QK, lambda: 1 / 0)


def test_the_workspace_limit_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("FLASHCORE_CUBLASLT_WS_MB", raising=False)
    assert cublaslt.workspace_limit() == 256 << 20
    monkeypatch.setenv("FLASHCORE_CUBLASLT_WS_MB", "32")
    assert cublaslt.workspace_limit() == 32 << 20
    for wrong in ("", "-1", "1.5", "lots"):
        monkeypatch.setenv("FLASHCORE_CUBLASLT_WS_MB", wrong)
        with pytest.raises(InvalidProblem, match="whole megabytes"):
            cublaslt.workspace_limit()


# ------------------------------------------------------------------------------------------------ choosing


@pytest.fixture
def offered(monkeypatch, tmp_path):
    """Three candidates with known times, and a cache of the test's own."""
    found = [algorithm(0), algorithm(1, workspace=4096), algorithm(2, workspace=1024)]
    monkeypatch.setattr(cublaslt, "candidates", lambda product, **_: found)
    monkeypatch.setattr(cublaslt, "measure", lambda product, which, **_: [3.0, None, 2.0])
    monkeypatch.setattr(cublaslt, "_winner_path", lambda product, device: tmp_path / "winner.json")
    return found


def test_each_policy_chooses_what_it_says(offered):
    assert cublaslt.choose(QK, policy="first") == (offered[0], "first of 3 that the heuristic offers")
    assert cublaslt.choose(QK, policy="largest-workspace")[0] is offered[1]
    best, why = cublaslt.choose(QK, policy="measured")
    assert best is offered[2] and "fastest of 2 measured, 2.00 µs" in why
    with pytest.raises(UnknownName, match="first, largest-workspace, measured"):
        cublaslt.choose(QK, policy="luck")


def test_a_measured_winner_is_kept_and_a_damaged_one_measured_again(offered, tmp_path, monkeypatch):
    cublaslt.choose(QK, policy="measured")
    monkeypatch.setattr(cublaslt, "measure", lambda product, which, **_: [1.0, 9.0, 9.0])
    assert cublaslt.choose(QK, policy="measured") == (offered[2], "fastest when it was measured earlier on this GPU")
    kept = tmp_path / "winner.json"
    for damage in ("{", json.dumps({"rank": 0}), json.dumps({**dataclasses.asdict(offered[2]), "raw": "00"})):
        kept.write_text(damage)
        assert cublaslt.choose(QK, policy="measured")[0] is offered[0]
        kept.unlink()


def test_no_candidate_that_runs_is_an_error_with_the_shapes(offered, monkeypatch):
    monkeypatch.setattr(cublaslt, "measure", lambda product, which, **_: [None] * 3)
    with pytest.raises(CublasLtError, match="every candidate failed.*m=2048"):
        cublaslt.choose(QK, policy="measured")


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    import nvmath.bindings.cublasLt as bindings

    def missing():
        raise RuntimeError("libcublasLt.so was not found")

    monkeypatch.setattr(bindings, "get_version", missing)
    cublaslt.library.cache_clear()
    try:
        with pytest.raises(ToolMissing, match="nvmath-python.*pip install"):
            cublaslt.library()
    finally:
        cublaslt.library.cache_clear()


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["column", "row"])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_every_layout_gives_torchs_product(transpose_b, order):
    import torch

    a = torch.randn(3, 40, 64, device="cuda", dtype=torch.float16)
    b = torch.randn(3, *((24, 64) if transpose_b else (64, 24)), device="cuda", dtype=torch.float16)
    d = torch.full((3, 40, 24), float("nan"), device="cuda")
    product = Product(40, 24, 64, batch=3, transpose_b=transpose_b, out_dtype="float32", order=order)
    for chosen in cublaslt.candidates(product):
        room = torch.empty(max(1, chosen.workspace_bytes), dtype=torch.uint8, device="cuda")
        plan = cublaslt.Plan(product, chosen, alpha=2.0, beta=0.0)
        plan.run(a.data_ptr(), b.data_ptr(), d.data_ptr(), stream=torch.cuda.current_stream().cuda_stream,
                 workspace=room.data_ptr(), workspace_bytes=chosen.workspace_bytes)  # fmt: skip
        expected = 2 * a.double() @ (b.double().transpose(1, 2) if transpose_b else b.double())
        assert torch.allclose(d.double(), expected, atol=1e-3, rtol=1e-3)
