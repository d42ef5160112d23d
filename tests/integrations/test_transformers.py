"""Random models of transformers under our implementation: the logits of `eager`, the same greedy tokens as `sdpa`."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from flashcore.compat import sdpa
from flashcore.errors import InvalidProblem, ToolMissing, Unsupported
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
    for side, expected in (("none", "asked"), ("right", "asked" if free else "masked"), ("left", "masked")):
        seen.clear()
        logits(model, implementation, side)
        assert seen == [expected] * 2, "once a layer"


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


def test_training_gradients_are_those_of_eager(models, implementation):
    model = models("llama")
    tokens, real = padded("right")
    grads = []
    for one in ("eager", implementation):
        model.set_attn_implementation(one)
        model.zero_grad()
        model(tokens, attention_mask=real, labels=tokens.masked_fill(real == 0, -100)).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_model_compiles_whole(models, implementation):
    model = models("llama")
    model.set_attn_implementation(implementation)
    counter = CompileCounter()
    compiled = torch.compile(
        lambda tokens: model(tokens, use_cache=False).logits, fullgraph=True, dynamic=True, backend=counter
    )
    with torch.no_grad():
        for length in (5, 8, 11):
            tokens = padded("none")[0][:, :length].contiguous()
            torch.testing.assert_close(compiled(tokens), model(tokens, use_cache=False).logits)
    assert counter.frame_count == 1
    torch._dynamo.reset()


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


@pytest.mark.parametrize("name", ["flashcore", "my-Flash", "sdpa", "eager", "a|b", "org/kernel", "", 3])
def test_a_name_that_transformers_would_take_for_something_else_is_refused(transformers, name):
    with pytest.raises(InvalidProblem, match="^(name|transformers)"):
        ours.register(name)


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
