"""Say what a survey of paging measures: shapes, shares and batches of each profile, on a GPU and without one."""

from __future__ import annotations

from dataclasses import dataclass

from flashcore import backends
from flashcore.paged_ops import AUTO_ORDER
from flashcore.problem import PRESETS, Problem, check_profile, square


@dataclass(frozen=True)
class ModelShape:
    """What a rate of tokens is stated for: attention of these layers, and nothing else of a model."""

    name: str
    layers: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    context: int
    """Tokens that each sequence has in the cache."""
    stated_batch: int
    """The batch that the shape's own figure is given for; the others show how it grows."""
    card: str = ""
    """Whose numbers these are: the model's public card."""

    def words(self) -> str:
        """The shape in one line."""
        layers = f"{self.layers} layers" if self.layers > 1 else "1 layer"
        return (
            f"{layers}, {self.num_heads_q} query heads, {self.num_heads_kv} KV heads, head_dim {self.head_dim}, "
            f"context {self.context}"
        )

    def problem(self, batch: int) -> Problem:
        """One layer's decode step: a query token a sequence."""
        return decode_problem(batch, self.num_heads_q, self.num_heads_kv, self.context, self.head_dim)


def decode_problem(batch: int, heads_q: int, heads_kv: int, keys: int, head_dim: int) -> Problem:
    """One query token a sequence, which sees every key."""
    return Problem(
        batch=batch, num_heads_q=heads_q, num_heads_kv=heads_kv, seqlen_q=1, seqlen_k=keys, head_dim=head_dim
    )


def report_shape(layers: int = 1) -> ModelShape:
    """The original report's workload as a model: it names no layers, so that one is taken and said."""
    return ModelShape("report", layers, 16, 16, 64, 2048, stated_batch=16)


@dataclass(frozen=True)
class Further:
    """What serving has beside one query token each over sequences of one length."""

    problem: Problem
    """The step that each of them changes in one way."""
    lengths: tuple[int, int]
    """Of a batch of unlike sequences: the shortest and the longest that may be drawn."""
    tokens: tuple[int, ...]
    """Query tokens a sequence."""
    prefix: int
    """Tokens that all sequences share, pages and all."""


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often."""

    gpu: bool
    profile: str
    decode: tuple[Problem, ...]
    prefill: tuple[Problem, ...]
    append: Problem
    """Batch, KV heads and head_dim; `seqlen_k` is how long the sequences are."""
    accuracy: Problem
    models: tuple[ModelShape, ...]
    batches: tuple[int, ...]
    served: tuple[ModelShape, ...]
    """Public models, beside every peer."""
    served_batches: tuple[int, ...]
    shapes: tuple[Problem, ...]
    """Decode against dense attention, at each of `pages` and in each of `dtypes`."""
    pages: tuple[int, ...]
    dtypes: tuple[str, ...]
    further: Further | None = None
    further_cases: tuple[str, ...] = ()
    """Which of them, by name; none for all."""
    shares: tuple[float, ...] = (1.0, 0.5, 0.3, 0.1)
    """Of the pages, that a policy selects when decode is timed."""
    accuracy_shares: tuple[float, ...] = (0.1, 0.3, 0.5)
    sparse_share: float = 0.3
    """Of the pages, beside all of them, when tokens a second are counted."""
    page_size: int = 128
    rounds: int = 30
    decode_backend: str = "decode"
    invariant_backend: str = "decode"
    """What decodes in the batch-invariant mode."""
    prefill_backend: str = "hopper-paged"
    dense_backend: str = "hopper"
    """Beside paged prefill."""
    peer: str = "sdpa-cudnn"
    """Dense decode over contiguous K and V."""

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"


MODEL = ModelShape("model", 32, 32, 8, 128, 8192, stated_batch=64)
"""The shape that a rate of tokens is asked for: that of a model of 8 billion parameters."""


SERVED = (
    ModelShape("Llama-3.1-8B", 32, 32, 8, 128, 4096, stated_batch=64, card="meta-llama/Llama-3.1-8B"),
    ModelShape("Qwen3-30B-A3B", 48, 32, 4, 128, 4096, stated_batch=64, card="Qwen/Qwen3-30B-A3B"),
    ModelShape("SmolLM2-1.7B", 24, 32, 32, 64, 4096, stated_batch=64, card="HuggingFaceTB/SmolLM2-1.7B"),
)  # fmt: skip
"""Groups of 4, 8 and 1 query heads, head_dim 128 and 64, and full attention in every layer, as the models' cards on
Hugging Face say (`config.json`: num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim)."""


SHAPES = (
    decode_problem(64, 32, 8, 4096, 128), decode_problem(16, 16, 16, 8192, 64), decode_problem(1, 32, 8, 32768, 128),
    decode_problem(128, 32, 8, 1024, 128), decode_problem(256, 64, 8, 512, 128),
)  # fmt: skip
"""Decode steps in which dense cuDNN was ahead of ours when they were first timed."""


def decoder() -> str:
    """What ``paged_attention`` takes of its own accord for a decode step on the GPU at hand."""
    return next(name for name in AUTO_ORDER["cuda"] if backends.get(name).pays(SHAPES[0]))


def plan_for(profile: str, gpu: bool, *, report_layers: int = 1, decode_backend: str = "decode") -> Plan:
    """The plan of a profile; without a GPU the sizes are small enough for two cores, and only the reference is timed.

    Raises
    ------
    UnknownName
        `profile` is neither quick nor full.
    """
    check_profile(profile)
    full = profile == "full"
    if not gpu:
        small = decode_problem(2, 4, 2, 256, 64)
        return Plan(
            gpu=False, profile=profile, decode=(small,),
            prefill=(Problem(batch=1, num_heads_q=2, num_heads_kv=2, seqlen_q=64, seqlen_k=64, head_dim=64),),
            append=decode_problem(4, 2, 2, 100, 64),
            accuracy=Problem(batch=2, num_heads_q=8, num_heads_kv=2, seqlen_q=1, seqlen_k=8192 if full else 4096,
                             head_dim=64, causal=True, page_size=64),
            models=(ModelShape("tiny", 2, 4, 2, 64, 256, stated_batch=2),), batches=(1, 2), page_size=32, rounds=3,
            served=(ModelShape("tiny", 2, 4, 2, 64, 96, stated_batch=2, card="nobody/tiny"),), served_batches=(1, 2),
            shapes=(decode_problem(2, 4, 2, 128, 64),), pages=(16, 32), dtypes=("float16",),
            further=Further(decode_problem(3, 4, 2, 96, 64), (5, 200), (2,), 64),
            decode_backend="reference", invariant_backend="reference", prefill_backend="reference",
            dense_backend="reference", peer="sdpa-math",
        )  # fmt: skip
    return Plan(
        gpu=True, profile=profile,
        decode=(
            decode_problem(64, 32, 8, 4096, 128), decode_problem(16, 16, 16, 8192, 64),
            decode_problem(1, 32, 8, 32768, 128),
        ),
        prefill=(PRESETS["report"], square(4, 16, 4096, 128, causal=True)),
        append=decode_problem(64, 8, 8, 1000, 128),
        accuracy=Problem(batch=4, num_heads_q=32, num_heads_kv=8, seqlen_q=1, seqlen_k=32768 if full else 8192,
                         head_dim=128, causal=True),
        models=(MODEL, report_shape(report_layers)),
        batches=(1, 2, 4, 8, 16, 32, 64, 128, 256) if full else (1, 16, 64),
        served=SERVED if full else SERVED[:1], served_batches=(1, 16, 64, 256) if full else (1, 64),
        shapes=SHAPES if full else SHAPES[:3:2], pages=(16, 64, 128) if full else (16, 128),
        dtypes=("float16", "bfloat16") if full else ("float16",),
        further=Further(decode_problem(64, 32, 8, 4096, 128), (100, 16_000), (2, 4), 3584) if full else None,
        rounds=30 if full else 12, decode_backend=decode_backend,
    )  # fmt: skip
