"""Run a survey of models: the same tokens first, then times, a record for each way and mode of each step."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flashcore import backends
from flashcore.errors import BackendUnavailable, FlashCoreError, Unsupported
from flashcore.measure.cluster import Pool, Task, perform
from flashcore.numerics import ambient
from flashcore.records import Ledger, RunFolder, Timing, Trial, digits
from flashcore.surveys.models.agreeing import Agreement, Expected, agreement, expected, together
from flashcore.surveys.models.attending import EXACT, LEFT_OUT, OURS, PEERS, Attention, Keeping
from flashcore.surveys.models.caches import Dense, Pages
from flashcore.surveys.models.model import Model
from flashcore.surveys.models.plan import ModelShape, Plan, Work
from flashcore.surveys.models.preparing import attention_of, compile_ahead, kept, model_of, random_tokens, step_tokens
from flashcore.surveys.models.stepping import Step, steps_of, time_steps

MODEL_LIMIT_S = 1200.0
"""Seconds that all steps of one model may take on a worker; torch's compiler takes minutes of them."""
DEFAULT = "sdpa"
"""The way whose distance from `EXACT` is the noise."""


@dataclass
class _Book:
    """Where records go: to the run at once, and to the caller at the end."""

    run: RunFolder | Ledger
    plan: Plan
    say: Callable[[str], None]
    trials: list[Trial] = field(default_factory=list)

    def write(self, shape: ModelShape, what: str, way: str, mode: str, data: dict[str, Any], **fields) -> Trial:
        whole = {
            "what": what, "mode": mode, "shape": shape.id, "title": shape.title, "words": shape.words(),
            "smoke": self.plan.smoke, "dtype": self.plan.dtype, **data,
        }  # fmt: skip
        whole |= {} if way == OURS else {"role": "peer"}  # what others lack or lose is no loss of ours
        whole = {name: digits(value, 4) if isinstance(value, float) else value for name, value in whole.items()}
        trial = Trial(kind="model", backend=way, variant=f"{shape.id}, {what}, {mode}", data=whole, **fields)
        self.trials.append(self.run.append(trial))
        words = trial.reason or (f"{trial.timing.latency_us:,.0f} µs" if trial.timing else trial.status)
        self.say(f"{trial.variant}, {way}: {words}")
        return trial

    def failed(self, shape: ModelShape, what: str, way: str, mode: str, error: Exception, data=None, **fields) -> Trial:
        status, reason = _outcome(error)
        return self.write(shape, what, way, mode, data or {}, status=status, reason=reason, **fields)


def _outcome(error: Exception) -> tuple[str, str]:
    """Status and reason of what was raised, also inside of torch's compiler."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, Unsupported):
            return "unsupported", inner.reason
        if isinstance(inner, BackendUnavailable):
            return "unavailable", f"{inner.reason}; to mend it: {inner.fix}"
        if "No available kernel" in str(inner):
            return "unsupported", "this torch has no such kernel for the shape, dtype or grouped heads"
        inner = inner.__cause__ or inner.__context__
    text = " ".join(str(error).split()) or "no message"
    return "error", text[:300] if isinstance(error, FlashCoreError) else f"{type(error).__name__}: {text[:300]}"


@ambient.judging
def measure(
    run: RunFolder | Ledger,
    plan: Plan,
    *,
    seed: int = 0,
    pool: Pool | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Trial]:
    """Measure and record; what fails is a record, and the rest goes on.

    Every way first generates from prompts and takes each step once more with other tokens, and its tokens are compared
    (`surveys.models.agreeing`). Then all ways and modes of a step are timed round by round, with a model whose
    attention is left out beside them: what that lacks is the share of attention.

    Parameters
    ----------
    pool
        The workers, each of which takes whole models; None for this process alone.

    Returns
    -------
    list of Trial
        Of kind `model`. ``data["what"]`` is `tokens`, `prefill` or `decode`.
    """
    if pool is not None and pool.places:
        tasks = [
            Task(f"model {shape.id}", _model, (plan.of_shapes(shape.id), seed), timing=True, limit_s=MODEL_LIMIT_S,
                 cost_s=60.0, owed=({"kind": "model", "data": {"what": "tokens", "shape": shape.id}},))
            for shape in plan.shapes()
        ]  # fmt: skip
        return perform(tasks, run=run, pool=pool, progress=progress)[0]
    book = _Book(run, plan, progress or (lambda line: None))
    ways = []
    for way in plan.ways:
        try:
            if way in PEERS:
                backends.get(way).require()
            ways.append(way)
        except FlashCoreError as error:
            for shape in plan.shapes():
                book.failed(shape, "tokens", way, "eager", error)
    barred = compile_ahead(plan, (LEFT_OUT, *ways), seed=seed, progress=progress)
    with torch.no_grad():
        for shape in plan.shapes():
            works = [work for work in plan.works if work.shape == shape]
            model = model_of(plan, shape, seed)
            died = {way: reason for (work, way), reason in barred.items() if work.shape == shape}
            for way, reason in died.items():
                book.failed(shape, "tokens", way, "eager", FlashCoreError(reason))
            _compare_generated(book, plan, model, [way for way in ways if way not in died], seed)
            for work in works:
                try:
                    _measure_work(book, plan, model, work, ways, seed, barred)
                except Exception as error:  # what is common to all ways failed, such as too little memory
                    book.failed(shape, work.phase, LEFT_OUT, "eager", error)
                _tidy(plan)
    return book.trials


def _model(plan: Plan, seed: int) -> list[Trial]:
    """The records of one model."""
    return measure(Ledger(), plan, seed=seed)


def _tidy(plan: Plan) -> None:
    """Give back what the steps of one kind held: compiled code, which torch counts, graphs and their memory."""
    if plan.modes != ("eager",):
        torch.compiler.reset()
    if plan.gpu:
        gc.collect()
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------ generated tokens


def generated_logits(
    model: Model, way: str, prompts: torch.Tensor, count: int, *, page_size: int, forced: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits ``[count, B, vocab]`` of the tokens that a model generates after prompts ``[B, S]``, greedily.

    Parameters
    ----------
    forced
        Tokens ``[count, B]`` that are fed instead of the model's own, so that two ways see the same past.
    """
    shape, (batch, length) = model.shape, prompts.shape
    kind = {"dtype": model.head.weight.dtype, "device": prompts.device.type}
    room = length + count
    pages = Pages(shape, batch, room, page_size=page_size, **kind) if way == OURS else None
    attention = Attention(way, shape, model.sinks, Keeping(Dense(shape, batch, room, **kind), pages))
    cache = attention.pages.cache if attention.pages is not None else None
    found, tokens = [], prompts
    for number in range(count):
        if cache is not None:
            cache.reserve(tokens.shape[1])
        attention.begin()
        with attention.around():
            logits = model(tokens, attention.position, attention)[:, -1]
        if cache is not None:
            cache.advance(tokens.shape[1])
        attention.position += tokens.shape[1]
        found.append(logits)
        tokens = (logits.argmax(-1) if forced is None else forced[number])[:, None]
    if cache is not None:
        cache.check()
    return torch.stack(found)


def _compare_generated(book: _Book, plan: Plan, model: Model, ways: list[str], seed: int) -> None:
    """One record a way: greedy tokens after prompts, step by step, over a cache that grows."""
    shape, (batch, length) = model.shape, plan.prompts
    prompts = random_tokens(shape, batch, length, plan, seed + 1)
    options = {"count": plan.generated, "page_size": plan.page_size}
    try:
        exact = generated_logits(model, EXACT, prompts, **options)
        tokens = exact.argmax(-1)
        default = generated_logits(model, DEFAULT, prompts, forced=tokens, **options)
        wanted = expected(exact.flatten(0, 1), default.flatten(0, 1))
    except Exception as error:
        book.failed(shape, "tokens", EXACT, "eager", error)
        return
    for way in ways:
        data = {"batch": batch, "length": length, "generated": plan.generated}
        try:
            logits = generated_logits(model, way, prompts, forced=tokens, **options)
            found = agreement(wanted, logits.flatten(0, 1))
            book.write(shape, "tokens", way, "eager", data | found.data(), **_worth(found))
        except Exception as error:
            book.failed(shape, "tokens", way, "eager", error, data)


def _worth(found: Agreement) -> dict[str, str | None]:
    wrong = found.wrong
    return {"status": "failed", "reason": wrong} if wrong else {"status": "ok", "reason": None}


# --------------------------------------------------------------------------------------------------------- steps


def _measure_work(
    book: _Book, plan: Plan, model: Model, work: Work, ways: list[str], seed: int,
    barred: Mapping[tuple[Work, str], str],
) -> None:  # fmt: skip
    """A record for each way and mode of one kind of step: compared, and timed next to each other."""
    shape, problem = work.shape, work.problem(plan.dtype)
    tokens = step_tokens(plan, work, seed)
    keeping = kept(plan, work, seed)
    steps: list[Step] = []
    data = {"batch": work.batch, "length": work.length, "tokens": work.tokens}

    def failed(way: str, mode: str, error: Exception) -> None:
        book.failed(shape, work.phase, way, mode, error, data, problem=problem)

    for way in (LEFT_OUT, *ways):
        if died := barred.get((work, way)):
            for mode in plan.modes:
                failed(way, mode, FlashCoreError(died))
            continue
        attention = attention_of(way, model, work, keeping)
        for mode, step in steps_of(model, attention, tokens, plan.modes).items():
            if isinstance(step, Exception):
                failed(way, mode, step)
            else:
                steps.append(step)
    found: dict[str, list[Agreement]] = {step.name: [] for step in steps if step.way != LEFT_OUT}
    for wanted, rows in _wanted(plan, model, work, keeping, tokens, steps, seed):
        for step in [step for step in steps if step.name in found]:
            try:
                logits = step.run()
                parts = [agreement(one, logits[row].flatten(0, 1)) for one, row in zip(wanted, rows, strict=True)]
                found[step.name] += parts
            except Exception as error:
                del found[step.name]
                steps.remove(step)
                failed(step.way, step.mode, error)
    timings = time_steps(steps, problem, rounds=plan.rounds, most_rounds=plan.most_rounds, gpu=plan.gpu)
    for step in steps:
        timing = timings[step.name]
        if isinstance(timing, Exception):
            failed(step.way, step.mode, timing)
            continue
        more = data | {"tokens_per_s": work.tokens / timing.latency_us * 1e6}
        if step.way == LEFT_OUT:
            book.write(shape, work.phase, step.way, step.mode, more, problem=problem, timing=timing)
            continue
        share = _share(timing, timings.get(f"{LEFT_OUT}, {step.mode}"))
        more |= {} if share is None else {"attention_share": share}
        same = together(found[step.name])
        book.write(shape, work.phase, step.way, step.mode, more | same.data(), problem=problem, timing=timing,
                   **_worth(same))  # fmt: skip


def _wanted(
    plan: Plan, model: Model, work: Work, keeping: Keeping | None, tokens: torch.Tensor, steps: list[Step], seed: int
) -> Iterator[tuple[list[Expected], list[Any]]]:
    """What the steps have to give, again and again with other tokens; and which of a step's logits each part is about.

    Logits of a prompt are compared sequence by sequence, since those of exact attention take much memory.
    """
    exact = attention_of(EXACT, model, work, keeping)
    torchs = next((step for step in steps if step.way == DEFAULT), None)
    for number in range(plan.checks if keeping else 1):
        tokens.copy_(random_tokens(work.shape, *tokens.shape, plan, seed + 3 + number))
        rows = [slice(None)] if keeping else [slice(row, row + 1) for row in range(work.batch)]
        with exact.around():
            truth = [model(tokens[row], exact.position, exact).flatten(0, 1) for row in rows]
        default = torchs.run() if torchs is not None else None
        yield [
            expected(one, one if default is None else default[row].flatten(0, 1))
            for one, row in zip(truth, rows, strict=True)
        ], rows  # fmt: skip


def _share(timing: Timing, without: Timing | Exception | None) -> float | None:
    """Share of attention in a step: what is gone when it is left out, by the median over the rounds."""
    if not isinstance(without, Timing):
        return None
    pairs = zip(timing.samples_us, without.samples_us, strict=True)
    return statistics.median(1.0 - other / mine for mine, other in pairs)
