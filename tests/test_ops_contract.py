"""What a call promises: it means what its arguments say, and nothing that is left out of them is lost in silence."""

from __future__ import annotations

import gc
import weakref
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from flashcore import ops
from flashcore.errors import InvalidProblem
from flashcore.numerics.inputs import make_inputs
from flashcore.ops import attention, problem_of
from flashcore.paged_ops import paged_attention
from flashcore.paging import PagedKV, SinkWindow, TopK, paged_reference, paginate
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=33, seqlen_k=70, head_dim=16, dtype="float32")
ON_GPU = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=64, seqlen_k=192, head_dim=64)
ON_CPU = ("auto", "cpu", "reference", "sdpa-math")
DENSE = ("auto", "hopper", "wmma", "scalar", "sdpa-cudnn", "sdpa-flash", "sdpa-math", "reference", "cublaslt")
PAGED = ("auto", "decode", "decode-paired", "hopper-paged", "cublaslt-paged", "reference")


@pytest.fixture
def qkv():
    return make_inputs(PROBLEM)


@pytest.fixture
def cache():
    k, v = (torch.randn(2, 2, 100, 64).half() for _ in range(2))
    return paginate(k, v, 16)


def on_gpu(causal: bool = False):
    return make_inputs(ON_GPU.with_(causal=causal), device="cuda")


def distance(a, b) -> float:
    return float((a.double() - b.double()).abs().max())


# ---------------------------------------------------------------------------------------------- arguments are values


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_scale_in_a_tensor_is_the_number_that_it_holds_at_the_call(qkv, backend):
    scale = torch.tensor(0.1)
    first = attention(*qkv, softmax_scale=scale, backend=backend)
    scale.fill_(2.0)
    second = attention(*qkv, softmax_scale=scale, backend=backend)
    assert torch.equal(first, attention(*qkv, softmax_scale=float(np.float32(0.1)), backend=backend))
    assert torch.equal(second, attention(*qkv, softmax_scale=2.0, backend=backend))
    assert distance(first, second) > 0.1


def test_a_scale_in_a_tensor_over_pages(cache):
    q = torch.randn(2, 4, 1, 64).half()
    scale = torch.tensor(0.1)
    first = paged_attention(q, cache, softmax_scale=scale)
    scale.fill_(2.0)
    second = paged_attention(q, cache, softmax_scale=scale)
    assert torch.equal(first, paged_attention(q, cache, softmax_scale=float(np.float32(0.1))))
    assert torch.equal(second, paged_reference(q, cache, softmax_scale=torch.tensor(2.0))[0].half())
    assert distance(first, second) > 0.1


@pytest.mark.parametrize("scale", [
    np.float32(0.25), np.float64(0.25), np.float16(0.25), np.array(0.25), torch.tensor(0.25, dtype=torch.bfloat16),
])  # fmt: skip
def test_numbers_of_other_kinds_are_numbers(qkv, scale):
    assert torch.equal(attention(*qkv, softmax_scale=scale), attention(*qkv, softmax_scale=0.25))


def test_a_whole_scale_is_a_number_and_a_numpy_bool_is_a_bool(qkv):
    assert torch.equal(attention(*qkv, softmax_scale=2), attention(*qkv, softmax_scale=2.0))
    assert torch.equal(attention(*qkv, causal=np.bool_(True)), attention(*qkv, causal=True))
    assert not torch.equal(attention(*qkv, causal=True), attention(*qkv, causal=np.bool_(False)))


MASK = torch.ones(33, 70, dtype=torch.bool)


@pytest.mark.parametrize("wrong", [
    {"causal": "no"}, {"causal": MASK}, {"causal": torch.tensor(True)}, {"causal": 0.5}, {"causal": 1},
    {"causal": None}, {"causal": np.ones((3, 3), dtype=bool)}, {"return_lse": "yes"},
    {"return_lse": torch.tensor(True)},
    {"softmax_scale": "0.5"}, {"softmax_scale": True}, {"softmax_scale": 1j}, {"softmax_scale": [0.5]},
    {"softmax_scale": torch.tensor([0.5])}, {"softmax_scale": torch.tensor(True)}, {"softmax_scale": torch.tensor(1j)},
    {"softmax_scale": torch.tensor(0.5, device="meta")}, {"softmax_scale": np.array([0.5])},
    {"softmax_scale": Decimal("0.5")}, {"softmax_scale": torch.tensor(float("nan"))},
    {"softmax_scale": torch.tensor(0.5, requires_grad=True)}, {"backend": ["cpu"]}, {"backend": torch.tensor(1.0)},
], ids=lambda wrong: next(iter(wrong)))  # fmt: skip
def test_anything_else_is_one_sentence(qkv, cache, wrong):
    (name, value), = wrong.items()  # fmt: skip
    calls = [
        lambda: attention(*qkv, **wrong),
        lambda: paged_attention(torch.randn(2, 4, 1, 64).half(), cache, **wrong),
    ]
    if name in ("causal", "softmax_scale"):
        calls.append(lambda: problem_of(*qkv, **wrong))
        calls.append(lambda: paged_reference(torch.randn(2, 4, 1, 64).half(), cache, **wrong))
    for call in calls:
        with pytest.raises(InvalidProblem, match=f"^{name} ") as caught:
            call()
        text = str(caught.value)
        assert "\n" not in text and len(text) < 250 and text.endswith(".")


def test_a_tensor_on_a_device_is_not_read(qkv):
    with pytest.raises(InvalidProblem, match="would wait for the device; pass a Python number"):
        attention(*qkv, softmax_scale=torch.tensor(0.5, device="meta"))


def test_policies_hold_plain_numbers():
    share = torch.tensor(0.5)
    chosen = TopK(share=share, sink_pages=torch.tensor(2))
    share.fill_(1.0)
    assert (type(chosen.share), chosen.share) == (float, 0.5)
    assert (type(chosen.sink_pages), chosen.sink_pages) == (int, 2)
    assert type(TopK(pages=np.int64(3)).pages) is int and type(SinkWindow(np.int32(1)).sink_pages) is int
    for wrong in (lambda: TopK(share="0.5"), lambda: TopK(pages=1.5), lambda: SinkWindow(window_pages=torch.ones(2))):
        with pytest.raises(InvalidProblem, match="of (TopK|SinkWindow)"):
            wrong()


def forgets_its_tensors(device: str, names, problem: Problem) -> None:
    """Call everything, drop all that was handed over or came back, and see what is still there."""

    def call() -> list[weakref.ref]:
        q, k, v = make_inputs(problem, device=device)
        scale, share = torch.tensor(0.2), torch.tensor(0.4)
        watched = [q, k, v, scale, share]
        for name in names:
            for causal in (False, True):
                watched.append(attention(q, k, v, softmax_scale=scale, causal=causal, backend=name))
        pages = paginate(k[..., :64], v[..., :64], 16) if problem.dtype != "float32" else None
        if pages is not None:
            pages.refresh_bounds()
            chosen = TopK(share=share).select(q, pages)
            watched += [pages.k_pool, pages.v_pool, pages.page_table, pages.lengths, chosen.pages]
            watched.append(paged_attention(q, pages, softmax_scale=scale))
        return [weakref.ref(one) for one in watched]

    refs = call()
    gc.collect()
    assert [ref() for ref in refs if ref() is not None] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_call_keeps_a_tensor_alive(dtype):
    forgets_its_tensors("cpu", ON_CPU, ON_GPU.with_(dtype=dtype))


def test_the_calls_that_are_kept_hold_plain_values(qkv):
    ops._calls.clear()
    attention(*qkv, softmax_scale=torch.tensor(0.1), causal=np.bool_(True), return_lse=np.bool_(True))
    (key,) = ops._calls
    assert [type(part) for part in key[-5:]] == [bool, float, str, bool, bool]


def test_a_table_of_kept_calls_that_is_full_begins_anew(monkeypatch):
    monkeypatch.setattr(ops, "KEPT_CALLS", 2)
    calls, found = {}, (ON_CPU, ops.STAND_IN, (1,))
    assert ops.keep(calls, None, found) is found and calls == {}, "what has no key is not kept"
    for key in ("a", "b", "c"):
        assert ops.keep(calls, (key,), found) is found
    assert calls == {("c",): found}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", DENSE)
def test_a_scale_in_a_tensor_on_the_gpu(backend):
    qkv = on_gpu()
    scale = torch.tensor(0.1)
    first = attention(*qkv, softmax_scale=scale, backend=backend)
    scale.fill_(2.0)
    second = attention(*qkv, softmax_scale=scale, backend=backend)
    assert torch.equal(first, attention(*qkv, softmax_scale=float(np.float32(0.1)), backend=backend))
    assert torch.equal(second, attention(*qkv, softmax_scale=2.0, backend=backend))
    with pytest.raises(InvalidProblem, match="would wait for the device"):
        attention(*qkv, softmax_scale=scale.cuda(), backend=backend)
    with pytest.raises(InvalidProblem, match="^causal has to be True or False"):
        attention(*qkv, causal=torch.ones(64, 192, dtype=torch.bool, device="cuda"), backend=backend)


@pytest.mark.gpu
def test_no_call_on_the_gpu_keeps_a_tensor_alive():
    forgets_its_tensors("cuda", DENSE[:-2], ON_GPU.with_(seqlen_k=64))


# --------------------------------------------------------------------------------------- derivatives and mapped axes


def all_ways_to_call(q, k, v, cache, q_paged, names, paged_names):
    """Every call of ours, by name, as a function of its queries."""
    dense = {name: lambda q, name=name: attention(q, k, v, backend=name) for name in names}
    paged = {
        f"paged {name}": lambda q, name=name: paged_attention(q, cache, backend=name) for name in paged_names
    }  # fmt: skip
    return [(name, call, q) for name, call in dense.items()] + [(name, call, q_paged) for name, call in paged.items()]


def refused(device: str, names, paged_names, problem: Problem) -> None:
    """Whatever is asked beyond a forward pass is one sentence, whether the call was made before or not."""
    q, k, v = make_inputs(problem, device=device)
    cache = paginate(*(t[:, :, :64] for t in make_inputs(ON_GPU, device=device)[1:]), 16)
    q_paged = torch.randn(2, 4, 1, 64, device=device).half()
    for name, call, given in all_ways_to_call(q, k, v, cache, q_paged, names, paged_names):
        call(given)  # what is kept of this call lets none of the others through
        with forward_ad.dual_level():
            with pytest.raises(InvalidProblem, match="carries a tangent .* forward pass only; pass the primal"):
                call(forward_ad.make_dual(given, torch.ones_like(given)))
            assert call(given).isfinite().all(), "a tensor without a tangent is welcome meanwhile"
        with pytest.raises(InvalidProblem, match="transformed by torch.func .* call it outside the transform"):
            torch.func.jvp(call, (given,), (torch.ones_like(given),))
        with pytest.raises(InvalidProblem, match="transformed by torch.func"):
            torch.func.grad(lambda t, call=call: call(t).sum())(given)
        if not name.startswith("paged"):
            continue  # what is mapped, and gradients: tests/library/test_dense.py
        with pytest.raises(InvalidProblem, match="mapped by torch.vmap.* put the mapped axis into the batch dimension"):
            torch.vmap(call)(torch.stack([given, given]))
        with pytest.raises(InvalidProblem, match="requires gradients"):
            call(given.detach().requires_grad_())


def test_more_than_a_forward_pass_is_refused():
    refused("cpu", ON_CPU, ("auto", "reference"), PROBLEM)


@pytest.mark.gpu
def test_more_than_a_forward_pass_is_refused_on_the_gpu():
    refused("cuda", DENSE, PAGED, ON_GPU)


def test_a_tangent_hides_nowhere(qkv, cache):
    q, k, v = qkv
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(v, torch.ones_like(v))
        with pytest.raises(InvalidProblem, match="carries a tangent"):
            attention(q, k, dual)
        with pytest.raises(InvalidProblem, match="^softmax_scale carries a tangent"):
            attention(q, k, v, softmax_scale=forward_ad.make_dual(torch.tensor(0.1), torch.tensor(1.0)))
        pool = forward_ad.make_dual(cache.v_pool, torch.ones_like(cache.v_pool))
        pages = PagedKV(cache.k_pool, pool, cache.page_table, cache.lengths)
        with pytest.raises(InvalidProblem, match="q or the cache carries a tangent"):
            paged_attention(torch.randn(2, 4, 1, 64).half(), pages)


@pytest.mark.parametrize("change", [lambda t: t.to_sparse(), lambda t: torch.nested.nested_tensor(list(t))])
def test_tensors_without_strides_are_refused(qkv, change):
    q, k, v = qkv
    with pytest.raises(InvalidProblem, match="^k is a sparse or nested tensor"):
        attention(q, change(k), v)
