"""From a tensor to a launch: what is kept, what the driver is told, and which tensors a kernel can read."""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
import types

import pytest
import torch
from support import launch_structs
from support.recorded_driver import RecordedDriver, function_at, loaded

from flashcore.errors import LaunchError
from flashcore.gpu import launching
from flashcore.gpu.launching import PreparedLaunch, aligned, facts_of, is_aligned, kept, outputs_for
from flashcore.numerics.outputs import poisoned_outputs


@pytest.fixture
def nothing_kept(monkeypatch):
    """No launch is kept from another test."""
    monkeypatch.setattr(launching, "_kept", {})


@pytest.fixture
def driver(monkeypatch):
    """The driver, recorded; it reads two arguments of 4 and 8 bytes."""
    made = RecordedDriver([4, 8])
    monkeypatch.setattr(launching, "_launch_kernel", lambda: made.call)
    return made


# ------------------------------------------------------------------------------------------------ one launch


def test_the_launch_shape_is_read_as_kernels_export_it():
    letters = launch_structs.declared("attention_scalar", "LaunchShape")
    assert letters == launch_structs.packed(launching.SHAPE) == "iiiiii"
    assert launching.SHAPE.size == launch_structs.size_in_c(letters)


def test_a_prepared_launch_tells_the_driver_the_same_each_time(driver):
    shape = loaded(threads=96, shared_bytes=70_000)
    prepared = PreparedLaunch(function_at(0xF00), shape, (5, 6, 7), [b"abcd", b"12345678"], 0x5EED)
    prepared.launch()
    prepared.launch()
    first, second = driver.launches
    assert first == second and first.arguments == [b"abcd", b"12345678"]
    assert (first.function, first.grid, first.block) == (0xF00, (5, 6, 7), (96, 1, 1))
    assert (first.shared, first.stream, first.attributes) == (70_000, 0x5EED, [])


def test_a_kernel_that_waits_by_itself_may_start_before_the_one_ahead_has_ended(driver):
    PreparedLaunch(function_at(1), loaded(overlaps_launch=1), (1, 1, 1), [b"abcd", b"12345678"], 0).launch()
    (launch,) = driver.launches
    assert launch.attributes == [(launching.PROGRAMMATIC_STREAM_SERIALIZATION, 1)] and launch.stream == 0


def test_a_launch_copies_its_arguments_and_holds_what_they_point_to(driver):
    arguments, memory = [b"abcd", b"12345678"], torch.zeros(3)
    prepared = PreparedLaunch(function_at(1), loaded(), (1, 1, 1), arguments, 0, keeps=memory)
    arguments[0] = b"wxyz"
    prepared.launch()
    assert driver.launches[0].arguments[0] == b"abcd"
    assert any(one is memory for one in vars(prepared).values())
    assert prepared.again and not PreparedLaunch(function_at(1), loaded(), (1, 1, 1), [], 0, again=False).again


def test_what_the_driver_refuses_is_an_error_that_names_its_status(driver):
    pytest.importorskip("cuda.bindings.driver")
    driver.status = 1
    with pytest.raises(LaunchError, match=r"cuLaunchKernelEx gave CUDA_ERROR_INVALID_VALUE.*flashcore doctor"):
        PreparedLaunch(function_at(1), loaded(), (1, 1, 1), [b"abcd", b"12345678"], 0).launch()


# ------------------------------------------------------------------------------------------------ what is kept


def test_a_launch_is_made_once_for_a_key_and_anew_without_one(nothing_kept):
    made = []

    def make():
        made.append(object())
        return made[-1]

    assert kept(("a", 1), make) is kept(("a", 1), make) and len(made) == 1
    assert kept(("a", 2), make) is not made[0] and len(made) == 2
    assert kept(None, make) is not kept(None, make) and len(made) == 4


def test_what_is_not_good_for_another_call_is_not_kept(nothing_kept):
    made = []
    for _ in range(2):
        assert kept("key", lambda: made.append(1) or len(made), lambda number: number > 1) == len(made)
    assert made == [1, 1] and kept("key", lambda: 99) == 2, "the second one was good, and stays"


def test_not_more_launches_are_kept_than_there_is_room_for(nothing_kept, monkeypatch):
    monkeypatch.setattr(launching, "KEPT_LAUNCHES", 3)
    for number in range(10):
        assert kept(number, lambda number=number: number + 1) == number + 1
        assert len(launching._kept) <= 3
    assert kept(9, lambda: "made again") == 10, "the newest is always there"


# ------------------------------------------------------------------------------------------------ which tensors


def halves(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape).half()


@pytest.mark.parametrize(
    ("make", "good"),
    [
        (lambda: halves(2, 3, 4, 64), True),
        (lambda: halves(2, 4, 3, 64).transpose(1, 2), True),
        (lambda: halves(2, 3, 4, 72)[..., :64], True),
        (lambda: halves(2, 3, 4, 68)[..., :64], False),
        (lambda: halves(2, 3, 4, 65)[..., :64], False),
        (lambda: halves(2 * 3 * 4 * 64 + 1)[1:].view(2, 3, 4, 64), False),
        (lambda: halves(2 * 3 * 4 * 64 + 8)[8:].view(2, 3, 4, 64), True),
        (lambda: halves(1, 1, 1, 64).expand(2, 3, 4, 64), True),
        (lambda: halves(64).as_strided((1, 1, 1, 64), (3, 5, 7, 1)), True),
        (lambda: halves(2, 3, 4, 66).float()[..., :64], False),
        (lambda: halves(2, 3, 4, 68).float()[..., :64], True),
    ],
    ids=["plain", "bshd", "rows of 72", "rows of 68", "rows of 65", "starts at 2 bytes", "starts at 16 bytes",
         "expanded", "single rows", "float32 rows of 66", "float32 rows of 68"],
)  # fmt: skip
def test_rows_that_start_at_16_bytes_are_read_where_they_lie_and_others_copied(make, good):
    tensor = make()
    assert is_aligned(tensor) == good
    found = aligned(tensor)
    assert (found is tensor) == good and is_aligned(found) and torch.equal(found, tensor)


def test_the_facts_of_a_tensor_are_all_that_a_launch_takes_from_it():
    tensor = halves(2, 3, 8, 8)
    same = tensor.view(2, 3, 8, 8)
    assert same is not tensor and facts_of(same) == facts_of(tensor) and facts_of(None) is None
    others = [tensor.clone(), tensor.transpose(1, 2), tensor[:1], tensor.view(torch.bfloat16), tensor[..., 1:]]
    assert len({facts_of(tensor), *map(facts_of, others)}) == 1 + len(others)


def test_out_lies_in_memory_as_q_does_and_lse_in_rows():
    q = halves(2, 5, 3, 16).transpose(1, 2)
    out, lse = outputs_for(q)
    assert out.shape == q.shape and out.stride() == q.stride() and out.dtype == torch.float16
    assert lse.shape == (2, 3, 5) and lse.is_contiguous() and lse.dtype == torch.float32
    with poisoned_outputs():
        assert all(bool(one.isnan().all()) for one in outputs_for(q))


def test_a_struct_goes_to_a_kernel_byte_for_byte():
    argument = launching.as_argument(b"\x01\x02\x03\x04\x05\x06\x07")
    assert argument.shape == () and argument.nbytes == 7 and argument.tobytes() == b"\x01\x02\x03\x04\x05\x06\x07"


# ------------------------------------------------------------------------------------------------ CuPy, by a stand-in


class Cupy(types.ModuleType):
    """CuPy as far as a kernel is loaded with it; every cubin exports the shape (1, 2, 3, 4, 5, 6)."""

    def __init__(self):
        super().__init__("cupy")
        self.asked: list[tuple] = []
        self.exported = ctypes.create_string_buffer(launching.SHAPE.pack(1, 2, 3, 4, 5, 6))
        self.cuda = types.SimpleNamespace(Device=self.device, runtime=self, Stream=type("Stream", (), {}))
        self.memcpyDeviceToHost = 2

    @contextlib.contextmanager
    def device(self, number):
        self.asked.append(("device", number))
        yield

    def memcpy(self, target, source, size, kind):
        assert kind == self.memcpyDeviceToHost and size == launching.SHAPE.size
        ctypes.memmove(target, source, size)

    def RawModule(self, path):  # noqa: N802  CuPy's name
        self.asked.append(("module", path))
        return self

    def get_global(self, name):
        self.asked.append(("global", name))
        return types.SimpleNamespace(ptr=ctypes.addressof(self.exported))

    def get_function(self, name):
        self.asked.append(("function", name))
        return types.SimpleNamespace(name=name, max_dynamic_shared_size_bytes=None)


@pytest.fixture
def cupy(monkeypatch):
    made = Cupy()
    monkeypatch.setitem(sys.modules, "cupy", made)
    for cached in (launching._load_kernel, launching.entry_point, launching._stream):
        cached.cache_clear()
    yield made
    for cached in (launching._load_kernel, launching.entry_point, launching._stream):
        cached.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """What the compiler is asked for."""
    asked = []

    def compile_kernel(kernel, **options):
        asked.append((kernel, options))
        return types.SimpleNamespace(path=f"{kernel}.cubin")

    monkeypatch.setattr(launching, "compile_kernel", compile_kernel)
    return asked


def test_a_kernel_is_compiled_loaded_and_asked_for_its_shape_once(cupy, compiled):
    first = launching.load_kernel("attention_scalar", 64, "float16", False, None, 1, (("A", 2),), "its_entry")
    assert first is launching.load_kernel("attention_scalar", 64, "float16", False, None, 1, (("A", 2),), "its_entry")
    assert compiled == [
        ("attention_scalar", {"head_dim": 64, "dtype": "float16", "trace": False, "source": None, "defines": {"A": 2}})
    ]
    assert cupy.asked == [("device", 1), ("module", "attention_scalar.cubin"), ("global", "its_entry_shape")]
    shape = (first.tile_m, first.tile_n, first.threads, first.shared_bytes, first.num_splits, first.overlaps_launch)
    assert shape == (1, 2, 3, 4, 5, 6) and first.module is cupy


def test_every_wish_is_a_kernel_of_its_own_and_so_is_an_edited_file(cupy, compiled, monkeypatch):
    usual = ("attention_scalar", 64, "float16", False, None, 0)
    wishes = [
        usual, ("attention_scalar", 128, *usual[2:]), (*usual[:2], "bfloat16", *usual[3:]), (*usual[:3], True, None, 0),
        (*usual[:4], "a source of its own", 0), (*usual[:5], 1), (*usual, (("A", 1),)), (*usual, (), "another_entry"),
    ]  # fmt: skip
    found = [launching.load_kernel(*wish) for wish in wishes]
    assert len(set(map(id, found))) == len(wishes) == len(compiled)
    assert ("global", "attention_scalar_shape") in cupy.asked, "the entry is called as its kernel unless it is named"
    monkeypatch.setattr(launching, "source_version", lambda kernel: "edited since")
    assert launching.load_kernel(*usual) is not found[0] and len(compiled) == len(wishes) + 1
    assert launching.load_kernel(*wishes[4]) is found[4], "a source put in place of the file's is read from no file"


def test_an_entry_function_is_allowed_the_shared_memory_that_its_shape_asks_for(cupy):
    wide, usual = loaded(shared_bytes=100_000), loaded(shared_bytes=0)
    for one in (wide, usual):
        object.__setattr__(one, "module", cupy)
    function = launching.entry_point(wide, "an_entry", 2)
    assert function.max_dynamic_shared_size_bytes == 100_000 and function.name == "an_entry"
    assert launching.entry_point(wide, "an_entry", 2) is function
    assert launching.entry_point(usual, "an_entry", 2).max_dynamic_shared_size_bytes is None
    assert [one for one in cupy.asked if one[0] == "function"] == [("function", "an_entry")] * 2
    assert ("device", 2) in cupy.asked


@pytest.mark.parametrize("newer", [True, False])
def test_a_launch_goes_to_the_stream_at_an_address_under_either_cupy(cupy, newer):
    entered, launched = [], []

    @contextlib.contextmanager
    def at(pointer):
        entered.append(pointer)
        yield

    def from_external(stream):
        version, pointer = stream.__cuda_stream__()
        assert version == 0
        return Reentrant(at, pointer)

    if newer:
        cupy.cuda.Stream.from_external = staticmethod(from_external)
    else:
        cupy.cuda.ExternalStream = lambda pointer: Reentrant(at, pointer)
    for _ in range(2):
        launching.launch(lambda *told, **more: launched.append((*told, more)), 9, 64, ["a", "b"], stream=77, shared=5)
    assert entered == [77, 77] and launched == [((9, 1, 1), (64, 1, 1), ("a", "b"), {"shared_mem": 5})] * 2


class Reentrant:
    """A stream that can be entered again and again."""

    def __init__(self, make, pointer):
        self.make, self.pointer, self.open = make, pointer, []

    def __enter__(self):
        self.open.append(self.make(self.pointer))
        self.open[-1].__enter__()

    def __exit__(self, *error):
        return self.open.pop().__exit__(*error)


@pytest.mark.parametrize("raw", [True, False])
def test_the_current_stream_is_asked_for_on_the_gpu_that_is_meant(monkeypatch, raw):
    """Some releases of torch have a quick way to ask."""
    asked = []
    quick = (lambda device: asked.append(device) or 5) if raw else None
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", quick, raising=False)
    stream = types.SimpleNamespace(cuda_stream=5)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: asked.append(device) or stream)
    assert launching.current_stream(3) == 5 and asked == [3]


@pytest.mark.gpu
def test_a_stream_of_torchs_is_the_one_that_is_launched_on():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert launching.current_stream(0) == stream.cuda_stream
    assert launching.current_stream(0) == torch.cuda.current_stream().cuda_stream != stream.cuda_stream
    assert launching.multiprocessors(0) == torch.cuda.get_device_properties(0).multi_processor_count > 1


@pytest.mark.parametrize("shape", [(1, 8, 64, 16), (2, 1, 1, 8), (1, 1, 1, 4), (4, 1, 9, 8), (2, 3, 1, 16)])
def test_room_for_results_is_new_at_every_call_and_contiguous_where_it_should_be(shape):
    for q in (torch.randn(shape).half(), torch.randn(*shape[:1], *shape[2:0:-1], shape[3]).half().transpose(1, 2)):
        with torch.inference_mode():
            inside = outputs_for(q)
        first, second = outputs_for(q), outputs_for(q)
        for out, lse in (first, second, inside):
            assert (out.shape, out.stride(), out.dtype) == (q.shape, torch.empty_like(q).stride(), q.dtype)
            assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
            assert lse.stride() == torch.empty(shape[:3]).stride() and lse.untyped_storage().nbytes() == 4 * lse.numel()
        assert not first[1].is_inference() and inside[1].is_inference()
        first[1].fill_(1.0), second[1].fill_(2.0)
        assert (first[1] == 1.0).all(), "they share no memory"
    with poisoned_outputs():
        assert all(tensor.isnan().all() for tensor in outputs_for(q))
