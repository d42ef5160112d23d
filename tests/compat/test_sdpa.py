"""torch's attention function with ours behind it: torch's meaning, whoever computes; and a count of who did."""

from __future__ import annotations

import math
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend

import flashcore
from flashcore import backends, ops
from flashcore.compat import sdpa
from flashcore.errors import FlashCoreError, InvalidProblem, UnknownName
from flashcore.numerics import ambient

TORCHS = torch.nn.functional.scaled_dot_product_attention


def exact(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """The definition that torch's documentation gives, in float64; its causal mask begins in the upper left corner."""
    q, k, v = q.double(), k.double(), v.double()
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for t in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ v


def three(*shape_q, keys=None, heads=None, dtype=torch.float32):
    shape_k = list(shape_q)
    if keys is not None:
        shape_k[-2] = keys
    if heads is not None:
        shape_k[-3] = heads
    return torch.randn(shape_q, dtype=dtype), torch.randn(shape_k, dtype=dtype), torch.randn(shape_k, dtype=dtype)


OURS = {
    "plain": (three(2, 4, 9, 8), {}),
    "causal": (three(2, 4, 9, 8), {"is_causal": True}),
    "more keys": (three(2, 4, 5, 8, keys=12), {}),
    "causal, more keys": (three(2, 4, 5, 8, keys=12), {"is_causal": True}),
    "causal, one row": (three(2, 4, 1, 8, keys=12), {"is_causal": True}),
    "scale": (three(2, 4, 9, 8), {"scale": -0.3}),
    "whole scale": (three(2, 4, 9, 8), {"scale": 1}),
    "groups": (three(2, 6, 9, 8, heads=2), {"enable_gqa": True, "is_causal": True}),
    "three dimensions": (three(4, 9, 8, keys=11), {"is_causal": True}),
    "two dimensions": (three(9, 8), {}),
    "five dimensions": (three(2, 3, 4, 9, 8), {"is_causal": True}),
    "half": (three(2, 4, 9, 8, dtype=torch.float16), {"is_causal": True}),
}
MASK = torch.ones(5, 12, dtype=torch.bool).tril(3)
TORCHS_OWN = {
    "there is a mask": [
        (three(2, 4, 5, 8, keys=12), {"attn_mask": MASK}),
        (three(2, 4, 5, 8, keys=12), {"attn_mask": torch.randn(2, 1, 5, 12)}),
        (three(2, 6, 5, 8, keys=12, heads=2), {"attn_mask": MASK, "enable_gqa": True}),
    ],
    "is_causal is aligned top left, and there are more queries": [(three(2, 4, 12, 8, keys=5), {"is_causal": True})],
    "dtype float64 is not ours": [(tuple(t.double() for t in three(2, 4, 9, 8)), {})],
    "the tensors differ in dimensions": [((torch.randn(9, 8), *three(2, 9, 8)[1:]), {})],
    "batch or heads would have to be broadcast": [((torch.randn(1, 4, 9, 8), *three(2, 4, 9, 8)[1:]), {})],
    "keys and values differ in shape": [((*three(2, 4, 9, 8)[:2], torch.randn(2, 4, 9, 16)), {})],
    "a last dimension is not contiguous": [((torch.randn(2, 4, 8, 9).mT, *three(2, 4, 9, 8)[1:]), {})],
}


@pytest.mark.parametrize("name", OURS)
def test_what_ours_computes_means_what_torch_says(name):
    inputs, options = OURS[name]
    assert sdpa.why_torch(*inputs, **options, backend="cpu") is None
    out = flashcore.scaled_dot_product_attention(*inputs, **options, backend="cpu")
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if name == "half" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out.double(), exact(*inputs, **options), **tolerance)
    torch.testing.assert_close(out, TORCHS(*inputs, **options), **tolerance)


@pytest.mark.parametrize(
    ("reason", "inputs", "options"), [(r, *case) for r, cases in TORCHS_OWN.items() for case in cases]
)
def test_what_is_not_ours_goes_to_torch_as_it_came(reason, inputs, options):
    assert sdpa.why_torch(*inputs, **options, backend="cpu").startswith(reason)
    out = flashcore.scaled_dot_product_attention(*inputs, **options, backend="cpu")
    assert torch.equal(out, TORCHS(*inputs, **options))
    torch.testing.assert_close(out.double(), exact(*inputs, **options), rtol=1e-4, atol=1e-5)


def test_dropout_is_torchs():
    inputs = three(2, 4, 9, 8)
    torch.manual_seed(3)
    first = flashcore.scaled_dot_product_attention(*inputs, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(first, TORCHS(*inputs, dropout_p=0.5)) and not torch.equal(first, TORCHS(*inputs))


@pytest.mark.parametrize(("inputs", "options"), [
    (three(2, 4, 9, 8), {"is_causal": "yes"}),
    (three(2, 4, 9, 8), {"scale": "big"}),
    (three(2, 4, 9, 8), {"scale": 10**400}),
    (three(2, 4, 9, 8), {"dropout_p": 2.0}),
    (three(2, 4, 9, 8), {"enable_gqa": 1}),
    (three(2, 4, 9, 8), {"enable_gqa": "yes"}),
    (three(2, 6, 9, 8, heads=4), {"enable_gqa": True}),
    (("q", "k", "v"), {}),
])  # fmt: skip
def test_errors_are_torchs(inputs, options):
    with pytest.raises(Exception) as expected:  # noqa: B017  (whatever torch raises)
        TORCHS(*inputs, **options)
    with pytest.raises(expected.type) as got:
        flashcore.scaled_dot_product_attention(*inputs, **options, backend="cpu")
    assert str(got.value) == str(expected.value), "to the word"


def test_empty_and_nested_tensors_are_torchs():
    q, k, v = three(2, 4, 9, 8)
    assert flashcore.scaled_dot_product_attention(q[:0], k[:0], v[:0], backend="cpu").shape == (0, 4, 9, 8)
    nested = torch.nested.nested_tensor([torch.randn(4, 9, 8), torch.randn(4, 9, 8)])
    assert "dense" in sdpa.why_torch(nested, nested, nested)


def test_a_backend_that_there_is_none_of_is_told_at_once_whoever_would_compute():
    q, k, v = three(2, 4, 9, 8)
    for wrong, error, words in ((3, InvalidProblem, "^backend has to be a string"), ("cpus", UnknownName, "'cpus'")):
        with pytest.raises(error, match=words):
            flashcore.replace_sdpa(backend=wrong)
        with pytest.raises(error, match=words):
            flashcore.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(9, 9), backend=wrong)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1e39])
def test_a_scale_that_no_kernel_of_ours_has_is_torchs(scale):
    inputs = three(2, 4, 9, 8)
    assert sdpa.why_torch(*inputs, scale=scale, backend="cpu") == "scale is not finite in float32"
    out = flashcore.scaled_dot_product_attention(*inputs, scale=scale, backend="cpu")
    torch.testing.assert_close(out, TORCHS(*inputs, scale=scale), equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_tensors_without_numbers_are_torchs(backend):
    """Of meta tensors, by which a model's shapes are found out, torch knows no autocast either."""
    inputs = [t.to("meta") for t in three(2, 4, 9, 8)]
    with flashcore.replace_sdpa(backend=backend) as calls:
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    assert out.shape == (2, 4, 9, 8) and out.is_meta and dict(calls.torchs) == {"the tensors lie on 'meta'": 1}


DERIVATIVES = {
    "grad": lambda f, q: torch.func.grad(lambda x: f(x).square().sum())(q),
    "vjp": lambda f, q: torch.func.vjp(f, q)[1](q)[0],
    "jacrev": lambda f, q: torch.func.jacrev(f)(q),
    "vmap of grad": lambda f, q: torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum()))(q[None]),
    "grad of vmap": lambda f, q: torch.func.grad(lambda x: torch.func.vmap(f)(x).square().sum())(q[None]),
    "compiled grad": lambda f, q: torch.compile(
        lambda x: torch.func.grad(lambda y: f(y).square().sum())(x), backend="eager", fullgraph=True
    )(q),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of its own attention under vmap
@pytest.mark.parametrize("name", DERIVATIVES)
def test_what_torch_func_asks_of_it_is_torchs(name):
    q, k, v = three(1, 2, 3, 4)
    derivative = DERIVATIVES[name]
    expected = derivative(lambda x: TORCHS(x, k, v), q)
    found = derivative(lambda x: flashcore.scaled_dot_product_attention(x, k, v, backend="cpu"), q)
    torch.testing.assert_close(found, expected)
    mapped = torch.func.vmap(lambda x: torch.empty(()) + (sdpa.why_torch(x, k, v, backend="cpu") is None))(q[None])
    assert mapped.all(), "an axis alone is mapped by a rule of ours"


def test_a_tangent_goes_where_torch_has_a_rule_for_it():
    q, k, v = three(1, 2, 3, 4)
    with forward_ad.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        dual = forward_ad.make_dual(q, k)
        assert sdpa.why_torch(v, k, dual, backend="cpu") == "torch.func or forward mode takes a derivative"
        found = flashcore.scaled_dot_product_attention(dual, k, v, backend="cpu")
        assert torch.equal(forward_ad.unpack_dual(found).tangent, forward_ad.unpack_dual(TORCHS(dual, k, v)).tangent)


def test_whoever_allows_torchs_math_alone_gets_it_and_its_second_derivatives():
    """As our own sentence advises, which refuses them."""
    q, k, v = (tensor.requires_grad_() for tensor in three(1, 2, 3, 4))

    def second(call):
        (first,) = torch.autograd.grad(call(q, k, v).square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    with flashcore.replace_sdpa(backend="cpu") as calls:
        with pytest.raises(InvalidProblem, match=r"torch.nn.attention.sdpa_kernel"):
            second(torch.nn.functional.scaled_dot_product_attention)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            found = second(torch.nn.functional.scaled_dot_product_attention)
    assert calls.ours == 1 and dict(calls.torchs) == {"sdpa_kernel allows torch's math alone": 1}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.equal(found, second(TORCHS))


def test_another_thread_that_holds_torch_to_its_math_takes_no_call_from_ours():
    called, over = threading.Event(), threading.Event()

    def calls():
        with ambient.torchs_kernel(SDPBackend.MATH):
            called.set()
            over.wait(0.2)

    q = torch.randn(1, 2, 8, 16)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(calls)
        called.wait(60)
        assert sdpa.why_torch(q, q, q, backend="cpu") is None
        over.set()
        done.result()


def test_gradients_are_torchs():
    inputs, options = OURS["causal, more keys"]
    inputs = [t.clone().requires_grad_() for t in inputs]
    got, expected = (
        torch.autograd.grad(call(*inputs, **options).square().sum(), inputs)
        for call in (lambda *a, **b: flashcore.scaled_dot_product_attention(*a, **b, backend="cpu"), TORCHS)
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_as_it_does_in_torch(dtype):
    inputs = three(2, 4, 9, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = flashcore.scaled_dot_product_attention(*inputs, backend="cpu"), TORCHS(*inputs)
        assert (sdpa.why_torch(*inputs, backend="cpu") is None) == (dtype == torch.bfloat16)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_on_a_cpu_auto_leaves_torch_its_own():
    assert sdpa.why_torch(*three(2, 4, 9, 8)) == "the tensors lie on no GPU"


def test_on_a_gpu_ours_takes_what_auto_would_take_to_a_kernel_of_ours(monkeypatch):
    class Picked:
        role = "ours"

    monkeypatch.setattr(ops, "picked_for", lambda dtype, head_dim, device: Picked)
    assert sdpa._why_not_ours("cuda", 0, torch.float16, 64) is None
    Picked.role = "peer"
    assert sdpa._why_not_ours("cuda", 0, torch.bfloat16, 96) == "no kernel of ours takes head_dim 96 and bfloat16 here"

    def none(*arguments):
        raise FlashCoreError("Nothing works here.")

    monkeypatch.setattr(ops, "picked_for", none)
    assert sdpa._why_not_ours("cuda", 0, torch.float16, 64) == "Nothing works here."
    monkeypatch.undo()
    assert ops.picked_for(torch.float16, 64, torch.device("cpu")) is backends.get("sdpa-math")


# -------------------------------------------------------------------------------------------------------- the context


class Block(torch.nn.Module):
    """A piece of a model that knows torch's function only."""

    def __init__(self):
        super().__init__()
        self.inside, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x, mask=None):
        q, k, v = self.inside(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = TORCHS(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


def test_a_models_calls_are_replaced_and_counted():
    model, x = Block(), torch.randn(2, 7, 32)
    expected = model(x)
    with flashcore.replace_sdpa(backend="cpu") as calls:
        torch.testing.assert_close(model(x), expected)
        model(x, torch.ones(7, 7, dtype=torch.bool))
        torch.nn.functional.scaled_dot_product_attention(*three(2, 9, 8))
    model(x)
    assert calls.ours == 2 and dict(calls.torchs) == {"there is a mask": 1}
    assert str(calls) == "FlashCore computed 2 of 3 calls, and torch 1.\n  torch 1: there is a mask"


def test_tensors_that_are_cut_over_ranks_go_on_to_torch(monkeypatch):
    """A stand-in for a DTensor, which would need several processes."""

    class Cut(torch.Tensor):
        pass

    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", types.SimpleNamespace(DTensor=Cut))
    q, k, v = three(2, 4, 9, 8)
    for inputs in ((q.as_subclass(Cut), k, v), (q, k, v.as_subclass(Cut))):
        with flashcore.replace_sdpa(backend="cpu") as calls:
            out = torch.nn.functional.scaled_dot_product_attention(*inputs)
        assert calls.ours == 0 and dict(calls.torchs) == {"the tensors are DTensors, cut over ranks": 1}
        assert type(out) is Cut and torch.equal(out.as_subclass(torch.Tensor), TORCHS(q, k, v))


def test_what_computes_is_really_another(monkeypatch):
    seen = []
    monkeypatch.setattr(ops, "attention", lambda q, k, v, **options: seen.append(options) or torch.zeros_like(q))
    model, x = Block(), torch.randn(2, 7, 32)
    with flashcore.replace_sdpa(backend="cpu"):
        assert torch.equal(model(x), model.out.bias.expand(2, 7, 32))
    assert seen == [{"causal": True, "softmax_scale": None, "backend": "cpu"}]


def test_training_inside_the_context():
    torch.manual_seed(1)
    model, x = Block(), torch.randn(2, 7, 32)
    model(x).square().sum().backward()
    expected = model.inside.weight.grad.clone()
    model.zero_grad()
    with flashcore.replace_sdpa(backend="cpu") as calls:
        model(x).square().sum().backward()
    assert calls.ours == 1
    torch.testing.assert_close(model.inside.weight.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_is_compiled_again_inside_and_as_before_outside():
    torch._dynamo.reset()
    graphs = []

    def keep(module, example):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module.forward

    model, x = Block(), torch.randn(2, 7, 32)
    compiled = torch.compile(model, fullgraph=True, backend=keep)
    expected = compiled(x)
    with flashcore.replace_sdpa(backend="cpu") as calls:
        for _ in range(2):
            torch.testing.assert_close(compiled(x), expected)
    compiled(x)
    with flashcore.replace_sdpa(backend="cpu"):
        compiled(x)
    assert ["flashcore.attention.default" in graph for graph in graphs[:2]] == [False, True]
    assert calls.ours == 2
    torch._dynamo.reset()


@pytest.mark.slow
def test_it_compiles_with_free_lengths():
    torch._dynamo.reset()
    given = three(2, 4, 9, 16)
    for backend in ("auto", "cpu"):
        compiled = torch.compile(
            lambda q, k, v, backend=backend: flashcore.scaled_dot_product_attention(q, k, v, backend=backend),
            fullgraph=True, dynamic=True, backend="eager",
        )  # fmt: skip
        torch.testing.assert_close(compiled(*given), TORCHS(*given), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_on_the_gpu(causal):
    q, k, v = (t.cuda() for t in three(2, 8, 100, 64, keys=300, heads=2, dtype=torch.float16))
    with flashcore.replace_sdpa() as calls:
        out = TORCHS(q, k, v, is_causal=causal, enable_gqa=True)
    assert calls.ours == 1
    expected = exact(q.cpu(), k.cpu(), v.cpu(), is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=4e-3, atol=4e-3)
