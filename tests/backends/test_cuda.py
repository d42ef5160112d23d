"""A backend that is one launch: what its kernel is told, which launches are kept, and what a machine lacks."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from support import launch_structs
from support.recorded_driver import RecordedDriver, function_at, loaded

from flashcore.backends import AVAILABLE, CudaBackend, _cuda
from flashcore.backends._cuda import PARAMS
from flashcore.backends._traces import TRACE
from flashcore.gpu import launching
from flashcore.numerics.inputs import make_inputs
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=50, head_dim=64, softmax_scale=0.5)


class One(CudaBackend):
    """As the scalar kernel's backend is."""

    id = "one"
    title = "one launch"
    kernel = "attention_scalar"


class Told(One):
    """A backend that says more of itself."""

    def defines(self, problem, device):
        return (("KEYS", problem.seqlen_k), ("ON", device))

    def entry(self, problem, device):
        return "another_entry"


@pytest.fixture
def machine(monkeypatch):
    """A GPU that records each launch; a kernel is loaded with tiles of 32 rows and pages of 16 keys."""
    driver = RecordedDriver([PARAMS.size])
    driver.loads, driver.entries, driver.shape = [], [], loaded()

    def load(*wanted):
        driver.loads.append(wanted)
        return driver.shape

    def entry(kernel, name, device):
        driver.entries.append((name, device))
        return function_at(0xABC)

    monkeypatch.setattr(launching, "_launch_kernel", lambda: driver.call)
    monkeypatch.setattr(launching, "_kept", {})
    monkeypatch.setattr(_cuda, "load_kernel", load)
    monkeypatch.setattr(_cuda, "entry_point", entry)
    monkeypatch.setattr(_cuda, "current_stream", lambda device: driver.stream)
    driver.stream = 7
    return driver


def outputs(q):
    return torch.empty_like(q), torch.empty(q.shape[:3])


# ------------------------------------------------------------------------------------------------ what is told


def test_parameters_are_packed_as_the_kernels_declare_them():
    letters = launch_structs.declared("attention_scalar", "AttentionParams")
    assert letters == launch_structs.packed(PARAMS) == "Q" * 5 + "q" * 12 + "i" * 6 + "f"
    assert PARAMS.size == launch_structs.size_in_c(letters)


def test_pointers_strides_sizes_mask_and_scale_in_their_places():
    q, k, v = make_inputs(PROBLEM)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = outputs(q)
    told = PARAMS.unpack(One().params(q, k, v, out, lse, PROBLEM.with_(causal=True)))
    assert told[:5] == tuple(t.data_ptr() for t in (q, k, v, out, lse))
    assert told[5:17] == (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    assert told[8:11] == (50 * 2 * 64, 64, 2 * 64), "K is a view of [B,S,H,D]"
    assert told[17:] == (2, 4, 2, 70, 50, 1, 0.5)
    usual = PARAMS.unpack(One().params(q, k, v, out, lse, PROBLEM.with_(softmax_scale=None)))
    assert usual[-2:] == (0, 0.125)


def test_a_call_is_one_launch_of_a_block_a_tile_on_torchs_stream(machine):
    q, k, v = make_inputs(PROBLEM)
    machine.shape = loaded(threads=192, shared_bytes=1000)
    out, lse = One().run(q, k, v, PROBLEM)
    (launch,) = machine.launches
    assert launch.grid == (3 * 4 * 2, 1, 1), "70 rows are three tiles of 32"
    assert (launch.block, launch.shared, launch.stream) == ((192, 1, 1), 1000, 7)
    told = PARAMS.unpack(launch.arguments[0])
    assert told[:5] == tuple(t.data_ptr() for t in (q, k, v, out, lse))
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert machine.loads == [("attention_scalar", 64, "float16", False, None, 0, (), "attention_scalar")]
    assert machine.entries == [("attention_scalar", 0)]


def test_what_a_backend_asks_to_compile_and_to_launch_is_what_is(machine):
    Told().run(*make_inputs(PROBLEM), PROBLEM)
    assert machine.loads[0][6:] == ((("KEYS", 50), ("ON", 0)), "another_entry")
    assert machine.entries == [("another_entry", 0)]


@pytest.mark.parametrize(("theirs", "grid", "asked"), [((5, 1, 1), (5, 1, 1), 0), (None, (24, 1, 1), 1)])
def test_a_grid_that_masks_change_is_theirs_and_the_backend_is_asked_for_no_other(machine, theirs, grid, asked):
    class Masking(One):
        asked = 0

        def masked(self, arguments, q, lse, problem, masks, stream):
            return _cuda.Masked(b"masks", blocks=theirs)

        def blocks(self, problem, loaded, device):
            self.asked += 1
            return super().blocks(problem, loaded, device)

    machine.sizes = [PARAMS.size, 5]
    backend, inputs = Masking(), make_inputs(PROBLEM)
    backend._launch(*inputs, *outputs(inputs[0]), PROBLEM.with_(window_left=3))
    [launch] = machine.launches
    assert launch.grid == grid and launch.arguments[1] == b"masks" and backend.asked == asked


def test_planted_parts_reach_the_kernel(machine):
    class Planted(One):
        source = "another source"

        def strides(self, name, tensor):
            return (1, 2, 3) if name == "v" else super().strides(name, tensor)

        def scale(self, problem):
            return 2 * problem.scale

    Planted().run(*make_inputs(PROBLEM), PROBLEM)
    told = PARAMS.unpack(machine.launches[0].arguments[0])
    assert told[11:14] == (1, 2, 3) and told[-1] == 1.0 and machine.loads[0][4] == "another source"


# ------------------------------------------------------------------------------------------------ what is kept


def test_the_same_call_again_is_launched_from_what_is_kept(machine):
    q, k, v = make_inputs(PROBLEM)
    out, lse = outputs(q)
    for _ in range(3):
        One()._launch(q, k, v, out, lse, PROBLEM)
    assert len(machine.loads) == 1 and len(machine.launches) == 3
    assert machine.launches[0] == machine.launches[1] == machine.launches[2]


def test_whatever_a_launch_is_told_makes_it_another_one(machine, monkeypatch):
    q, k, v = make_inputs(PROBLEM)
    out, lse = outputs(q)

    class Other(One):
        pass

    edited = One()
    edited.source = "edited"
    calls = [
        (One(), q, k, v, out, lse, PROBLEM),
        (One(), q.clone(), k, v, out, lse, PROBLEM),
        (One(), q, k, v, *outputs(q), PROBLEM),
        (One(), q, k.transpose(1, 2).contiguous().transpose(1, 2), v, out, lse, PROBLEM),
        (One(), q, k, v, out, lse, PROBLEM.with_(causal=True)),
        (One(), q, k, v, out, lse, PROBLEM.with_(softmax_scale=None)),
        (Other(), q, k, v, out, lse, PROBLEM),
        (edited, q, k, v, out, lse, PROBLEM),
    ]
    for number, (backend, *arguments) in enumerate(calls, start=1):
        backend._launch(*arguments)
        assert len(machine.loads) == number
    machine.stream = 8
    One()._launch(q, k, v, out, lse, PROBLEM)
    assert len(machine.loads) == len(calls) + 1 and machine.launches[-1].stream == 8
    monkeypatch.setattr(_cuda, "source_version", lambda kernel: "edited since")
    One()._launch(q, k, v, out, lse, PROBLEM)
    assert len(machine.loads) == len(calls) + 2, "the file was edited"


def test_rows_at_odd_addresses_are_copied_at_each_call(machine):
    """The copy is gone after the call: a launch that points to it must not be kept."""
    q, k, v = make_inputs(PROBLEM)
    odd = torch.empty(2, 2, 50, 67, dtype=torch.float16)[..., 1:65].copy_(k)
    out, lse = outputs(q)
    for _ in range(2):
        One()._launch(q, odd, v, out, lse, PROBLEM)
    assert len(machine.loads) == 2 and launching._kept == {}
    for launch in machine.launches:
        told = PARAMS.unpack(launch.arguments[0])
        assert told[0] == q.data_ptr() and told[1] != odd.data_ptr() and told[8:11] == (2 * 50 * 64, 50 * 64, 64)


# ------------------------------------------------------------------------------------------------ stages


@pytest.mark.parametrize(("splits", "previous"), [(1, None), (3, (-1, -1, -1, 0))])
def test_a_traced_call_is_given_room_and_is_never_kept(machine, splits, previous):
    q, k, v = make_inputs(PROBLEM)
    machine.sizes, machine.shape = [PARAMS.size, TRACE.size], loaded(num_splits=splits)
    found = [One().trace(q, k, v, PROBLEM) for _ in range(2)]
    assert [wanted[3] for wanted in machine.loads] == [True] * 4 and launching._kept == {}
    for trace, launch in zip(found, machine.launches, strict=True):
        *stages, pages, rows = TRACE.unpack(launch.arguments[1])
        addresses = [
            getattr(trace, s).data_ptr() for s in ("scores", "row_max", "rescale", "probs", "row_sum", "accum")
        ]
        assert stages == addresses and (pages, rows) == (4, 96), "70 rows are rounded up to whole tiles of 32"
        assert trace.page_size == 16 and trace.previous == previous and trace.accum.shape == (2, 4, 4, 70, 64)
        told = PARAMS.unpack(launch.arguments[0])
        assert told[3:5] == (trace.out.data_ptr(), trace.lse.data_ptr())
        assert bool(trace.out.isnan().all()) and bool(trace.lse.isnan().all()), (
            "nothing was launched, so nothing written"
        )


# ------------------------------------------------------------------------------------------------ the machine


def test_what_a_machine_lacks_is_said_in_order_with_what_mends_it(monkeypatch):
    backend, find = One(), importlib.util.find_spec
    state = {"gpu": False, "capability": (8, 0), "cupy": False, "cuda": "13.0"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state["gpu"])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_cuda, "_capability", lambda device: state["capability"])
    monkeypatch.setattr(
        _cuda.importlib.util, "find_spec", lambda name: (state["cupy"] or None) if name == "cupy" else find(name)
    )
    monkeypatch.setattr(torch.version, "cuda", state["cuda"])
    found = backend.availability()
    assert not found.ok and found.reason == "no CUDA GPU is visible to torch" and "H100 or H200" in found.fix
    state["gpu"] = True
    for capability in ((8, 0), (9, 1), (10, 0)):
        state["capability"] = capability
        found = backend.availability()
        assert found.reason == (
            f"the kernels are built for compute capability 9.0 and this GPU has {capability[0]}.{capability[1]}"
        )
    state["capability"] = (9, 0)
    found = backend.availability()
    assert found.reason == "CuPy is not installed" and found.fix == "pip install 'flashcore[gpu-cuda13]'"
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    assert backend.availability().fix == "pip install 'flashcore[gpu]'"
    state["cupy"] = True
    assert backend.availability() is AVAILABLE


def test_head_dims_and_dtypes_that_kernels_are_built_for():
    backend = One()
    for head_dim in (64, 128):
        for dtype in ("float16", "bfloat16"):
            assert backend.why_not(PROBLEM.with_(head_dim=head_dim, dtype=dtype)) is None
    assert backend.why_not(PROBLEM.with_(head_dim=96)) == "head_dim 96 is not among 64, 128"
    assert backend.why_not(PROBLEM.with_(dtype="float32")).startswith("dtype float32")
    assert backend.traceable and math.isclose(backend.scale(PROBLEM), 0.5)
