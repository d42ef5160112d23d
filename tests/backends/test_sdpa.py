"""The peers in torch: right where they run, and one sentence for what each does not take."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashcore import backends
from flashcore.backends import sdpa
from flashcore.errors import BackendUnavailable, Unsupported
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs
from flashcore.problem import Problem, square

UNEQUAL = Problem(batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=50, head_dim=24, causal=True)


@pytest.mark.parametrize("problem", [UNEQUAL, UNEQUAL.with_(seqlen_q=20), UNEQUAL.with_(causal=False),
                                     square(2, 2, 33, 16, causal=True)], ids=lambda p: p.label())  # fmt: skip
def test_sdpa_math_is_bottom_right_aligned_and_gives_empty_rows_zero(problem):
    inputs = make_inputs(problem)
    out, lse = backends.get("sdpa-math").run(*inputs, problem)
    assert lse is None
    torch.testing.assert_close(out.double(), reference.attention(*inputs, problem)[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("number", "words"), [(91900, "9.19.0"), (92001, "9.20.1"), (8907, "8.9.7"), (100203, "10.2.3")]
)
def test_cudnns_version_as_people_write_it(monkeypatch, number, words):
    assert sdpa.cudnn_version(number) == words
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert backends.get("sdpa-cudnn").software() == f"cuDNN {words}"


def test_versions_stand_beside_peers_and_not_beside_ours(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert backends.get("sdpa-cudnn").software() is None, "a torch without it"
    assert backends.get("sdpa-flash").software() == backends.get("sdpa-math").software() == f"torch {torch.__version__}"
    assert backends.get("hopper").software() is None


def test_fused_peers_say_what_they_do_not_take():
    for name in ("sdpa-flash", "sdpa-cudnn"):
        backend = backends.get(name)
        assert ("top left" in (backend.why_not(UNEQUAL) or "")) == (name == "sdpa-cudnn")
        assert backend.why_not(UNEQUAL.with_(causal=False)) is None
        assert "dtype float32" in backend.why_not(square(1, 1, 8, 64, dtype="float32"))
        if not torch.cuda.is_available():
            with pytest.raises(BackendUnavailable, match="no CUDA device"):
                backend.require(square(1, 1, 8, 64))
    assert "up to 256" in backends.get("sdpa-flash").why_not(square(1, 1, 8, 512))
    assert "multiple of 8" in backends.get("sdpa-cudnn").why_not(square(1, 1, 8, 20))


@pytest.mark.parametrize(
    "problem",
    [UNEQUAL, UNEQUAL.with_(seqlen_q=20, head_dim=20, softmax_scale=-0.3), square(2, 2, 33, 16, causal=True)],
    ids=lambda p: p.label(),
)
def test_flash_gives_lse_and_aligns_bottom_right_by_the_op_beneath_torchs_function(monkeypatch, problem):
    """A stand-in that does what that op does on a GPU: rows without a key have lse +inf, and nonsense where out is."""
    seen = []

    def flash(q, k, v, dropout, causal, debug, *, scale):
        seen.append((q.shape[3], dropout, debug, scale))
        out, lse = reference.attention(q, k, v, problem.with_(head_dim=q.shape[3], softmax_scale=scale, causal=causal))
        return out.to(q.dtype).nan_to_num(7.0), lse.float().masked_fill(lse == -torch.inf, torch.inf), None, None

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
    inputs = make_inputs(problem)
    out, lse = backends.get("sdpa-flash").run_with_lse(*inputs, problem)
    expected, expected_lse = reference.attention(*inputs, problem)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert seen == [(-(-problem.head_dim // 8) * 8, 0.0, False, abs(problem.scale))]
    if problem.seqlen_q != problem.seqlen_k:
        assert torch.equal(backends.get("sdpa-flash").run(*inputs, problem)[0], out)


@pytest.mark.slow
def test_flash_knows_the_arguments_by_its_own_description_of_what_comes_out(monkeypatch):
    monkeypatch.setattr(sdpa, "readable", lambda tensor: tensor)  # it looks where a tensor lies
    problem = UNEQUAL.with_(seqlen_q=20, head_dim=96)
    with FakeTensorMode():
        q = torch.empty(1, 4, 20, 96, dtype=torch.float16, device="cuda")
        k, v = (torch.empty(1, 2, 50, 96, dtype=torch.float16, device="cuda") for _ in range(2))
        out, lse = backends.get("sdpa-flash").run_with_lse(q, k, v, problem)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:3], torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [UNEQUAL, UNEQUAL.with_(seqlen_q=20, head_dim=96), square(2, 2, 33, 20)], ids=str)
def test_flash_gives_lse_on_the_gpu(problem):
    inputs = make_inputs(problem, device="cuda")
    out, lse = backends.get("sdpa-flash").run_with_lse(*inputs, problem)
    expected, expected_lse = reference.attention(*inputs, problem)
    torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-3)


def test_torch_having_no_kernel_is_unsupported_not_a_crash(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    problem = square(1, 1, 8, 8)
    with pytest.raises(Unsupported, match="no such kernel"):
        backends.get("sdpa-math").run(*make_inputs(problem), problem)


# ------------------------------------------------------------------------------------------------ held to one of them

PINNED = {"sdpa-math": "math", "sdpa-flash": "flash", "sdpa-cudnn": "cudnn"}


@pytest.mark.parametrize("name", PINNED)
def test_each_is_held_to_its_own_implementation_for_the_call_alone(monkeypatch, name):
    def enabled() -> dict[str, bool]:
        settings = torch.backends.cuda
        return {
            "math": settings.math_sdp_enabled(), "flash": settings.flash_sdp_enabled(),
            "cudnn": settings.cudnn_sdp_enabled(), "efficient": settings.mem_efficient_sdp_enabled(),
        }  # fmt: skip

    seen = []

    def attention(q, k, v, **options):
        seen.append(({kind for kind, on in enabled().items() if on}, options))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    before, problem = enabled(), square(1, 2, 16, 64, causal=True, softmax_scale=0.5)
    out, lse = backends.get(name).run(*make_inputs(problem), problem)
    ((only, options),) = seen
    assert only == {PINNED[name]} and enabled() == before and lse is None and out.shape == (1, 2, 16, 64)
    assert options == {"attn_mask": None, "is_causal": True, "scale": 0.5, "enable_gqa": False}


def test_grouped_heads_are_asked_for_where_there_are_any(monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *_, enable_gqa, **__: seen.append(enable_gqa) or q,
    )
    for problem in (UNEQUAL.with_(causal=False), square(1, 2, 16, 8)):
        backends.get("sdpa-math").run(*make_inputs(problem), problem)
    assert seen == [True, False]


def test_an_error_of_another_kind_goes_on_as_it_is(monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fails)
    problem = square(1, 1, 8, 8)
    with pytest.raises(RuntimeError, match="out of memory"):
        backends.get("sdpa-math").run(*make_inputs(problem), problem)


def test_unfused_attention_says_how_much_it_would_store():
    math = backends.get("sdpa-math")
    most = square(2, 16, 8192, 64)
    assert math.why_not(most) is None, "2^31 scores are what it takes at most"
    assert math.why_not(most.with_(seqlen_q=8193)) == (
        "it stores every score, 8 GiB of them in float32 and several times over"
    )
    assert math.why_not(square(16, 16, 16384, 64)).startswith("it stores every score, 256 GiB")
    assert math.why_not(square(1, 1, 8, 8, dtype="float32")) is None and math.availability().ok


@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-cudnn"])
def test_fused_attention_needs_a_gpu_that_is_new_enough(monkeypatch, name):
    backend = backends.get(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in backend.availability().reason and "flashcore doctor" in backend.availability().fix
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, ok in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert backend.availability().ok == ok
        assert ok or backend.availability().fix == "use a GPU of compute capability 8.0 or newer"


def test_threads_that_call_at_once_leave_torch_all_its_kernels(monkeypatch):
    """Torch's own context is no good for it: whoever ends last puts back what the first one had set."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: time.sleep(0.05) or q)
    backend, problem = backends.get("sdpa-math"), square(1, 1, 16, 16)
    q, k, v = make_inputs(problem)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda wait: (time.sleep(wait), backend.run(q, k, v, problem)), (0, 0.02)))
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
