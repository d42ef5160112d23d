"""transformers generates over our pages: the tokens of its own cache, with our attention and with its own."""

from __future__ import annotations

import pytest
import torch

from flashcore.errors import InvalidProblem, PagingError, SequenceTooLong
from flashcore.integrations import transformers as ours
from flashcore.integrations.caching import paged_cache
from flashcore.surveys.paging.plan import decoder

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra 'transformers')")

from transformers.generation import utils  # noqa: E402

ARGUMENT = getattr(utils, "ALL_CACHE_NAMES", ["past_key_values"])[0]
"""What this release calls the argument that takes a cache: past_key_values, or, since 5.24, cache."""
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0, "head_dim": 16,
}  # fmt: skip
BATCH, PROMPT, NEW = 2, 13, 9


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval().bfloat16()


@pytest.fixture(scope="module")
def reading() -> str:
    """An implementation whose decode steps read the pages, by the one backend that does so on a CPU."""
    return ours.register("fcore-reference", backend="reference")


PROMPTS = torch.randint(3, 61, (BATCH, PROMPT), generator=torch.Generator().manual_seed(5))


def generate(model, implementation: str, cache=None, prompts=PROMPTS, **options):
    model.set_attn_implementation(implementation)
    made = model.generate(
        prompts, **{ARGUMENT: cache}, max_new_tokens=NEW, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return made.sequences, torch.stack(made.logits)


def cache_of(model, **options):
    return paged_cache(model, **{"batch": BATCH, "max_length": 64, "page_size": 16, **options})


def test_any_attention_sees_the_numbers_of_transformers_own_cache(model):
    tokens, logits = generate(model, "sdpa")
    cache = cache_of(model)
    got, got_logits = generate(model, "sdpa", cache)
    assert torch.equal(got, tokens) and torch.equal(got_logits, logits), "bit by bit"
    assert cache.get_seq_length() == PROMPT + NEW - 1 == cache.books.max_length
    cache.books.check()
    layers = [layer.k_pool for layer in cache.books.layers]
    assert len(layers) == 3 and not torch.equal(layers[0], layers[1])


def test_decode_steps_read_the_pages_and_give_the_same_tokens(model, reading, monkeypatch):
    tokens, logits = generate(model, "sdpa")
    calls = []
    paged = ours.paged_attention
    monkeypatch.setattr(ours, "paged_attention", lambda q, *a, **b: calls.append(q.shape[2]) or paged(q, *a, **b))
    got, got_logits = generate(model, reading, cache_of(model))
    assert calls == [1] * 3 * (NEW - 1), "once a layer and step"
    noise = (got_logits - logits).abs().amax(-1)
    top = logits.topk(2, -1).values
    assert (noise < 0.02).all() and ((top[..., 0] - top[..., 1]) > 2 * noise).all(), "no tie that noise could turn"
    assert torch.equal(got, tokens)


MASKED = {
    "windows": ("Mistral", {"sliding_window": 6}),
    "softcaps, and windows in turn": (
        "Gemma2", {"sliding_window": 5, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}
    ),
    "sinks, and windows in turn": (
        "GptOss", {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKED)
def test_windows_softcaps_and_sinks_are_told_to_whoever_reads_the_pages(name, reading, monkeypatch):
    kind, options = MASKED[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().bfloat16()
    for parameter in (p for n, p in model.named_parameters() if n.endswith("sinks")):
        torch.nn.init.normal_(parameter)
    _, logits = generate(model, "eager")
    told = []
    paged = ours.paged_attention
    monkeypatch.setattr(ours, "paged_attention", lambda q, *a, **b: told.append(b) or paged(q, *a, **b))
    got, got_logits = generate(model, reading, cache_of(model))
    assert len(told) == 3 * (NEW - 1), "once a layer and step"
    windows = {one["window_left"] for one in told}
    assert windows == ({5} if name == "windows" else {-1, 4})
    assert {one["softcap"] for one in told} == {3.0 if "softcaps" in name else None}
    assert all((one["sink"] is not None) == ("sinks" in name) for one in told)
    assert ((got_logits - logits).abs().amax(-1)[:3] < 0.05).all(), "as transformers' own attention has them"


@torch.no_grad()
def test_several_tokens_at_once_read_the_pages_under_a_window(reading):
    """A mask that is causal and a window, and says so, needs no dense copy for more than one query either."""
    config = transformers.MistralConfig(**{**SMALL, "sliding_window": 6})
    torch.manual_seed(3)
    model = transformers.MistralForCausalLM(config).eval().bfloat16()
    cache, other = cache_of(model), cache_of(model)
    for implementation, kept in ((reading, cache), ("eager", other)):
        model.set_attn_implementation(implementation)
        model(PROMPTS, **{ARGUMENT: kept})
        kept.last = model(PROMPTS[:, :4], **{ARGUMENT: kept}).logits
    torch.testing.assert_close(cache.last, other.last, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("exact_padding", [True, False])
def test_padding_is_seen_by_the_pages_too(model, exact_padding):
    reading = ours.register(f"fcore-padding-{exact_padding}", backend="reference", exact_padding=exact_padding)
    prompts = PROMPTS.clone()
    prompts[1, :5] = 0
    real = torch.ones_like(prompts)
    real[1, :5] = 0
    tokens, _ = generate(model, "sdpa", prompts=prompts, attention_mask=real)
    got, _ = generate(model, reading, cache_of(model), prompts=prompts, attention_mask=real)
    assert torch.equal(got, tokens)


@torch.no_grad()
def test_cropping_and_beginning_anew(model):
    cache = cache_of(model)
    model.set_attn_implementation("sdpa")
    first = model(PROMPTS, **{ARGUMENT: cache}).logits
    model(PROMPTS[:, :4], **{ARGUMENT: cache})
    cache.crop(-6)
    assert cache.get_seq_length() == PROMPT - 2
    again = model(PROMPTS[:, -2:], **{ARGUMENT: cache}).logits
    torch.testing.assert_close(again, first[:, -2:], rtol=0.05, atol=0.02)
    cache.crop(5)
    assert cache.get_seq_length() == 5
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.books.max_length == 0
    assert torch.equal(model(PROMPTS, **{ARGUMENT: cache}).logits, first)
    cache.books.check()


def test_what_it_does_not_do_is_said(model):
    cache = cache_of(model)
    with pytest.raises(PagingError, match="as beam search asks for; generate with transformers' DynamicCache"):
        generate(model, "sdpa", cache_of(model, batch=2 * BATCH), num_beams=2)
    with pytest.raises(PagingError, match="repeat its sequences"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(PagingError, match="select some"):
        cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(PagingError, match="move to the CPU"):
        cache.layers[0].offload()
    with pytest.raises(PagingError, match="call crop\\(\\) of the cache"):
        cache.layers[0].crop(-1)
    with pytest.raises(PagingError, match="keeps no gradients"):
        model(PROMPTS, **{ARGUMENT: cache})
    with torch.no_grad(), pytest.raises(InvalidProblem, match="made for a batch of 2, and the model was called with 1"):
        model(PROMPTS[:1], **{ARGUMENT: cache_of(model)})
    with (
        torch.no_grad(),
        pytest.raises(SequenceTooLong, match="hold 16; make the paged cache with a larger max_len"),
    ):
        model(PROMPTS.repeat(1, 2), **{ARGUMENT: cache_of(model, max_length=16)})


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_is_told(model):
    model.set_attn_implementation("sdpa")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="keeps its books on the host"):
        compiled(PROMPTS, **{ARGUMENT: cache_of(model)})


@pytest.mark.gpu
def test_on_a_gpu_a_kernel_of_ours_reads_the_pages(monkeypatch):
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**{**SMALL, "head_dim": 64, "vocab_size": 997})
    model = transformers.LlamaForCausalLM(config).eval().to("cuda", torch.bfloat16)
    prompts = torch.randint(3, 997, (BATCH, 200), device="cuda")
    tokens, logits = generate(model, "sdpa", prompts=prompts)
    readers = []
    paged = ours.paged_attention
    monkeypatch.setattr(ours, "paged_attention", lambda *a, **b: readers.append(b["backend"]) or paged(*a, **b))
    cache = paged_cache(model, batch=BATCH, max_length=256, page_size=16)
    got, got_logits = generate(model, ours.register(), cache, prompts=prompts)
    assert readers == [decoder()] * 3 * (NEW - 1)
    cache.books.check()
    top = logits.float().topk(2, -1).values
    first = int((got != tokens).any(0).nonzero().min()) - 200 if (got != tokens).any() else NEW
    noise = (got_logits - logits)[:first].abs().max() if first else torch.tensor(0.0)
    assert noise < 0.05
    for row in range(BATCH):  # a token differs at first only where the best two lie within the noise
        if first < NEW and got[row, 200 + first] != tokens[row, 200 + first]:
            assert float(top[first, row, 0] - top[first, row, 1]) < 0.1
