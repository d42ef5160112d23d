"""attention(): right results, one typed sentence for each kind of bad input, and little overhead."""

import math
import sys
import time
import types

import pytest
import torch

from flashcore import backends, ops
from flashcore.errors import BackendUnavailable, FlashCoreError, InvalidProblem, UnknownName, Unsupported
from flashcore.numerics.inputs import make_inputs
from flashcore.ops import attention, problem_of
from flashcore.problem import Problem, square

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=33, seqlen_k=70, head_dim=16, dtype="float32")
HAS_GPU = torch.cuda.is_available()


@pytest.fixture
def qkv():
    return make_inputs(PROBLEM)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference", "sdpa-math"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_results(qkv, backend, causal, scale):
    q, k, v = qkv
    mask = torch.ones(33, 70, dtype=torch.bool).tril(70 - 33) if causal else None
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    out = attention(q, k, v, causal=causal, softmax_scale=scale, backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_lse_and_views(qkv):
    q, k, v = qkv
    out, lse = attention(q, k, v, return_lse=True)
    scores = (q @ k.repeat_interleave(2, dim=1).transpose(-1, -2)) / 4
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert lse.dtype == torch.float32 and out.shape == q.shape
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv]
    torch.testing.assert_close(attention(*views, return_lse=True)[0], out, rtol=1e-5, atol=1e-6)


def test_auto_picks_by_device_and_wish(qkv):
    problem = problem_of(*qkv)
    assert problem == PROBLEM
    cpu = torch.device("cpu")
    assert ops.choose(problem, cpu, "auto", False).id == "sdpa-math"
    assert ops.choose(problem, cpu, "auto", True).id == "cpu"


@pytest.mark.parametrize(("change", "error", "words"), [
    (lambda q, k, v: ([1.0], k, v), InvalidProblem, "have to be torch tensors.*builtins.list"),
    (lambda q, k, v: (q.numpy(), k.numpy(), v.numpy()), InvalidProblem, "have to be torch tensors.*numpy.ndarray"),
    (lambda q, k, v: (q.to("meta"), k, v), InvalidProblem, "meta, cpu and cpu; move them to one device"),
    (lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")), InvalidProblem, "takes CPU and CUDA tensors"),
    (lambda q, k, v: (q.half(), k, v), InvalidProblem, "convert them to one"),
    (lambda q, k, v: (q.double(), k.double(), v.double()), InvalidProblem, "torch.float64 is not supported.*float16"),
    (lambda q, k, v: (q.long(), k.long(), v.long()), InvalidProblem, "torch.int64 is not supported"),
    (lambda q, k, v: (q[0], k, v), InvalidProblem, r"q has 3 dimensions \(4, 33, 16\)"),
    (lambda q, k, v: (q[:1], k, v), InvalidProblem, "q has batch 1, and k and v have 2"),
    (lambda q, k, v: (q[..., :8], k, v), InvalidProblem, "q has head_dim 8"),
    (lambda q, k, v: (q, k, v[:, :, :69]), InvalidProblem, "differ in shape"),
    (lambda q, k, v: (q[:, :3], k, v), InvalidProblem, r"num_heads_q \(3\) must be a multiple"),
    (lambda q, k, v: (q[:, :, :0], k, v), InvalidProblem, r"q is empty, shape \(2, 4, 0, 16\)"),
    (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), InvalidProblem, "k is empty"),
    (lambda q, k, v: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v), InvalidProblem, r"pass k\.contiguous\(\)"),
])  # fmt: skip
def test_bad_tensors(qkv, change, error, words):
    with pytest.raises(error, match=words) as caught:
        attention(*change(*qkv))
    assert isinstance(caught.value, FlashCoreError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"softmax_scale": math.nan}, InvalidProblem, "must be finite"),
    ({"softmax_scale": -math.inf}, InvalidProblem, "must be finite"),
    ({"softmax_scale": "big"}, InvalidProblem, "must be a number, or None; got 'big'"),
    ({"backend": "fastest"}, UnknownName, "no backend 'fastest'; choose one of: .*cpu"),
    ({"backend": "sdpa-math", "return_lse": True}, Unsupported, "does not return lse"),
])  # fmt: skip
def test_bad_options(qkv, options, error, words):
    with pytest.raises(error, match=words):
        attention(*qkv, **options)


@pytest.mark.skipif(HAS_GPU, reason="says what happens without a GPU")
def test_a_cuda_backend_on_cpu_tensors(qkv):
    with pytest.raises(InvalidProblem, match=r"takes cuda tensors, and these lie on 'cpu'; move them with .to"):
        attention(*qkv, backend="sdpa-flash")
    with pytest.raises(BackendUnavailable):
        backends.get("sdpa-flash").require()


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference", "sdpa-math"])
def test_out_lies_as_q_does_whatever_computed_it(backend):
    bshd = torch.randn(2, 33, 4, 16).transpose(1, 2)
    gaps = torch.randn(2, 4, 33, 48)[..., 16:32]
    odd = torch.randn(4, 2, 33, 16).transpose(0, 1)
    for q in (bshd, bshd.contiguous(), gaps, odd, torch.randn(1, 1, 4, 16).expand(2, 4, 4, 16)):
        for _ in range(2):
            out = attention(q, bshd, bshd, backend=backend)
            assert out.stride() == torch.empty_like(q).stride()
        torch.testing.assert_close(out, attention(q.contiguous(), bshd, bshd, backend="cpu"), rtol=1e-4, atol=1e-5)


def test_auto_takes_other_head_dims_to_the_fastest_peer_that_is_installed(monkeypatch):
    def first(installed: set[str], **fields) -> str:
        for name in ops.AUTO_ORDER["cuda"]:
            there = backends.AVAILABLE if name in installed else backends.Availability(False, "not here", "nothing")
            monkeypatch.setattr(type(backends.get(name)), "availability", lambda self, there=there: there)
        ops.choose.cache_clear()
        asked = {"lse": False, **fields}
        lse = asked.pop("lse")
        return ops.choose(square(2, 4, 512, 96).with_(**asked), torch.device("cuda:0"), "auto", lse).id

    try:
        torchs = {"hopper", "sdpa-cudnn", "sdpa-flash", "sdpa-math", "wmma", "scalar", "reference"}
        assert first(torchs, head_dim=64) == "hopper" == first(torchs | {"fa3"}, head_dim=128, dtype="bfloat16")
        assert first(torchs) == "sdpa-cudnn" == first(torchs | {"fa3"})
        assert first(torchs | {"fa3"}, dtype="bfloat16") == "fa3"
        assert first(torchs, lse=True) == "sdpa-flash" == first(torchs, causal=True, seqlen_k=600)
        assert first(torchs, head_dim=320, lse=True) == "reference" and first(torchs, head_dim=20) == "sdpa-flash"
    finally:
        ops.choose.cache_clear()


def test_no_grad_lets_parameters_through(qkv):
    q, k, v = qkv
    with torch.no_grad():
        assert attention(q.requires_grad_(), k, v).shape == q.shape


def test_a_dimension_of_one_element_may_have_any_stride():
    q = torch.randn(1, 1, 4, 1).transpose(2, 3).contiguous().transpose(2, 3)
    assert attention(q, q, q).shape == q.shape


def test_cupy_arrays_in_and_out(monkeypatch):
    """A stand-in with CuPy's module name and DLPack, which is all that is asked of an array."""

    class Array:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    Array.__module__ = "cupy"
    taken = []

    def from_dlpack(tensor):
        taken.append(tensor.data_ptr())
        return Array(tensor)

    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(from_dlpack=from_dlpack))
    q, k, v = make_inputs(square(1, 2, 16, 8, dtype="float32"))
    out, lse = attention(Array(q), Array(k), Array(v), return_lse=True)
    assert isinstance(out, Array) and isinstance(lse, Array) and len(taken) == 2
    torch.testing.assert_close(out.tensor, attention(q, k, v))
    assert isinstance(attention(Array(q), Array(k), Array(v)), Array)
    lengths = torch.tensor([9], dtype=torch.int32)
    masks = {"window_left": 3, "causal": True, "return_lse": True}
    out, lse = attention(Array(q), Array(k), Array(v), seqlens_k=Array(lengths), **masks)
    for got, expected in zip((out, lse), attention(q, k, v, seqlens_k=lengths, **masks), strict=True):
        assert isinstance(got, Array) and torch.equal(got.tensor, expected)
    for options in ({}, {"softcap": 2.0}):
        with pytest.raises(InvalidProblem, match="CuPy arrays all three"):
            attention(Array(q), k, v, **options)


def test_checking_a_call_takes_microseconds(qkv):
    """Everything that attention() adds to its backend, on tensors seen before."""
    q, k, v = qkv

    def once():
        problem = problem_of(q, k, v, True, 0.125)
        return ops.choose(problem, q.device, "auto", True)

    once()
    fastest = math.inf
    for _ in range(20):
        start = time.thread_time()  # of the CPU, so that a busy machine makes no difference
        for _ in range(200):
            once()
        fastest = min(fastest, (time.thread_time() - start) / 200)
    assert fastest < 60e-6, f"{fastest * 1e6:.1f} µs a call"


@pytest.mark.gpu
def test_auto_on_the_gpu():
    problem = Problem(batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=100, seqlen_k=300, head_dim=64, causal=True)
    q, k, v = make_inputs(problem, device="cuda")
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    expected, expected_lse = attention(q.cpu(), k.cpu(), v.cpu(), causal=True, return_lse=True, backend="reference")
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-4, atol=1e-3)
    same = square(2, 4, 256, 64)
    assert ops.choose(same, q.device, "auto", False).id in ("hopper", "sdpa-cudnn")
    with pytest.raises(InvalidProblem, match="takes cpu tensors, and these lie on 'cuda:0'"):
        attention(q, k, v, backend="cpu")
