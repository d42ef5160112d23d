"""batch_invariant=True: a row has the bits that it has alone, or the call is refused; who asks for it, and how."""

from __future__ import annotations

import math
import random

import pytest
import torch

import flashcore
from flashcore import backends, ops, paged_ops, varlen_ops
from flashcore.compat import flash_attn, sdpa
from flashcore.errors import InvalidProblem, Unsupported
from flashcore.numerics.inputs import make_inputs
from flashcore.paging import PagedKV, SinkWindow, paginate
from flashcore.problem import Problem, square

VARIABLE = "FLASHCORE_BATCH_INVARIANT"
ASKED = {"batch_invariant": True, "return_lse": True}
ON_CPU = torch.device("cpu")


@pytest.fixture
def qkv():
    return make_inputs(Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=5, seqlen_k=70, head_dim=16))


@pytest.fixture(autouse=True)
def _nobody_asks(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


# ------------------------------------------------------------------------------------------- the promise, at random


class Sequences:
    """Sequences of random lengths with the masks of one call, and what each row gives when it is alone in its call."""

    def __init__(self, draw: random.Random, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
        heads_kv, group, dim = draw.choice([1, 2]), draw.choice([1, 3]), draw.choice([8, 24, 64])
        batch = draw.randint(1, 9)
        self.rows = [draw.choice([1, 1, draw.randint(0, 20), draw.randint(1, 90)]) for _ in range(batch)]
        self.keys = [rows + draw.choice([0, draw.randint(0, 150)]) for rows in self.rows]

        def tensors(heads, lengths):
            return [torch.randn(length, heads, dim, generator=generator).to(dtype) for length in lengths]

        self.q = tensors(heads_kv * group, self.rows)
        self.k, self.v = tensors(heads_kv, self.keys), tensors(heads_kv, self.keys)
        window = draw.choice([-1, -1, 0, 5, 70, 1000])
        self.masks = {"causal": True, "window_left": window, "softcap": draw.choice([None, None, 3.0])}
        self.masks["softmax_scale"] = draw.choice([None, None, -0.3, 1.5])
        if draw.random() < 0.3:
            self.masks["sink"] = torch.randn(heads_kv * group, generator=generator)
        self.draw, self.dtype = draw, dtype

    def call(self, which: int, first: int, end: int):
        """Queries `first` to `end` of a sequence, with the keys up to the last one's: `out` ``[rows, H, D]``, `lse`."""
        keys = self.keys[which] - self.rows[which] + end
        q, k, v = self.q[which][first:end], self.k[which][:keys], self.v[which][:keys]
        given = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out, lse = flashcore.attention(*given, **self.masks, **ASKED)
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)

    def whole(self, which: int):
        return self.call(which, 0, self.rows[which])

    def in_chunks(self, which: int):
        """The same in calls of a part of the queries each, as a chunked prefill and a decode make them."""
        cuts = sorted({0, self.rows[which], *(self.draw.randint(0, self.rows[which]) for _ in range(3))})
        return self.joined(self.call(which, first, end) for first, end in zip(cuts, cuts[1:], strict=False))

    @staticmethod
    def joined(parts):
        return tuple(torch.cat(both) for both in zip(*parts, strict=True))

    def ragged(self):
        """All in one ragged batch, whose longest lengths may be given longer than they are."""
        starts = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (self.rows, self.keys)]
        longest = [max(lengths) + self.draw.choice([0, 40]) for lengths in (self.rows, self.keys)]
        out, lse = flashcore.varlen_attention(
            *(torch.cat(each) for each in (self.q, self.k, self.v)), *starts, *longest, **self.masks, **ASKED
        )
        return list(zip(out.split(self.rows), lse.transpose(0, 1).split(self.rows), strict=True))

    def padded(self, side: str):
        """All in one padded batch, with NaN in the padding."""
        more = self.draw.choice([0, 30])

        def laid(tensors, lengths):
            room = torch.full((len(lengths), max(lengths) + more, *tensors[0].shape[1:]), math.nan, dtype=self.dtype)
            for row, tensor, length in zip(room, tensors, lengths, strict=True):
                row[:length] = tensor
                if side == "left":
                    row.copy_(row.roll(len(row) - length, 0))
            return room.transpose(1, 2)

        lengths = [torch.tensor(each, dtype=torch.int32) for each in (self.rows, self.keys)]
        out, lse = flashcore.attention(
            laid(self.q, self.rows), laid(self.k, self.keys), laid(self.v, self.keys), seqlens_q=lengths[0],
            seqlens_k=lengths[1], padding=side, **self.masks, **ASKED,
        )  # fmt: skip
        real = [slice(rows) if side == "right" else slice(out.shape[2] - rows, None) for rows in self.rows]
        return [(out[b, :, part].transpose(0, 1), lse[b, :, part].transpose(0, 1)) for b, part in enumerate(real)]

    def in_pages(self, size: int):
        """All in one cache whose pages lie anywhere, with NaN in slots that no token has, and a dead sequence."""
        pages = [-(-keys // size) for keys in self.keys]
        heads, dim = self.k[0].shape[1:]
        k_pool, v_pool = torch.full((2, sum(pages) + 3, heads, size, dim), math.nan, dtype=self.dtype)
        table = torch.full((len(pages) + 1, max(pages) + self.draw.choice([0, 2])), -1, dtype=torch.int32)
        free = self.draw.sample(range(len(k_pool)), sum(pages))
        for row, (keys, k, v) in enumerate(zip(self.keys, self.k, self.v, strict=True)):
            for column, start in enumerate(range(0, keys, size)):
                page, end = free.pop(), min(keys - start, size)
                table[row, column] = page
                k_pool[page, :, :end] = k[start : start + end].transpose(0, 1)
                v_pool[page, :, :end] = v[start : start + end].transpose(0, 1)
        lengths = torch.tensor([*self.keys, 0], dtype=torch.int32)
        cache = PagedKV.from_tables(k_pool, v_pool, table, lengths)
        rows = max(self.rows)
        q = torch.randn(len(pages) + 1, rows, *self.q[0].shape[1:]).to(self.dtype)
        for room, tensor in zip(q, self.q, strict=False):
            room[rows - len(tensor) :] = tensor
        out, lse = flashcore.paged_attention(q.transpose(1, 2), cache, **self.masks, **ASKED)
        real = [slice(rows - own, None) for own in self.rows]
        return [(out[b, :, part].transpose(0, 1), lse[b, :, part].transpose(0, 1)) for b, part in enumerate(real)]


def same(found, expected) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def check(sequences: Sequences) -> None:
    """Every way to compute the sequences gives the bits of each one alone."""
    whole = [sequences.whole(b) if rows else None for b, rows in enumerate(sequences.rows)]
    ways = [sequences.ragged(), sequences.padded("right"), sequences.padded("left")] if any(whole) else []
    if any(whole) and sequences.dtype != torch.float32:
        ways += [sequences.in_pages(size) for size in (16, 128)]
    for b, expected in enumerate(whole):
        if expected is not None:
            assert all(same(way[b], expected) for way in ways)
            assert same(sequences.in_chunks(b), expected)
            last = sequences.rows[b]
            assert same(sequences.call(b, last - 1, last), [each[-1:] for each in expected]), "the row, decoded"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_row_has_the_bits_that_it_has_alone(dtype):
    for seed in range(5):
        check(Sequences(random.Random(f"{dtype} {seed}"), dtype))


@pytest.mark.slow
def test_more_threads_give_the_same_bits():
    """Of calls large enough that torch gives a part of them to each thread."""
    sequences = Sequences(random.Random(1), torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    sequences.rows = sequences.keys = [150, 130]
    sequences.q, sequences.k, sequences.v = (
        [torch.randn(rows, heads, 8, generator=generator).bfloat16() for rows in sequences.rows] for heads in (4, 2, 2)
    )
    sequences.masks = {"causal": True}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found += [each for way in (sequences.ragged(), sequences.padded("left")) for pair in way for each in pair]
        check(sequences)
    finally:
        torch.set_num_threads(before)
    assert same(found[: len(found) // 2], found[len(found) // 2 :])


def test_a_dense_batch_is_its_sequences_and_all_keys_are_seen_without_a_causal_mask(qkv):
    q, k, v = qkv
    out, lse = flashcore.attention(*qkv, **ASKED)
    for b in range(2):
        for i in range(5):
            one = flashcore.attention(q[b : b + 1, :, i : i + 1], k[b : b + 1], v[b : b + 1], **ASKED)
            assert same(one, (out[b : b + 1, :, i : i + 1], lse[b : b + 1, :, i : i + 1]))


def test_rows_without_a_key_are_the_same_where_nobody_has_one(monkeypatch):
    """All keys are gone from a ragged batch: the same kernel runs as in a batch where others have some."""
    monkeypatch.setattr(varlen_ops, "_calls", {})
    sink, starts = torch.tensor([0.3, -1.7]), torch.tensor([0, 3], dtype=torch.int32)
    q, none = torch.randn(3, 2, 16), torch.zeros(0, 1, 16)
    found = flashcore.varlen_attention(q, none, none, starts, starts * 0, 3, 0, sink=sink, **ASKED)
    assert [chosen.id for _, chosen, _ in varlen_ops._calls.values()] == ["cpu"]
    both = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([0, 0, 4], dtype=torch.int32)
    keys = torch.randn(4, 1, 16)
    out, lse = flashcore.varlen_attention(torch.cat([q, q[:2]]), keys, keys, *both, 3, 4, sink=sink, **ASKED)
    assert same(found, (out[:3], lse[:, :3])) and bool((found[0] == 0).all())
    with pytest.raises(InvalidProblem, match="cu_seqlens_q ends with 3, and q has 4 rows"):
        flashcore.varlen_attention(torch.cat([q, q[:1]]), none, none, starts, starts * 0, 3, 0, **ASKED)
    nothing = flashcore.varlen_attention(q[:0], none, none, starts * 0, starts * 0, 0, 0, **ASKED)
    assert nothing[0].shape == (0, 2, 16) and nothing[1].shape == (2, 0)


# ------------------------------------------------------------------------------------------------- who computes it


def test_auto_takes_who_promises_it_and_a_call_keeps_apart_from_one_that_does_not_ask(qkv, monkeypatch):
    monkeypatch.setattr(ops, "_calls", {})
    plain, asked = flashcore.attention(*qkv), flashcore.attention(*qkv, batch_invariant=True)
    assert [(known[0].batch_invariant, known[1].id) for known in ops._calls.values()] == [
        (False, "sdpa-math"), (True, "cpu"),
    ]  # fmt: skip
    torch.testing.assert_close(asked, plain, rtol=2e-3, atol=2e-3)
    for call in (ops._calls, varlen_ops._calls):
        call.clear()
    masked = {"seqlens_k": torch.tensor([70, 3], dtype=torch.int32)}
    flashcore.attention(*qkv, **masked), flashcore.attention(*qkv, **masked, batch_invariant=True)
    assert [known[0].batch_invariant for known in ops._calls.values()] == [False, True]
    flat = [tensor[0].transpose(0, 1) for tensor in qkv]
    bounds = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 70], dtype=torch.int32), 5, 70
    for more in ({}, {"batch_invariant": True}):
        flashcore.varlen_attention(*flat, *bounds, **more)
    assert [known[0].batch_invariant for known in varlen_ops._calls.values()] == [False, True]


def test_a_window_stays_one_however_many_keys_there_are():
    base = square(1, 2, 8, 64)
    assert ops.masked_problem(base, 100, 90, None, False, "").masks == ()
    kept = ops.masked_problem(base.with_(batch_invariant=True), 100, 90, None, False, "")
    assert (kept.window_left, kept.window_right, kept.causal) == (100, 90, False)
    assert ops.masked_problem(base.with_(batch_invariant=True), -1, 0, None, False, "").causal


def test_who_does_not_promise_it_refuses_and_names_who_does(qkv):
    refused = (
        r"^Backend 'sdpa-math' cannot run this problem: it does not promise bits that are the same in every batch "
    )
    with pytest.raises(Unsupported, match=refused + r"\(batch_invariant\), and 'cpu' does\.$"):
        flashcore.attention(*qkv, backend="sdpa-math", batch_invariant=True)
    for name in ("reference", "sdpa-math"):
        with pytest.raises(Unsupported, match="and 'cpu' does"):
            flashcore.attention(*qkv, backend=name, causal=True, window_left=3, batch_invariant=True)
    assert flashcore.attention(*qkv, backend="cpu", batch_invariant=True).shape == qkv[0].shape


def test_where_nobody_promises_it_the_sentence_says_so_and_nothing_stands_in(qkv, monkeypatch):
    ops.choose.cache_clear()
    monkeypatch.setattr(type(backends.get("cpu")), "masks", ())
    said = (
        r"^Backend 'auto' .* no backend on 'cpu' promises bits that are the same in every batch for .*batch_invariant "
    )
    with pytest.raises(Unsupported, match=said + r"\(cpu: it does not take a softcap\)\.$"):
        flashcore.attention(*qkv, softcap=2.0, batch_invariant=True)
    monkeypatch.setattr(type(backends.get("cpu")), "batch_invariant", False)
    with pytest.raises(Unsupported, match=r"batch_invariant\.$"):
        flashcore.attention(*qkv, batch_invariant=True)
    monkeypatch.undo()
    ops.choose.cache_clear()


def test_over_pages_too(qkv):
    q, k, v = qkv
    cache = paginate(k, v, 16)
    with pytest.raises(Unsupported, match="'reference' .* does not promise bits .*, and 'cpu' does"):
        flashcore.paged_attention(q, cache, backend="reference", batch_invariant=True)
    with pytest.raises(Unsupported, match="'cpu' .* it reads no page table, but for bits that are the same in every"):
        flashcore.paged_attention(q, cache, backend="cpu")
    with pytest.raises(Unsupported, match=r"no backend on 'cpu' promises .* \(cpu: it attends to all pages"):
        flashcore.paged_attention(q, cache, policy=SinkWindow(1, 2), batch_invariant=True)
    with pytest.raises(InvalidProblem, match="^batch_invariant has to be True or False; got 1"):
        flashcore.paged_attention(q, cache, batch_invariant=1)


@pytest.mark.parametrize("masked", [{}, {"sink": torch.zeros(4)}])
def test_a_backend_over_pages_that_promises_it_is_taken_and_told(qkv, masked, monkeypatch):
    given = []

    class Reads(type(backends.get("reference"))):
        id, batch_invariant = "reads-pages", True

        def run_paged(self, q, cache, problem, selection=None, masks=None):
            given.append(problem.batch_invariant)
            return super().run_paged(q, cache, problem, selection, masks)

    paged_ops._choose.cache_clear()
    monkeypatch.setitem(backends._registry._REGISTRY, "reads-pages", Reads())
    monkeypatch.setitem(paged_ops.AUTO_ORDER, "cpu", ("reference", "reads-pages", "cpu"))
    q, k, v = qkv
    cache = paginate(k, v, 16)
    flashcore.paged_attention(q, cache, batch_invariant=True, **masked)
    flashcore.paged_attention(q, cache, **masked)
    assert given == [True], "the other call went to the first in order"
    paged_ops._choose.cache_clear()


# --------------------------------------------------------------------------------------------------- how it is asked


@pytest.mark.parametrize("value", [1, 0, "yes", torch.tensor(True)])
def test_what_is_no_bool_is_refused(qkv, value):
    flat = [tensor[0].transpose(0, 1) for tensor in qkv]
    starts = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 70], dtype=torch.int32), 5, 70
    for call in (
        lambda: flashcore.attention(*qkv, batch_invariant=value),
        lambda: flashcore.attention(*qkv, softcap=1.0, batch_invariant=value),
        lambda: flashcore.varlen_attention(*flat, *starts, batch_invariant=value),
    ):
        with pytest.raises(InvalidProblem, match="^batch_invariant has to be True or False; got"):
            call()


def test_the_variable_asks_for_each_call_that_does_not_say_and_may_change(qkv, monkeypatch):
    flat = [tensor[0].transpose(0, 1) for tensor in qkv]
    bounds = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 70], dtype=torch.int32), 5, 70
    asked = []
    monkeypatch.setattr(ops, "choose", lambda problem, *more: asked.append(problem.batch_invariant) or ops.STAND_IN)
    monkeypatch.setattr(ops, "KEPT_CALLS", 0)  # so that each call is looked at

    def calls(**more):
        asked.clear()
        flashcore.attention(*qkv, **more)
        flashcore.attention(*qkv, window_left=3, **more)
        flashcore.varlen_attention(*flat, *bounds, **more)
        return set(asked) if len(asked) == 3 else asked

    for text, expected in ((None, False), ("1", True), ("0", False), ("1", True)):
        monkeypatch.delenv(VARIABLE, raising=False) if text is None else monkeypatch.setenv(VARIABLE, text)
        ops._calls.clear(), varlen_ops._calls.clear()
        assert calls() == {expected}
        ops._calls.clear(), varlen_ops._calls.clear()
        assert calls(batch_invariant=False) == {False}, "a call that says is not asked twice"
    assert paged_ops.picked_for(qkv[0], paginate(*qkv[1:], 16)).id == "cpu"
    for text in ("", "yes", "2"):
        monkeypatch.setenv(VARIABLE, text)
        for call in (lambda: flashcore.attention(*qkv), lambda: flashcore.attention(*qkv, softcap=1.0),
                     lambda: flashcore.varlen_attention(*flat, *bounds),
                     lambda: flashcore.paged_attention(qkv[0], paginate(*qkv[1:], 16))):  # fmt: skip
            with pytest.raises(InvalidProblem, match=f"^{VARIABLE} is '{text}'; set it to 1 or 0, or leave it out"):
                call()
        assert flashcore.attention(*qkv, batch_invariant=False).shape == qkv[0].shape


def test_gradients_mapped_axes_and_fake_tensors_keep_it(qkv):
    q, k, v = (tensor.float() for tensor in qkv)
    expected = flashcore.attention(q, k, v, causal=True, **ASKED)
    needs = q.clone().requires_grad_()
    for more in ({}, {"window_left": 1000}):
        with_gradients = flashcore.attention(needs, k, v, causal=True, **more, **ASKED)
        assert same(with_gradients, expected)
        with_gradients[0].sum().backward()
        each = torch.vmap(lambda *one, more=more: flashcore.attention(*one, causal=True, **more, **ASKED))(
            *(t[:, None] for t in (q, k, v))
        )
        assert same([one[:, 0] for one in each], expected)
    only_out = flashcore.attention(needs, k, v, causal=True, batch_invariant=True)
    assert torch.equal(only_out, expected[0]) and torch.autograd.grad(only_out.sum(), needs)[0].isfinite().all()


@pytest.mark.slow
def test_a_compiled_call_keeps_it_whole_and_holds_what_the_variable_said(qkv, monkeypatch):
    starts = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 70], dtype=torch.int32)

    def calls(q, k, v, **more):
        flat = [tensor[0].transpose(0, 1) for tensor in (q, k, v)]
        return (
            flashcore.attention(q, k, v, **more), flashcore.attention(q, k, v, causal=True, window_left=4, **more),
            flashcore.varlen_attention(*flat, *starts, 5, 70, **more),
        )  # fmt: skip

    expected, plain = calls(*qkv, batch_invariant=True), calls(*qkv)
    torch._dynamo.reset()
    asked = torch.compile(lambda *given: calls(*given, batch_invariant=True), fullgraph=True, backend="eager")
    assert same(asked(*qkv), expected)
    monkeypatch.setenv(VARIABLE, "1")
    compiled = torch.compile(calls, fullgraph=True, backend="eager")
    assert same(compiled(*qkv), expected)
    monkeypatch.setenv(VARIABLE, "0")
    assert same(compiled(*qkv), expected), "a graph holds what was asked for when it was made"
    assert not same(calls(*qkv), expected) and same(calls(*qkv), plain)
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------- interfaces of others


def test_what_is_asked_about_no_call_in_particular_heeds_the_variable(monkeypatch):
    assert ops.picked_for(torch.float16, 64, ON_CPU).id == "sdpa-math"
    assert not ops.kernel_takes("cpu", 0, torch.float16, 64, ())
    monkeypatch.setenv(VARIABLE, "1")
    assert ops.picked_for(torch.float16, 64, ON_CPU).id == "cpu" and ops.kernel_takes("cpu", 0, torch.float16, 64, ())
    assert paged_ops.kernel_takes("cpu", 0, torch.float16, 64, 16)
    assert not ops.kernel_takes("cpu", 0, torch.float16, 64, (), "sdpa-math")


def test_torchs_function_is_ours_or_refused(qkv, monkeypatch):
    q, k, v = qkv[0], *(tensor.repeat_interleave(2, 1) for tensor in qkv[1:])
    assert sdpa.why_torch(q, k, v) == "the tensors lie on no GPU"
    monkeypatch.setenv(VARIABLE, "1")
    expected = flashcore.attention(q, k, v)
    assert torch.equal(flashcore.scaled_dot_product_attention(q, k, v), expected)
    mask = torch.ones(5, 70, dtype=torch.bool)
    with pytest.raises(
        Unsupported, match=f"{VARIABLE}=1 asks for bits .* torch would compute this call .* there is a mask"
    ):
        flashcore.scaled_dot_product_attention(q, k, v, mask)
    with flashcore.replace_sdpa() as calls:
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(q, k, v), expected)
        with pytest.raises(Unsupported, match="there is dropout"):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert calls.ours == 1 and not calls.torchs, "a call that was refused went nowhere"


def test_flash_attentions_functions_are_ours_or_refused(qkv, monkeypatch):
    q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in qkv)
    monkeypatch.setenv(VARIABLE, "1")
    expected = flashcore.attention(*qkv, causal=True, window_left=9, softcap=2.0).transpose(1, 2)
    given = {"causal": True, "window_size": (9, 0), "softcap": 2.0}
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, **given), expected)
    starts = torch.tensor([0, 5, 10], dtype=torch.int32), torch.tensor([0, 70, 140], dtype=torch.int32)
    flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    found = flash_attn.flash_attn_varlen_func(*flat, *starts, 5, 70, **given)
    assert torch.equal(found.unflatten(0, (2, 5)), expected)
    slopes = torch.rand(4)
    with pytest.raises(Unsupported, match=r"flash_attn_func.* others would compute this call without that promise"):
        flash_attn.flash_attn_func(q, k, v, alibi_slopes=slopes)
    with pytest.raises(Unsupported, match=r"flash_attn_varlen_func.* no kernel of ours takes it"):
        flash_attn.flash_attn_varlen_func(*flat, *starts, 5, 70, alibi_slopes=slopes)
    with pytest.raises(Unsupported, match=r"flash_attn_with_kvcache.* no kernel of ours takes it"):
        flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=70, alibi_slopes=slopes)
    single = [tensor.float() for tensor in (q, k, v)]  # a cache that no page table describes: lengths of keys
    lengths = torch.tensor([70, 41], dtype=torch.int32)
    in_rows = [torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, 10)) for tensor in (k, v)]  # 80 tokens: pages in a row
    for given in (single, [q, *in_rows]):
        found = flash_attn.flash_attn_with_kvcache(*given, cache_seqlens=lengths, causal=True)
        again = flashcore.attention(*(t.transpose(1, 2) for t in given), seqlens_k=lengths, causal=True)
        assert torch.equal(found, again.transpose(1, 2))


def test_attention_over_ranks_is_refused(monkeypatch):
    from flashcore.parallel import attending

    class Two:
        rank, size = 0, 2

    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(attending, "why_not_there", lambda *asked: None)
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(Unsupported, match="several ranks would compute this call without that promise"):
        attending._described(q, q, q, Two(), False, None, False, "auto", "gather", None, None)
