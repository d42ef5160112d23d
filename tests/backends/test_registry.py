"""The registry, and the backends that run on a CPU."""

import sys
import types

import pytest
import torch

from flashcore import backends
from flashcore.backends import _registry
from flashcore.errors import BackendUnavailable, FlashCoreError, UnknownName, Unsupported
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.reference import STAGES
from flashcore.ops import problem_of
from flashcore.problem import Problem, square

OURS = {"reference", "cpu", "sdpa-math", "sdpa-flash", "sdpa-cudnn", "fa3"}
UNEQUAL = Problem(batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=50, head_dim=24, causal=True)


def test_the_registry_knows_every_backend_and_says_what_each_is():
    found = {b.id: b for b in backends.all_backends()}
    assert found.keys() >= OURS
    for backend in found.values():
        assert backend.title and backend.role in ("reference", "ours", "peer")
        assert backend.device in ("cpu", "cuda", "any")
        state = backend.availability()
        assert state.ok or (state.reason and state.fix), f"{backend.id} has to say what is missing and how to mend it"


def test_select_and_unknown_ids():
    assert [b.id for b in backends.select("cpu, reference")] == ["cpu", "reference"]
    on_cpu = {b.id for b in backends.select("all", device="cpu")}
    assert on_cpu >= {"reference", "cpu", "sdpa-math"} and not on_cpu & {"sdpa-flash", "sdpa-cudnn", "fa3"}
    with pytest.raises(UnknownName, match="no backend 'cpuu'"):
        backends.get("cpuu")


def test_two_backends_of_one_id_are_refused():
    class Other(backends.Backend):
        id = "cpu"

        def run(self, q, k, v, problem):
            return q, None

    with pytest.raises(FlashCoreError, match="Two backends are called 'cpu'"):
        backends.register(Other)


def test_a_plugin_folder_adds_a_backend(tmp_path, monkeypatch):
    (tmp_path / "mean.py").write_text(
        "from flashcore.backends import Backend, register\n"
        "@register\n"
        "class Mean(Backend):\n"
        "    id, title, role, device = 'toy-mean', 'the mean of V', 'ours', 'cpu'\n"
        "    def run(self, q, k, v, problem):\n"
        "        return v.mean(2, keepdim=True).expand_as(q), None\n"
    )
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    try:
        assert backends.get("toy-mean").title == "the mean of V"
    finally:
        _registry._REGISTRY.pop("toy-mean", None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("page_size", [1, 7, 64, 4096])
def test_the_cpu_page_loop_agrees_with_the_reference(dtype, page_size):
    problem = UNEQUAL.with_(dtype=dtype, page_size=page_size)
    inputs = make_inputs(problem, layout="bshd")
    out, lse = backends.get("cpu").run(*inputs, problem)
    expected, expected_lse = reference.attention(*inputs, problem)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5}[dtype]
    assert out.dtype == getattr(torch, dtype) and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_the_cpu_trace_is_what_it_computed():
    problem = UNEQUAL.with_(page_size=16)
    inputs = make_inputs(problem)
    backend = backends.get("cpu")
    trace, (out, lse) = backend.trace(*inputs, problem), backend.run(*inputs, problem)
    assert torch.equal(trace.out, out) and torch.equal(trace.lse, lse)
    expected = reference.trace(*inputs, problem)
    for stage in STAGES:
        assert getattr(trace, stage).shape == getattr(expected, stage).shape
        torch.testing.assert_close(getattr(trace, stage).double(), getattr(expected, stage), rtol=2e-3, atol=2e-3)


def test_the_reference_rounds_its_results_and_not_its_trace():
    problem = square(1, 1, 20, 8)
    inputs = make_inputs(problem)
    backend = backends.get("reference")
    out, lse = backend.run(*inputs, problem)
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    assert backend.trace(*inputs, problem).out.dtype == torch.float64


@pytest.mark.parametrize("problem", [UNEQUAL, UNEQUAL.with_(seqlen_q=20), UNEQUAL.with_(causal=False),
                                     square(2, 2, 33, 16, causal=True)], ids=lambda p: p.label())  # fmt: skip
def test_sdpa_math_is_bottom_right_aligned_and_gives_empty_rows_zero(problem):
    inputs = make_inputs(problem)
    out, lse = backends.get("sdpa-math").run(*inputs, problem)
    assert lse is None
    torch.testing.assert_close(out.double(), reference.attention(*inputs, problem)[0], rtol=2e-3, atol=2e-3)


def test_fused_peers_say_what_they_do_not_take():
    for name in ("sdpa-flash", "sdpa-cudnn"):
        backend = backends.get(name)
        assert "top left" in backend.why_not(UNEQUAL)
        assert backend.why_not(UNEQUAL.with_(causal=False)) is None
        assert "dtype float32" in backend.why_not(square(1, 1, 8, 64, dtype="float32"))
        if not torch.cuda.is_available():
            with pytest.raises(BackendUnavailable, match="no CUDA device"):
                backend.require(square(1, 1, 8, 64))
    assert "up to 256" in backends.get("sdpa-flash").why_not(square(1, 1, 8, 512))
    assert "multiple of 8" in backends.get("sdpa-cudnn").why_not(square(1, 1, 8, 20))


def test_torch_having_no_kernel_is_unsupported_not_a_crash(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    problem = square(1, 1, 8, 8)
    with pytest.raises(Unsupported, match="no such kernel"):
        backends.get("sdpa-math").run(*make_inputs(problem), problem)


def test_fa3_without_its_module_says_so():
    backend = backends.get("fa3")
    try:
        import flash_attn_interface  # noqa: F401
    except ImportError:
        assert not backend.availability().ok and "flash_attn_interface" in backend.availability().reason


@pytest.mark.parametrize("newer", [True, False])
def test_fa3_calls_both_forms_of_its_interface(monkeypatch, newer):
    """A stand-in for FlashAttention-3 that takes [B, S, H, D], as it does, and returns `lse` as each release does."""
    from flashcore.backends import fa3

    def compute(q, k, v, softmax_scale, causal):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        problem = problem_of(q, k, v, causal, softmax_scale)
        out, lse = backends.get("cpu").run(q, k, v, problem)
        return out.transpose(1, 2), lse

    def newer_form(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
        out, lse = compute(q, k, v, softmax_scale, causal)
        return (out, lse) if return_attn_probs else out

    def older_form(q, k, v, softmax_scale=None, causal=False):
        return compute(q, k, v, softmax_scale, causal)

    module = types.SimpleNamespace(flash_attn_func=newer_form if newer else older_form)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    fa3._interface.cache_clear()
    problem = UNEQUAL.with_(seqlen_q=20)
    inputs = make_inputs(problem)
    out, lse = backends.get("fa3").run(*inputs, problem)
    fa3._interface.cache_clear()
    expected, expected_lse = backends.get("cpu").run(*inputs, problem)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
