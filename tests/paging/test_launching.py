"""Whether a kernel over pages can be launched: the GPU, the tools beside it, and tensors that it can read."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from flashcore.errors import ToolMissing
from flashcore.paging import _launching
from flashcore.paging._launching import copies_whole, loaded, runs_ours, table_fits

GPU = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch):
    """A machine that reports all that the kernels need; what a test takes away from it is asked for anew."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_launching, "nvrtc_version", lambda: "12.8")
    monkeypatch.setattr(_launching, "header_dirs", lambda: ("include",))
    _launching._runs_ours.cache_clear()
    yield monkeypatch
    _launching._runs_ours.cache_clear()


def test_a_hopper_gpu_with_its_tools_runs_them(hopper):
    assert runs_ours(GPU)
    assert not runs_ours(torch.device("cpu"))
    assert not runs_ours(torch.device("cuda", 1)), "a GPU that is not the current one"


def no_compiler():
    raise ToolMissing("NVRTC", "install it")


@pytest.mark.parametrize(("owner", "name", "instead"), [
    (torch.cuda, "get_device_capability", lambda index: (8, 0)),
    (torch.cuda, "get_device_capability", lambda index: (10, 0)),
    (importlib.util, "find_spec", lambda name: None),
    (_launching, "nvrtc_version", no_compiler),
    (_launching, "header_dirs", tuple),
])  # fmt: skip
def test_a_machine_that_lacks_something_does_not(hopper, owner, name, instead):
    hopper.setattr(owner, name, instead)
    assert not runs_ours(GPU)


def test_a_kernel_is_loaded_once_and_never_while_a_graph_is_captured(monkeypatch):
    asked, capturing = [], [True]
    monkeypatch.setattr(_launching, "_loaded", {})
    monkeypatch.setattr(_launching, "load_kernel", lambda *key: asked.append(key) or object())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    wanted = ("page_selection", 64, torch.bfloat16, 0, None)
    assert loaded(*wanted) is None and asked == []
    capturing[0] = False
    first = loaded(*wanted)
    assert asked == [("page_selection", 64, "bfloat16", False, None, 0, (), None)]
    capturing[0] = True
    assert loaded(*wanted) is first, "one that is there can be captured"
    capturing[0] = False
    assert loaded(*wanted, entry="page_window") is not first and asked[1][-1] == "page_window"
    assert loaded(*wanted) is first and len(asked) == 2
    monkeypatch.setattr(_launching, "version", lambda kernel, source: "edited")
    assert loaded(*wanted) is not first and asked[2] == asked[0], "another text of the kernel's file"


def test_rows_that_lie_together_at_multiples_of_16_bytes_are_copied_whole():
    keys = torch.zeros(2, 3, 4, 64, dtype=torch.float16)
    assert copies_whole(keys) and copies_whole(keys.transpose(1, 2)) and copies_whole(keys[..., :8])
    assert not copies_whole(keys[..., ::2]), "entries apart"
    assert not copies_whole(keys[..., 4:]), "begins in the middle of 16 bytes"
    assert not copies_whole(torch.zeros(3, 68, dtype=torch.float16)[:, :64]), "the second row does"


@pytest.mark.parametrize(("change", "fits"), [
    (lambda table, lengths: (table, lengths), True),
    (lambda table, lengths: (table[:, :2], lengths), True),
    (lambda table, lengths: (table[:, ::3][:, :1], lengths), True),
    (lambda table, lengths: (table[:1], lengths[::2][:1]), True),
    (lambda table, lengths: (table[:, ::2], lengths), False),
    (lambda table, lengths: (table, lengths.repeat_interleave(2)[::2]), False),
    (lambda table, lengths: (table.long(), lengths), False),
    (lambda table, lengths: (table, lengths.long()), False),
    (lambda table, lengths: (table, lengths[:1]), False),
    (lambda table, lengths: (table[0], lengths), False),
    (lambda table, lengths: (table[:, :0], lengths), False),
    (lambda table, lengths: (table[:0], lengths[:0]), False),
])  # fmt: skip
def test_tables_that_a_kernel_can_read(change, fits):
    table, lengths = torch.zeros(2, 6, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    assert table_fits(*change(table, lengths)) is fits
