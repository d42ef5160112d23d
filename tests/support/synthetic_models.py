"""SYNTHETIC records of models for tests: invented numbers in the shape of real ones. Nothing here was measured."""

from __future__ import annotations

from flashcore.records import Timing, Trial
from flashcore.surveys.models.plan import LLAMA_64, ModelShape, Work
from support import synthetic_records as synthetic

STEP = {"flashcore": 5000.0, "sdpa": 8000.0, "sdpa-cudnn": 7000.0, "left out": 4000.0}
"""µs by way."""


def trial(way: str, what: str = "prefill", mode: str = "graph", *, shape: ModelShape = LLAMA_64, **fields) -> Trial:
    data = {
        "what": what, "mode": mode, "shape": shape.id, "title": shape.title, "words": shape.words(),
        "smoke": False, "dtype": "bfloat16", **fields.pop("data", {}),
    }  # fmt: skip
    return Trial(kind="model", backend=way, variant=f"{shape.id}, {what}, {mode}", environment=synthetic.ENV_ID,
                 data=data, **fields)  # fmt: skip


def step(way: str, us: float, what: str = "prefill", mode: str = "graph", **fields) -> Trial:
    """A timed step; all of one mode share a round."""
    work = Work(fields.get("shape", LLAMA_64), what, 8, 2048)
    samples = [us * (1 + 0.002 * (n % 3 - 1)) for n in range(30)]
    timing = Timing(method="events", latency_us=us, samples_us=samples, round=f"r-{what}-{mode}", l2="warm")
    data = {"batch": 8, "length": 2048, "tokens": work.tokens, "tokens_per_s": work.tokens / us * 1e6}
    if way != "left out":
        data |= {"attention_share": 1 - STEP["left out"] / us, "positions": 100, "decided": 80, "agreed": 80,
                 "worst_logit": 0.01, "noise": 0.01}  # fmt: skip
    data |= fields.pop("data", {})
    return trial(way, what, mode, problem=work.problem("bfloat16"), timing=timing, data=data, **fields)


def steps(what: str = "prefill", mode: str = "graph", slower: float = 1.0) -> list[Trial]:
    return [step(way, us * slower, what, mode) for way, us in STEP.items()]


def generated(way: str, **fields) -> Trial:
    data = {"batch": 4, "length": 1536, "generated": 16, "positions": 64, "decided": 60, "agreed": 60,
            "worst_logit": 0.011, "noise": 0.01}  # fmt: skip
    return trial(way, "tokens", "eager", data=data | fields.pop("data", {}), **fields)


def survey() -> list[Trial]:
    """Two kinds of step in two modes, tokens, and a peer that is not installed."""
    missing = "FlashAttention-3 is not installed; to mend it: pip install 'flashcore[peers]'"
    return [
        generated("flashcore"), generated("sdpa"),
        trial("fa3", "tokens", "eager", status="unavailable", reason=missing),
        *steps(), *steps(mode="eager", slower=1.5), *steps("decode"),
    ]  # fmt: skip
