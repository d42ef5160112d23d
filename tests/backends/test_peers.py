"""A peer is called with what it can take: tensors that start at 16 bytes, and so do their rows; a scale above 0."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from flashcore import backends
from flashcore.backends import fa3, fa4, flashinfer
from flashcore.backends._peers import installed, on_hopper, readable, version_of, with_scale_above_zero
from flashcore.measure.check import check_attention
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs
from flashcore.ops import attention
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=96, seqlen_k=96, head_dim=64, causal=True)
FUSED = ("sdpa-flash", "sdpa-cudnn", "fa3", "fa4", "flashinfer")
OURS = ("hopper", "hopper-unsplit", "wmma", "scalar", "cublaslt", "cublaslt-graph", "cublaslt-loop", "decode",
        "hopper-paged", "cublaslt-paged")  # fmt: skip


def starts_odd(tensor):
    """The same numbers, one element past a multiple of 16 bytes."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor)


def rows_of(width):
    """The same numbers in rows that lie so many elements apart."""

    def change(tensor):
        room = torch.empty(*tensor.shape[:-1], width, dtype=tensor.dtype, device=tensor.device)
        return room[..., : tensor.shape[-1]].copy_(tensor)

    return change


def heads_apart(tensor):
    """Heads that lie an odd number of elements apart, and rows that lie together."""
    batch, heads, rows, columns = tensor.shape
    room = torch.empty(batch * heads * (rows * columns + 3), dtype=tensor.dtype, device=tensor.device)
    strides = (heads * (rows * columns + 3), rows * columns + 3, columns, 1)
    return room.as_strided(tensor.shape, strides).copy_(tensor)


LAYOUTS = {
    "odd start": starts_odd,
    "rows of 67": rows_of(67),
    "rows of 68": rows_of(68),
    "rows of 72": rows_of(72),
    "heads apart": heads_apart,
    "bshd": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "plain": lambda t: t,
}
SCALES = (None, -0.125, -2.0, 0.0)


def kernel_that_reads_16_bytes(q, k, v, scale, is_causal):
    """What such a kernel does, as far as it matters here: it refuses what the real ones get wrong without a word."""
    for tensor in (q, k, v):
        assert tensor.data_ptr() % 16 == 0 and tensor.stride(3) == 1
        assert all(step > 0 and step * tensor.element_size() % 16 == 0 for step in tensor.stride()[:3])
    # The maximum of the products is taken before the scale, and the probabilities are kept in 16 bits.
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float() for t in (k, v))
    products = q.float() @ k.mT
    if is_causal:
        products = products.masked_fill(~torch.ones(products.shape[2:], dtype=torch.bool).tril(), -math.inf)
    probs = ((products - products.amax(-1, keepdim=True)) * scale).exp().half().float()
    return ((probs @ v) / probs.sum(-1, keepdim=True)).to(q.dtype)


@pytest.fixture
def peers(monkeypatch):
    """The peers, whose kernels are the one above; those too that nobody has installed."""

    def sdpa(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
        assert attn_mask is None
        return kernel_that_reads_16_bytes(q, k, v, scale, is_causal)

    def flash(q, k, v, softmax_scale, causal):
        """In the order that FlashAttention has its tensors: rows before heads."""
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        return kernel_that_reads_16_bytes(*heads_first, softmax_scale, causal).transpose(1, 2)

    def prefill(q, k, v, causal, sm_scale, kv_layout, return_lse):
        """One sequence, rows before heads."""
        assert kv_layout == "NHD" and not return_lse
        return flash(q[None], k[None], v[None], sm_scale, causal)[0]

    def forget():
        for module in (fa3, fa4):
            module._interface.cache_clear()
        fa3._left_out.cache_clear()
        flashinfer._prefill.cache_clear()

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    fake = types.SimpleNamespace(flash_attn_func=flash, single_prefill_with_kv_cache=prefill, __spec__=None)
    for name in ("flash_attn_interface", "flash_attn", "flash_attn.cute", "flashinfer"):
        monkeypatch.setitem(sys.modules, name, fake)
    forget()
    yield {name: backends.get(name) for name in FUSED}
    forget()


def takes(name, problem):
    """The problem, with one sequence where the peer takes no more."""
    return problem.with_(batch=1) if name == "flashinfer" else problem


def right(out, q, k, v, problem, room=4e-3) -> bool:
    expected, _ = reference.attention(q, k, v, problem)
    return bool(((out.double() - expected).abs() <= room + 2e-3 * expected.abs()).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUSED)
def test_a_peer_gets_tensors_that_it_can_read(peers, name, layout):
    problem = takes(name, PROBLEM)
    q, k, v = (LAYOUTS[layout](t) for t in make_inputs(problem))
    assert peers[name].why_not(problem) is None
    out, _ = peers[name].run(q, k, v, problem)
    assert right(out, q, k, v, problem)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", FUSED)
def test_a_peer_gets_a_scale_that_it_can_take(peers, name, scale):
    problem = takes(name, PROBLEM.with_(softmax_scale=scale))
    q, k, v = make_inputs(problem)
    out, _ = peers[name].run(q, k, v, problem)
    assert right(out, q, k, v, problem)


def test_what_can_be_read_is_not_copied():
    q, k, v = make_inputs(PROBLEM)
    for tensor in (q, LAYOUTS["bshd"](k), LAYOUTS["rows of 72"](v)):
        assert readable(tensor) is tensor
    narrow = torch.randn(1, 2, 5, 60).half()
    assert readable(narrow) is narrow, "a copy would be no better"
    for name in ("odd start", "rows of 67", "heads apart"):
        tensor = LAYOUTS[name](q)
        assert readable(tensor) is not tensor and torch.equal(readable(tensor), tensor)
    one_head = torch.randn(2, 1, 8, 64).half().expand(2, 4, 8, 64)
    assert readable(one_head).is_contiguous() and torch.equal(readable(one_head), one_head)
    single = torch.randn(1, 1, 1, 64).half().as_strided((1, 1, 1, 64), (3, 5, 7, 1))
    assert readable(single).stride() == (64, 64, 64, 1), "strides of single elements are told to the kernel too"


def test_a_scale_is_turned_exactly():
    q = torch.randn(2, 3).half()
    assert with_scale_above_zero(q, 0.3)[0] is q
    turned, scale = with_scale_above_zero(q, -0.3)
    assert scale == 0.3 and torch.equal(turned, -q)
    zeros, scale = with_scale_above_zero(q, 0.0)
    assert scale > 0 and not zeros.any()


def test_a_package_is_found_by_any_of_its_names_and_a_broken_one_is_none(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_package_xyz").mkdir()
    (tmp_path / "broken_package_xyz" / "__init__.py").write_text("raise OSError('a library is missing')")
    (tmp_path / "second_name_xyz.py").write_text("raise AssertionError('it was loaded')")
    assert installed(("broken_package_xyz.inner", "nothing_xyz")) is None
    assert installed(("nothing_xyz", "second_name_xyz")) == "second_name_xyz", "it is found, and not loaded"
    monkeypatch.setitem(sys.modules, "first_name_xyz", types.SimpleNamespace(__spec__=None))
    assert installed(("first_name_xyz", "second_name_xyz")) == "first_name_xyz"


def test_a_version_is_that_of_the_first_distribution_there_is():
    assert version_of(("no-such-distribution-xyz", "torch")) == torch.__version__
    assert version_of(("no-such-distribution-xyz",)) is None


@pytest.mark.parametrize(("capability", "ok"), [(None, False), ((8, 0), False), ((9, 0), True), ((10, 0), False)])
def test_what_runs_on_hopper_alone_says_so(monkeypatch, capability, ok):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    state = on_hopper("A kernel", lambda: ok or pytest.fail("it was loaded without need"))
    assert state.ok == ok and (ok or (state.reason, state.fix) == (
        "A kernel needs a Hopper GPU", "run on an H100 or H200"
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("libcudart.so.13: no such file\nmore"), "(ImportError: libcudart.so.13: no such file)"),
        (OSError(), "(OSError)"), (RuntimeError(""), "(RuntimeError)"),
    ],
)  # fmt: skip
def test_what_is_installed_and_does_not_load_is_not_available(monkeypatch, error, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def load():
        raise error

    state = on_hopper("A kernel", load)
    assert not state.ok and state.reason == f"A kernel is installed and cannot be imported {said}"
    assert f"torch {torch.__version__}" in state.fix


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["auto", "sdpa-math", "sdpa-flash", "sdpa-cudnn", *OURS])
def test_odd_tensors_on_the_gpu(name, head_dim, layout):
    rows = 8 if name == "decode" else 96
    problem = PROBLEM.with_(head_dim=head_dim, seqlen_q=rows, causal=rows == 96)
    change = rows_of(head_dim + 3) if layout == "rows of 67" else LAYOUTS[layout]
    change = rows_of(head_dim + 4) if layout == "rows of 68" else rows_of(head_dim + 8) if "72" in layout else change
    q, k, v = (change(t) for t in make_inputs(problem, device="cuda"))
    out = attention(q, k, v, causal=problem.causal) if name == "auto" else backends.get(name).run(q, k, v, problem)[0]
    assert right(out, q, k, v, problem)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [-0.125, -2.0, 0.0, 3.0])
@pytest.mark.parametrize("name", ["sdpa-math", "sdpa-flash", "sdpa-cudnn", *OURS])
def test_scales_of_every_sign_on_the_gpu(name, scale):
    problem = PROBLEM.with_(softmax_scale=scale, seqlen_q=8 if name == "decode" else 96, page_size=64)
    trial = check_attention(name, problem)
    if trial.status == "unsupported":
        assert backends.get(name).role == "peer"
    else:
        assert trial.status == "ok", trial.reason


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(7, 0), (7, -1), (-1, 3), (40, 2), (0, 0)])
@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_windows_on_the_gpu(name, window):
    """FlashAttention aligns its window as we do, bottom right; with more queries than keys rows see none."""
    left, right_side = window
    for rows, keys in ((300, 300), (200, 333), (333, 200)):
        problem = PROBLEM.with_(
            seqlen_q=rows, seqlen_k=keys, causal=right_side == 0, window_left=left, window_right=right_side,
            dtype="bfloat16", head_dim=64,
        )  # fmt: skip
        trial = check_attention(name, problem)
        assert trial.status in ("ok", "unavailable", "unsupported"), trial.reason


@pytest.mark.gpu
@pytest.mark.parametrize("masks", [{"softcap": 30.0}, {"sink": True}, {"lengths": "ragged"},
                                   {"sink": True, "window_left": 40}])  # fmt: skip
@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_other_masks_on_the_gpu(name, masks):
    for head_dim in (64, 128):
        problem = PROBLEM.with_(seqlen_q=300, seqlen_k=300, dtype="bfloat16", head_dim=head_dim, **masks)
        trial = check_attention(name, problem, lengths="uniform")
        assert trial.status in ("ok", "unavailable", "unsupported"), trial.reason
