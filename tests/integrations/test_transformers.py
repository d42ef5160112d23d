"""Random models of transformers under our implementation: the logits of `eager`, the same greedy tokens as `sdpa`."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from support import compiling

from flashcore import ops
from flashcore.compat import flash_attn, sdpa
from flashcore.errors import InvalidProblem, ToolMissing, UnknownName, Unsupported
from flashcore.integrations import transformers as ours

SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "head_dim": 16,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", {}),
    "llama, one head a group": ("Llama", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "mistral, window": ("Mistral", {"sliding_window": 6}),
    "gemma": ("Gemma", {}),
    "gemma2, softcap and window": ("Gemma2", {"sliding_window": 5, "attn_logit_softcapping": 3.0,
                                              "query_pre_attn_scalar": 16}),
    "gemma3, window": ("Gemma3Text", {"sliding_window": 5}),
    "gpt-oss, sinks and window": ("GptOss", {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1}),
}  # fmt: skip
TOKENS, BATCH = 11, 3


WAYS = {"fcore": {}, "fcore-cpu": {"backend": "cpu"}, "fcore-cpu-real": {"backend": "cpu", "exact_padding": False}}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (the extra 'transformers')")


@pytest.fixture(scope="module", params=WAYS)
def implementation(request, transformers):
    """As a user registers it; with our own loop wherever ours may stand; and with the rows of padding left free."""
    return ours.register(request.param, **WAYS[request.param])


@pytest.fixture(scope="module")
def models(transformers):
    kept = {}

    def make(name: str):
        if name not in kept:
            family, options = MODELS[name]
            config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
            torch.manual_seed(0)
            prefix = family.removesuffix("Text")
            kept[name] = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
        return kept[name]

    return make


def padded(side: str):
    """Tokens and the mask that says which of them are real; the second and third sequences are shorter."""
    tokens = torch.randint(3, 97, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    real = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    for row, missing in ((1, 4), (2, 8)) if side != "none" else ():
        place = slice(0, missing) if side == "left" else slice(TOKENS - missing, TOKENS)
        real[row, place] = 0
        tokens[row, place] = 0
    return (tokens, real) if side != "none" else (tokens, None)


@torch.no_grad()
def logits(model, implementation: str, side: str) -> torch.Tensor:
    """Logits of the real tokens, each at the position that it has in its sequence."""
    model.set_attn_implementation(implementation)
    tokens, real = padded(side)
    positions = None if real is None else (real.cumsum(1) - 1).clamp(min=0)
    found = model(tokens, attention_mask=real, position_ids=positions, use_cache=False).logits
    return found.flatten(0, 1) if real is None else found[real.bool()]


@pytest.mark.slow
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_eager(models, implementation, name, side):
    model = models(name)
    expected = logits(model, "eager", side)
    got = logits(model, implementation, side)
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "qwen2, window", "gemma2, softcap and window", "gpt-oss, sinks and window"])
def test_generation_gives_the_same_tokens(models, implementation, name, side):
    model = models(name)
    tokens, real = padded(side)
    found = []
    others = "sdpa" if name in ("llama", "qwen2, window") else "eager"
    for one in (others, implementation):
        model.set_attn_implementation(one)
        asked = {} if real is None else {"attention_mask": real}
        found.append(model.generate(tokens, **asked, max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert torch.equal(*found) and found[0].shape[1] > TOKENS


@pytest.mark.slow
def test_rows_of_padding_too_are_those_of_sdpa_unless_they_are_left_free(models, implementation):
    model, (tokens, real) = models("llama"), padded("right")
    found = []
    for one in ("sdpa", implementation):
        model.set_attn_implementation(one)
        with torch.no_grad():
            found.append(model(tokens, attention_mask=real).logits)
    differ = ~torch.isclose(*found, rtol=1e-4, atol=1e-5).all(-1)
    assert not differ[real.bool()].any() and bool(differ.any()) == (implementation == "fcore-cpu-real")


def test_only_what_has_a_mask_is_computed_with_one(models, implementation, monkeypatch):
    model = models("llama")
    free = implementation == "fcore-cpu-real"
    seen = []
    monkeypatch.setattr(sdpa, "why_torch", lambda *a, **b: seen.append("asked") or "no")
    masks = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *a, **b: seen.append("masked") or masks(*a, **b))  # fmt: skip
    monkeypatch.setattr(sdpa, "_torchs", masks)
    attention = ops.attention
    monkeypatch.setattr(
        ops, "attention", lambda *a, **b: seen.append(b["padding"] if "padding" in b else "none") or attention(*a, **b)
    )
    for side, expected in (
        ("none", "asked"), ("right", "asked" if free else "masked"), ("left", "left" if free else "masked")
    ):  # fmt: skip
        seen.clear()
        logits(model, implementation, side)
        assert seen == [expected] * 2, "once a layer"


@pytest.mark.parametrize(("name", "expected"), [
    ("mistral, window", [{"window_left": 5}] * 2),
    ("gemma2, softcap and window", [{"window_left": 4, "softcap": 3.0}, {"softcap": 3.0}]),
    ("gpt-oss, sinks and window", [{"window_left": 4, "sink": (4,)}, {"sink": (4,)}]),
])  # fmt: skip
def test_windows_softcaps_and_sinks_go_to_kernels_and_left_padding_with_them(models, transformers, monkeypatch, name,
                                                                             expected):  # fmt: skip
    implementation = ours.register("fcore-cpu-real", **WAYS["fcore-cpu-real"])
    model, seen, attention = models(name), [], ops.attention
    plain = ("window_left", "softcap", "sink", "seqlens_k")

    def spy(q, k, v, **options):
        seen.append({
            key: tuple(one.shape) if isinstance(one, torch.Tensor) else one
            for key, one in options.items()
            if key in plain and one is not None and not (key == "window_left" and one < 0)
        })  # fmt: skip
        return attention(q, k, v, **options)

    monkeypatch.setattr(ops, "attention", spy)
    logits(model, implementation, "none")
    assert seen == expected
    seen.clear()
    logits(model, implementation, "left")
    assert seen == [{**one, "seqlens_k": (BATCH,)} for one in expected]
    seen.clear()
    logits(model, implementation, "right")
    assert seen == expected, "what comes after a token its causal mask hides anyhow"


def test_a_window_that_no_kernel_of_ours_takes_goes_to_flashattention_on_a_gpu(monkeypatch):
    class Gpu(torch.Tensor):
        is_cuda = True

    seen = []
    monkeypatch.setattr(ops, "kernel_takes", lambda *asked: False)
    monkeypatch.setattr(
        flash_attn, "flash_attn_func", lambda q, k, v, *asked: seen.append(asked) or torch.zeros_like(q)
    )
    q, k, v = (torch.randn(2, heads, 6, 16).half().as_subclass(Gpu) for heads in (4, 2, 2))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask.told = ours.Told(2)
    out, _ = ours.attention_forward(torch.nn.Module(), q, k, v, mask, scaling=0.3)
    assert out.shape == (2, 6, 4, 16) and seen == [(0.0, 0.3, True, (2, 0))]
    capped, _ = ours.attention_forward(torch.nn.Module(), q, k, v, mask, softcap=2.0)
    assert len(seen) == 1 and capped.any(), "torch's FlashAttention has no softcap; a mask is made"


def test_a_mask_is_described_only_where_it_says_no_more(transformers):
    from transformers import masking_utils as theirs

    def described(rows=6, keys=6, exact=False, real=None, function=theirs.causal_mask_function, **options):
        given = {"batch_size": 2, "q_length": rows, "kv_length": keys, "q_offset": keys - rows, "attention_mask": real,
                 "mask_function": function, **options}  # fmt: skip
        return ours.mask_of_rows(exact_padding=exact, **given)

    window = theirs.sliding_window_causal_mask_function(3)
    local = {"function": window, "local_size": 3}
    left = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    holes = torch.tensor([[1, 0, 1, 1, 1, 1], [1] * 6])
    assert described() is None and described(1) is None and described(real=left.flip(1)) is None
    assert described(**local).told == ours.Told(2) and described(2, **local).told == ours.Told(2)
    assert described(2).told == ours.Told(-1), "more tokens of a prompt, whose mask is aligned bottom right"
    assert described(real=left.flip(1), **local).told == ours.Told(2)
    found = described(2, real=left)
    assert torch.equal(found, left.bool()) and found.told.window == -1
    assert found.told.seqlens_q.tolist() == [2, 2] and found.told.seqlens_k.tolist() == [4, 6]
    assert described(real=left, **local).told.seqlens_q.tolist() == [4, 6]
    assert described(real=holes).told.places[1].tolist() == [0, 5, 11]
    kept = described(2, keys=5, real=left, kv_offset=1, q_offset=4, **local)
    assert torch.equal(kept, left[:, 1:].bool()), "a cache that kept the window alone"
    short = theirs.sliding_window_causal_mask_function(9)
    assert described(function=short, local_size=9) is None, "a window that hides nothing"
    for more in (
        {"exact": True, "real": left}, {"real": holes, **local}, {"function": window, "local_size": 4},
        {"function": theirs.and_masks(window, theirs.causal_mask_function), "local_size": 3},
        {"function": theirs.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64)), "local_size": 3},
        {"allow_is_causal_skip": False}, {"rows": 2, "q_offset": 1},
    ):  # fmt: skip
        mask = described(**more)
        assert mask is not None and mask.dim() == 4, more


def test_left_padding_is_never_ignored(models, implementation):
    """The padding's tokens change nothing for the real ones: what a missing mask would break."""
    model = models("llama")
    model.set_attn_implementation(implementation)
    tokens, real = padded("left")
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        first = model(tokens, attention_mask=real, position_ids=positions).logits[real.bool()]
        changed = torch.where(real.bool(), tokens, 50)
        second = model(changed, attention_mask=real, position_ids=positions).logits[real.bool()]
        third = model(changed, position_ids=positions).logits[real.bool()]
    torch.testing.assert_close(first, second)
    assert float((first - third).abs().max()) > 1e-3


@pytest.mark.parametrize("side", ["right", "left"])
def test_training_gradients_are_those_of_eager(models, implementation, side):
    model = models("llama")
    tokens, real = padded(side)
    # What follows padding is left out too: a row of padding would predict it, and `eager` and `sdpa` differ in those.
    counted = real.bool() & torch.nn.functional.pad(real[:, :-1].bool(), (1, 0))
    grads = []
    for one in ("eager", implementation):
        model.set_attn_implementation(one)
        model.zero_grad()
        model(tokens, attention_mask=real, labels=tokens.masked_fill(~counted, -100)).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_model_compiles_whole(models, implementation):
    model = models("llama")
    model.set_attn_implementation(implementation)
    counter = compiling.counter()
    compiled = torch.compile(
        lambda tokens: model(tokens, use_cache=False).logits, fullgraph=True, dynamic=True, backend=counter
    )
    with torch.no_grad():
        for length in (5, 8, 11):
            tokens = padded("none")[0][:, :length].contiguous()
            torch.testing.assert_close(compiled(tokens), model(tokens, use_cache=False).logits)
    assert counter.frame_count == 1
    compiling.forget()


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"softcap": 2.0}, {"s_aux": torch.tensor([0.5, 1.0])}])
def test_a_prompt_with_holes_by_lengths_and_by_a_mask(options):
    """Real tokens wherever they stand; what cannot be packed gets the mask that the lengths mean."""
    q, k, v = torch.randn(3, 2, 2, 7, 16).unbind(0)
    real = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    got = ours.attention_forward(torch.nn.Module(), q, k, v, real, **options)[0]
    for row in range(2):
        some = real[row]
        one = (t[row : row + 1, :, some] for t in (q, k, v))
        alone = ours.attention_forward(torch.nn.Module(), *one, None, **options)[0]
        torch.testing.assert_close(got[row : row + 1, some], alone)
    assert "s_aux" in options or not got[0][~real[0]].any()


def test_a_call_means_what_its_arguments_say():
    """The function alone, against the definition: a window without a mask, an empty static cache, a bias."""
    q, k, v = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    module = torch.nn.Module()

    def exact(hidden, bias=0.0):
        scores = q @ k.repeat_interleave(2, 1).mT / 4 + bias
        out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v.repeat_interleave(2, 1)
        return out.transpose(1, 2)

    row, column = torch.arange(6)[:, None], torch.arange(9)
    assert_close = torch.testing.assert_close
    assert_close(ours.attention_forward(module, q, k, v, None)[0], exact(column > row))
    assert_close(ours.attention_forward(module, q, k, v, None, is_causal=False)[0], exact(column < 0))
    seen = torch.rand(2, 1, 6, 9) < 0.7
    assert_close(ours.attention_forward(module, q, k, v, seen)[0], exact(~seen))
    added = torch.randn(1, 4, 6, 9)
    assert_close(ours.attention_forward(module, q, k, v, added)[0], exact(column < 0, added))
    assert_close(ours.attention_forward(module, q, k, v, seen, position_bias=added)[0], exact(~seen, added))
    assert_close(ours.attention_forward(module, q, k, v, None, position_bias=added)[0], exact(column > row, added))
    window = ours.attention_forward(module, q, k, v, None, sliding_window=3)[0]
    assert_close(window, exact((column > row) | (column <= row - 3)))
    q = q[:, :, -1:]
    assert_close(ours.attention_forward(module, q, k, v, None)[0], exact(column < 0))
    assert_close(ours.attention_forward(module, q, k, v, None, sliding_window=3)[0], exact(column < 6))


@pytest.mark.parametrize(("options", "words"), [
    ({"output_attentions": True}, "returns no attention weights; set attn_implementation='eager'"),
    ({"head_mask": torch.ones(4)}, "takes no head_mask"),
    ({"cu_seq_lens_q": torch.tensor([0, 3, 6])}, "packed sequences .* and no mask"),
])  # fmt: skip
def test_what_it_cannot_do_is_refused(options, words):
    q = torch.randn(1, 4, 6, 16)
    with pytest.raises(Unsupported, match=words):
        ours.attention_forward(torch.nn.Module(), q, q, q, None, **options)


def test_bits_of_every_batch_are_ours_or_the_call_is_refused(monkeypatch):
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    monkeypatch.setenv("FLASHCORE_BATCH_INVARIANT", "1")
    for options, asked in (
        ({}, {}),
        ({"softcap": 2.0, "sliding_window": 3}, {"softcap": 2.0, "window_left": 2}),
        ({"s_aux": torch.ones(4)}, {"sink": torch.ones(4)}),
    ):
        out, _ = ours.attention_forward(torch.nn.Module(), q, k, v, None, **options)
        assert torch.equal(out, ops.attention(q, k, v, causal=True, **asked).transpose(1, 2))
        with pytest.raises(Unsupported, match="torch would compute this call without that promise"):
            ours.attention_forward(torch.nn.Module(), q, k, v, torch.ones(2, 1, 9, 9, dtype=torch.bool), **options)
    with pytest.raises(
        Unsupported, match=r"since it has a mask; register\(exact_padding=False\) makes lengths of padding"
    ):
        ours.attention_forward(torch.nn.Module(), q, k, v, torch.zeros(2, 1, 9, 9))
    with pytest.raises(Unsupported, match="no kernel of ours takes its masks"):
        ours.attention_forward(torch.nn.Module(), q, k, v, None, position_bias=torch.zeros(1, 4, 9, 9))


@pytest.mark.parametrize("name", ["flashcore", "my-Flash", "sdpa", "eager", "a|b", "org/kernel", "", 3])
def test_a_name_that_transformers_would_take_for_something_else_is_refused(transformers, name):
    with pytest.raises(InvalidProblem, match="^(name|transformers)"):
        ours.register(name)


def test_a_backend_that_there_is_none_of_is_told_when_it_is_registered(transformers):
    with pytest.raises(UnknownName, match="There is no backend 'cpus'"):
        ours.register("fcore-none", backend="cpus")
    assert "fcore-none" not in transformers.AttentionInterface()


@pytest.mark.parametrize("side", ["left", "right"])
def test_under_autocast_logits_are_those_of_sdpa(models, implementation, side):
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(models("llama"), "sdpa", side)
        got = logits(models("llama"), implementation, side)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"softcap": 2.0}, {"s_aux": torch.tensor([0.5, 1.0])}])
def test_under_autocast_a_call_has_one_dtype(options):
    """A model's rotary embedding leaves float32 beside values in bfloat16, and torch's attention casts them."""
    q, k, v = torch.randn(3, 2, 2, 7, 16).bfloat16().unbind(0)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[0, :3] = False
    wanted = ours.attention_forward(torch.nn.Module(), q, k, v, real, **options)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = ours.attention_forward(torch.nn.Module(), q.float(), k.float(), v, real, **options)[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted)


def test_without_transformers_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ToolMissing, match=r"^transformers, .* is not installed here. To mend it: pip install 'flashcore\["
    ):
        ours.register()


@pytest.mark.gpu
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_on_the_gpu(transformers, side):
    name = ours.register()
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 256, "head_dim": 64})
    model = transformers.LlamaForCausalLM(config).eval().cuda().bfloat16()
    tokens, real = (None if t is None else t.cuda() for t in padded(side))
    found = []
    for one in ("sdpa", name):
        model.set_attn_implementation(one)
        with torch.no_grad():
            out = model(tokens, attention_mask=real).logits
        found.append(out if real is None else out[real.bool()])
    torch.testing.assert_close(*found, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["mistral, window", "gemma2, softcap and window", "gpt-oss, sinks and window"])
def test_masks_on_the_gpu(transformers, name, side):
    implementation = ours.register("fcore-real", exact_padding=False)
    family, options = MODELS[name]
    # Every token goes to all experts: which ones it is sent to would turn on the last bit of bfloat16.
    experts = {"num_experts_per_tok": options["num_local_experts"]} if "num_local_experts" in options else {}
    sizes = {"hidden_size": 256, "head_dim": 64}
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options, **sizes, **experts})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().cuda().bfloat16()
    tokens, real = (None if t is None else t.cuda() for t in padded(side))
    found = []
    for one in ("eager", implementation):
        model.set_attn_implementation(one)
        with torch.no_grad():
            out = model(tokens, attention_mask=real).logits
        found.append(out if real is None else out[real.bool()])
    torch.testing.assert_close(*found, rtol=5e-2, atol=5e-2)
