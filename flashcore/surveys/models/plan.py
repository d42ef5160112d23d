"""Say what a survey of models measures: shapes of random models, and the steps of each, on a GPU and without one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from flashcore.errors import UnknownName
from flashcore.problem import Problem, check_profile

Phase = Literal["prefill", "decode"]
MODES = ("eager", "compiled", "graph")
"""`eager`; `compiled`, one `torch.compile(fullgraph=True)` over the whole model; `graph`, that as a CUDA graph."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder: RMSNorm, rotary positions, grouped attention, SwiGLU; the sizes that published models have."""

    id: str
    title: str
    layers: int
    hidden: int
    heads_q: int
    heads_kv: int
    head_dim: int
    mlp: int
    vocab: int = 32000
    window: int | None = None
    """Keys that a query of every second layer sees, its own counted; the other layers see all. None for all in each."""
    sink: bool = False
    """Whether each query head has one more key, with a learned score and the value 0."""

    def windowed(self, layer: int) -> bool:
        """Whether this layer has the window; the first one has."""
        return self.window is not None and layer % 2 == 0

    def words(self) -> str:
        """The shape in one line."""
        layers = f"{self.layers} layers" if self.layers > 1 else "1 layer"
        words = (
            f"{layers}, hidden {self.hidden}, {self.heads_q} query heads on {self.heads_kv}, head_dim {self.head_dim}"
        )
        if self.window is not None:
            words += f", window {self.window} in every second layer"
        return words + (", sinks" if self.sink else "")


@dataclass(frozen=True)
class Work:
    """One kind of step of one model."""

    shape: ModelShape
    phase: Phase
    batch: int
    length: int
    """Of the prompt, or of what each sequence has in the cache when a token is decoded."""

    @property
    def tokens(self) -> int:
        """Tokens that a step takes in."""
        return self.batch * (self.length if self.phase == "prefill" else 1)

    def problem(self, dtype: str) -> Problem:
        """Attention of a layer without a window."""
        shape, one = self.shape, self.phase == "decode"
        return Problem(
            batch=self.batch, num_heads_q=shape.heads_q, num_heads_kv=shape.heads_kv,
            seqlen_q=1 if one else self.length, seqlen_k=self.length + one, head_dim=shape.head_dim, dtype=dtype,
            causal=not one,
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often."""

    gpu: bool
    profile: str
    works: tuple[Work, ...]
    ways: tuple[str, ...]
    modes: tuple[str, ...]
    rounds: int
    most_rounds: int
    page_size: int = 128
    generated: int = 16
    """Tokens that each model generates when tokens are compared."""
    prompts: tuple[int, int] = (4, 1536)
    """Batch and length of the prompts for that; the window is then in force."""
    checks: int = 4
    """Batches of tokens with which a decode step is compared before it is timed."""
    dtype: str = "bfloat16"

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    @property
    def smoke(self) -> bool:
        """Whether it only shows that all of it runs: nothing on a CPU says how fast a model is."""
        return not self.gpu

    def shapes(self) -> list[ModelShape]:
        """Each model once."""
        return list(dict.fromkeys(work.shape for work in self.works))

    def of_shapes(self, names: str) -> Plan:
        """The part of the plan about these models, by their ids, separated by commas; ``all`` for the whole.

        Raises
        ------
        UnknownName
            The plan has no such model, or none is named.
        """
        wanted, there = [name.strip() for name in names.split(",") if name.strip()], [s.id for s in self.shapes()]
        if wanted == ["all"]:
            return self
        for name in wanted or [names]:
            if name not in there:
                raise UnknownName("model", name, ["all", *there])
        return replace(self, works=tuple(work for work in self.works if work.shape.id in wanted))


LLAMA_64 = ModelShape("llama-64", "Llama-like, head_dim 64", 8, 1024, 16, 4, 64, 2816)
LLAMA_128 = ModelShape("llama-128", "Llama-like, head_dim 128", 8, 1024, 8, 2, 128, 2816)
ALTERNATING = ModelShape(
    "alternating-64", "window and full attention in turn, with sinks", 8, 2048, 64, 8, 64, 2048, window=1024, sink=True
)
"""Heads, head_dim, window and sinks as gpt-oss has them; its experts are one dense SwiGLU here."""
WAYS = ("flashcore", "sdpa", "sdpa-cudnn", "fa3", "fa4")


def plan_for(profile: str, gpu: bool) -> Plan:
    """The plan of a profile; without a GPU a smoke test of a few seconds, whose models have a layer of each kind.

    Raises
    ------
    UnknownName
        `profile` is neither quick nor full.
    """
    check_profile(profile)
    if not gpu:
        small = {"hidden": 128, "mlp": 128, "vocab": 512, "heads_q": 2, "heads_kv": 1}
        llama = replace(LLAMA_64, layers=1, **small)
        alternating = replace(ALTERNATING, layers=2, window=16, **small)
        return Plan(
            gpu=False, profile=profile,
            works=tuple(
                Work(shape, phase, 2, 48) for shape in (llama, alternating) for phase in ("prefill", "decode")
            ),
            ways=("flashcore", "sdpa"), modes=("eager",), rounds=5, most_rounds=5, page_size=16, generated=4,
            prompts=(2, 24), checks=2,
        )  # fmt: skip
    full = profile == "full"
    llamas = (LLAMA_64, LLAMA_128)
    works = [Work(shape, *what) for shape in llamas for what in (("prefill", 8, 2048), ("decode", 64, 4096))]
    works += [Work(ALTERNATING, "prefill", 1, 4096), Work(ALTERNATING, "decode", 32, 8192)]
    if not full:  # compiling takes most of the time, and takes as long as there are layers; two have one of each kind
        works = [replace(work, shape=replace(work.shape, layers=2)) for work in works]
    return Plan(
        gpu=True, profile=profile, works=tuple(works), ways=WAYS if full else WAYS[:3], modes=MODES,
        rounds=30 if full else 15, most_rounds=100 if full else 30,
    )  # fmt: skip
