"""Windows, softcaps and sinks over pages, against dense attention in float64 over the same keys."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.paged_tables import LENGTHS, cache_of, queries

import flashcore
from flashcore import backends, paged_ops
from flashcore.errors import InvalidProblem, Unsupported
from flashcore.numerics import reference
from flashcore.numerics.masking import MaskTensors
from flashcore.paging import AllPages, PagedKV, SinkWindow, TopK, gather, paged_reference
from flashcore.problem import Problem

SIZE = 16
SINK = torch.tensor([0.3, -1.0, 2.5, 0.0, -math.inf, 4.0, 1.0, -2.0])
MASKS = {
    "a page": {"window_left": SIZE - 1}, "to a page's edge": {"window_left": 2 * SIZE},
    "its own key": {"window_left": 0}, "less than a page": {"window_left": 5}, "all there is": {"window_left": 4000},
    "both sides": {"window_left": 20, "window_right": 1, "causal": False},
    "to the right": {"window_right": 1, "causal": False},
    "nothing to the right": {"window_right": 0, "causal": False}, "softcap": {"softcap": 1.5},
    "sink": {"sink": SINK}, "sink, not causal": {"sink": SINK, "causal": False},
    "all": {"window_left": 3, "softcap": 0.7, "sink": SINK},
}  # fmt: skip


def dense(q, cache: PagedKV, row: int, *, causal=True, sink=None, **fields):
    """Attention of one sequence's queries over its own keys, one after the other; float64."""
    k, v, present = gather(cache, row)
    assert present.all()
    problem = Problem(
        batch=1, num_heads_q=q.shape[1], num_heads_kv=k.shape[0], seqlen_q=q.shape[2], seqlen_k=k.shape[1],
        head_dim=q.shape[3], causal=causal, sink=sink is not None, **fields,
    )  # fmt: skip
    masks = None if sink is None else MaskTensors(sink=sink)
    return reference.attention(q[row : row + 1], k[None], v[None], problem, masks)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("tokens", "heads"), [(1, 2), (3, 8), (8, 4)])
def test_masks_over_pages_are_masks_of_each_sequence(name, tokens, heads):
    cache = cache_of((1, 5, 16, 17, 64, 100), 2, 64, SIZE, torch.float16, "cpu")
    q, options = queries(cache, heads, tokens), dict(MASKS[name])
    if "sink" in options:
        options["sink"] = SINK[:heads]
    out, lse = flashcore.paged_attention(q, cache, return_lse=True, **options)
    exact, exact_lse = paged_reference(q, cache, **options)
    assert torch.equal(out, exact.half()) and torch.equal(lse, exact_lse.float())
    for row in range(cache.batch):
        expected, expected_lse = dense(q, cache, row, **options)
        torch.testing.assert_close(exact[row], expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(exact_lse[row], expected_lse[0], rtol=1e-12, atol=1e-12)
    narrow, _ = flashcore.paged_attention(q, cache, return_lse=True, causal=options.get("causal", True))
    hides_nothing = name == "all there is" or (tokens == 1 and name.endswith("to the right"))
    assert torch.equal(out, narrow) == hides_nothing


def test_rows_that_see_nothing_give_their_sink_and_dropped_pages_are_passed_over():
    cache = cache_of((0, 2, 70), 2, 64, SIZE, torch.bfloat16, "cpu")
    q = queries(cache, 4, 4)
    sink = SINK[1:5]
    out, lse = flashcore.paged_attention(q, cache, sink=sink, return_lse=True)
    for row, empty in ((0, 4), (1, 2)):
        assert (out[row, :, :empty] == 0).all() and torch.equal(lse[row, :, :empty], sink[:, None].expand(4, empty))
        assert (out[row, :, empty:].abs().amax(-1) > 0).all()
    cache.page_table[2, 3:] = -1  # all that lies within 6 keys of the last tokens
    out, lse = flashcore.paged_attention(q, cache, window_left=6, sink=sink, return_lse=True)
    assert (out[2] == 0).all() and torch.equal(lse[2], sink[:, None].expand(4, 4))
    out, lse = flashcore.paged_attention(q, cache, window_left=30, return_lse=True)
    assert (out[2, :, :].abs().amax(-1) > 0).all(), "keys before the hole are within reach"
    k, v, _ = gather(cache, 2)
    seen = slice(66 - 30, 48)
    scores = q[2, 0, 0].double() @ k[0, seen].double().T / 8
    torch.testing.assert_close(lse[2, 0, 0].double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_what_lies_outside_a_window_may_be_anything():
    cache = cache_of((100,), 1, 64, SIZE, torch.float16, "cpu")
    q = queries(cache, 2, 2)
    before = flashcore.paged_attention(q, cache, window_left=10)
    for pool in (cache.k_pool, cache.v_pool):
        pool[cache.page_table[0, :5].long()] = math.nan  # keys 0 to 79, and the window begins at 88
    assert torch.equal(flashcore.paged_attention(q, cache, window_left=10), before)


@pytest.mark.parametrize("policy", [SinkWindow(1, 2), TopK(pages=3), AllPages()])
def test_of_selected_pages_a_query_sees_what_lies_in_its_window(policy):
    cache = cache_of((200, 90, 17), 2, 64, SIZE, torch.float16, "cpu")
    cache.k_pool.nan_to_num_(), cache.v_pool.nan_to_num_()
    cache.refresh_bounds()
    q = queries(cache, 4, 2)
    chosen = policy.select(q, cache)
    options = {"window_left": 40, "softcap": 3.0, "sink": SINK[:4]}
    got, got_lse = flashcore.paged_attention(q, cache, policy=policy, return_lse=True, **options)
    for row, length in enumerate(cache.lengths.tolist()):
        k, v, _ = gather(cache, row)
        for head, token in itertools.product(range(4), range(2)):
            position, of = length - 2 + token, head // 2
            pages = chosen.pages[row, of, : chosen.counts[row, of]].tolist()
            keys = [key for key in range(length) if key // SIZE in pages and position - 40 <= key <= position]
            scores = 3 * torch.tanh(k[of, keys].double() @ q[row, head, token].double() / 8 / 3)
            weights = torch.cat([scores, SINK[head : head + 1].double()]).softmax(0)[:-1]
            torch.testing.assert_close(
                got[row, head, token].double(), weights @ v[of, keys].double(), rtol=1e-3, atol=1e-3
            )
            lse = torch.cat([scores, SINK[head : head + 1].double()]).logsumexp(0)
            torch.testing.assert_close(got_lse[row, head, token].double(), lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_left": -2}, "window_left is -2; it has to be at least 0, or -1 for no limit."),
        ({"window_left": 1.5}, "window_left is 1.5; it has to be a whole number."),
        ({"window_right": 3}, "window_right is 3, and causal=True hides all keys after a query"),
        ({"softcap": 0.0}, "softcap is 0.0; it has to be above 0 and finite in float32, or None for no cap."),
        ({"softcap": "x"}, "softcap must be a number, or None; got 'x'."),
        ({"sink": torch.zeros(3)}, r"sink is a torch.float32 tensor \[3\] on cpu; it has to be a float tensor \[4\]"),
        ({"sink": torch.zeros(4, dtype=torch.int32)}, "it has to be a float tensor"),
        ({"sink": [0.0] * 4}, r"sink is \[0.0, 0.0, 0.0, 0.0\]; it has to be a float tensor"),
        ({"sink": torch.full((4,), math.nan)}, r"sink\[0\] is nan; a sink is a finite number, or -inf for none."),
        ({"sink": torch.zeros(4, requires_grad=True)}, "sink requires gradients, and FlashCore computes the forward"),
    ],
)
def test_bad_input_is_one_sentence(options, words):
    cache = cache_of(LENGTHS, 2, 64, 64, torch.float16, "cpu")
    q = queries(cache, 4, 1)
    with pytest.raises(InvalidProblem, match=f"^{words}" if words[0] != "i" else words):
        flashcore.paged_attention(q, cache, **options)
    if "requires" not in words and "nan" not in words:
        with pytest.raises(InvalidProblem, match=words):
            paged_reference(q, cache, **options)


def test_a_backend_that_takes_no_masks_says_so(monkeypatch):
    cache = cache_of(LENGTHS, 2, 64, 64, torch.float16, "cpu")
    q = queries(cache, 4, 1)
    monkeypatch.setattr(type(backends.get("reference")), "paged_masks", ("window",))
    paged_ops._choose.cache_clear()
    with pytest.raises(Unsupported, match="it does not take a softcap or a sink over pages"):
        flashcore.paged_attention(q, cache, backend="reference", window_left=3, softcap=2.0, sink=SINK[:4])
    with pytest.raises(Unsupported, match="no backend on 'cpu' takes .*softcap=2.0 in pages"):
        flashcore.paged_attention(q, cache, softcap=2.0)
    paged_ops._choose.cache_clear()


def test_a_sink_of_any_float_dtype_is_taken_as_float32():
    cache = cache_of((70, 3), 2, 64, SIZE, torch.float16, "cpu")
    q, wide = queries(cache, 4, 1), torch.tensor([0.5, 9.0, -1.0, 9.0, 2.0, 9.0, 0.25, 9.0])
    expected = flashcore.paged_attention(q, cache, sink=wide[::2].clone())
    for sink in (wide[::2], wide[::2].bfloat16(), wide[::2].double()):
        assert torch.equal(flashcore.paged_attention(q, cache, sink=sink), expected)


def test_who_reads_pages_under_a_mask(monkeypatch):
    given = ("cpu", 0, torch.float16, 64, 16)
    assert not paged_ops.kernel_takes(*given) and paged_ops.kernel_takes(*given, ("window", "sink"), "reference")
    assert not paged_ops.kernel_takes(*given, ("window",), "no-such")
    assert not paged_ops.kernel_takes("cpu", 0, torch.int8, 64, 16)
    monkeypatch.setattr(paged_ops, "_choose", lambda problem, *others: backends.get("decode"))
    assert paged_ops.kernel_takes("cuda", 0, torch.float16, 64, 16, ("window", "softcap", "sink"))
    cache = cache_of((70, 3), 2, 64, SIZE, torch.float16, "cpu")
    asked = []
    monkeypatch.setattr(paged_ops, "_choose", lambda problem, *others: asked.append(problem))
    paged_ops.picked_for(queries(cache, 4, 1), cache, window_left=5, softcap=2.0, sink=True)
    assert asked[0].masks == ("window", "softcap", "sink") and asked[0].window == (5, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["decode", "decode-paired", "hopper-paged"])
def test_a_captured_call_replays_with_the_lengths_and_sinks_of_the_day(backend):
    cache = cache_of((101, 301, 901), 2, 128, 64, torch.float16, "cuda")
    q = queries(cache, 8, 1)
    sink = torch.zeros(8, device="cuda")
    options = {"window_left": 130, "softcap": 5.0, "sink": sink}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        flashcore.paged_attention(q, cache, backend=backend, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = flashcore.paged_attention(q, cache, backend=backend, return_lse=True, **options)
            again = flashcore.paged_attention(q, cache, backend=backend, **options)
    for step, lengths in enumerate(((100, 300, 900), (101, 301, 901), (7, 299, 650), (64, 131, 132), (99, 1, 0))):
        cache.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        sink.copy_(SINK.roll(step))
        graph.replay()
        expected, expected_lse = paged_reference(q, cache, **options)
        assert float((out.double() - expected).abs().max()) < 4e-3 and torch.equal(out, again)
        seen = expected_lse > -math.inf
        assert torch.equal(lse.isinf(), ~seen) and float((lse.double() - expected_lse)[seen].abs().max()) < 2e-3
