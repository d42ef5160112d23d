"""Read the records of a survey of models: the last measurement of each step, and how two ways of it compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from flashcore.decision import compare
from flashcore.records import Trial
from flashcore.surveys.models.plan import MODES

OURS, LEFT_OUT = "flashcore", "left out"
WAY_WORDS = {
    "flashcore": "FlashCore", "sdpa": "torch SDPA", "sdpa-cudnn": "torch SDPA, cuDNN", "fa3": "FlashAttention-3",
    "fa4": "FlashAttention-4", "left out": "no attention",
}  # fmt: skip
"""What a reader calls a way."""


def model_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Records of kind `model`; of a thing measured again only the last."""
    found: dict[tuple[str | None, str | None], Trial] = {}
    for trial in trials:
        if trial.kind == "model":
            key = trial.variant, trial.backend
            found.pop(key, None)
            found[key] = trial
    return list(found.values())


def is_smoke(trial: Trial) -> bool:
    """Whether it was measured on a machine without a GPU, so that its time says nothing."""
    return trial.data.get("smoke") is not False


@dataclass
class Steps:
    """One kind of step of one model: its timings by mode and way."""

    shape: str
    title: str
    words: str
    what: str
    by_mode: dict[str, dict[str, Trial]] = field(default_factory=dict)

    def shown(self) -> tuple[str, dict[str, Trial]]:
        """The mode that a figure shows: of those in which ours was timed, the quickest; its trials by way."""
        timed = {mode: ways for mode, ways in self.by_mode.items() if OURS in ways} or self.by_mode

        def quickest(mode: str) -> float:
            taken = (t.timing.latency_us for way, t in timed[mode].items() if way != LEFT_OUT)
            return min(taken, default=math.inf)  # where attention was left out alone, there is nothing to compare

        mode = min(timed, key=quickest)
        return mode, timed[mode]


def steps(trials: Sequence[Trial]) -> list[Steps]:
    """Timings on a GPU that count, whose tokens were right, by model and kind of step."""
    found: dict[tuple[str, str], Steps] = {}
    for trial in model_trials(trials):
        data = trial.data
        fine = trial.status == "ok" and trial.timing is not None and trial.timing.latency_us > 0
        if not fine or is_smoke(trial) or data.get("mode") not in MODES:
            continue
        shape, what = str(data.get("shape")), str(data.get("what"))
        new = Steps(shape, str(data.get("title", shape)), str(data.get("words", "")), what)
        group = found.setdefault((shape, what), new)
        group.by_mode.setdefault(data["mode"], {})[str(trial.backend)] = trial
    return [group for group in found.values() if any(set(ways) - {LEFT_OUT} for ways in group.by_mode.values())]


def faster(mine: Trial, other: Trial) -> tuple[float, tuple[float, float] | None] | None:
    """How many times as fast one step is as another of the same round, and the interval of that; None for no round."""
    a, b = mine.timing, other.timing
    if a is None or b is None or a.round is None or a.round != b.round or mine.environment != other.environment:
        return None
    value = b.latency_us / a.latency_us
    if len(a.samples_us) != len(b.samples_us):
        return value, None
    found = compare.median_interval(theirs / ours for ours, theirs in zip(a.samples_us, b.samples_us, strict=True))
    return value, (min(found[0], value), max(found[1], value)) if found else None


def best_peer(ways: dict[str, Trial]) -> Trial | None:
    """The quickest of the others."""
    others = [trial for way, trial in ways.items() if way not in (OURS, LEFT_OUT)]
    return min(others, key=lambda trial: trial.timing.latency_us, default=None)


@dataclass(frozen=True)
class Tokens:
    """Over several records: places that were compared, those that noise does not decide, and the same ones."""

    records: int
    positions: int
    decided: int
    agreed: int
    wrong: int
    """Records whose tokens or logits are wrong."""


def tokens(trials: Sequence[Trial], *, smoke: bool) -> Tokens:
    """What was compared, in smoke tests or in measurements."""
    compared = [
        t for t in model_trials(trials)
        if is_smoke(t) == smoke and isinstance(t.data.get("decided"), int) and t.status in ("ok", "failed")
    ]  # fmt: skip
    sums = [sum(int(t.data.get(name, 0)) for t in compared) for name in ("positions", "decided", "agreed")]
    return Tokens(len(compared), *sums, sum(t.status == "failed" for t in compared))


def troubles(trials: Sequence[Trial]) -> list[Trial]:
    """What is wrong, did not finish or cannot be measured here."""
    return [trial for trial in model_trials(trials) if trial.status != "ok"]
