"""What a step needs before it is taken: a model, tokens, caches; and its compilation, ahead, in other processes.

Torch's compiler takes longer than all steps together, works on one core most of the time, and keeps what it made on
disk. So several processes compile every step first, and the one that measures finds it there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flashcore.gpu import device
from flashcore.measure.cluster import Here, Task, crew, perform
from flashcore.numerics import ambient
from flashcore.records import Trial
from flashcore.surveys.models.attending import Attention, Keeping
from flashcore.surveys.models.caches import Dense, Pages
from flashcore.surveys.models.model import Model
from flashcore.surveys.models.plan import ModelShape, Plan, Work
from flashcore.surveys.models.stepping import steps_of

CARD_BYTES = 10 << 30
"""Memory of the card that one process may need: the largest caches of a decode step, dense and in pages, are 9 GB."""
CHOICE = ".best_config"
"""How the names of files end in which torch notes the quickest of several forms of a kernel."""
AHEAD_LIMIT_S = 150.0
"""Seconds that one process may take for one step; a step of 8 layers takes some 15."""


def model_of(plan: Plan, shape: ModelShape, seed: int) -> Model:
    """The model of a shape, with positions for all that the plan does with it."""
    longest = max([work.length + 1 for work in plan.works if work.shape == shape] + [plan.prompts[1] + plan.generated])
    return Model(shape, positions=longest, seed=seed, dtype=getattr(torch, plan.dtype), device=plan.device)


def random_tokens(shape: ModelShape, batch: int, length: int, plan: Plan, seed: int) -> torch.Tensor:
    """Tokens ``[batch, length]``, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, shape.vocab, (batch, length), generator=generator).to(plan.device)


def step_tokens(plan: Plan, work: Work, seed: int) -> torch.Tensor:
    """The tokens that a step takes in first."""
    return random_tokens(work.shape, work.batch, work.length if work.phase == "prefill" else 1, plan, seed + 2)


def kept(plan: Plan, work: Work, seed: int) -> Keeping | None:
    """Caches that hold the same random tokens, with room for one more; None for a prompt, which keeps nothing."""
    if work.phase != "decode":
        return None
    kind = {"dtype": getattr(torch, plan.dtype), "device": plan.device}
    dense = Dense(work.shape, work.batch, work.length + 1, **kind)
    dense.fill(work.length, seed)
    pages = Pages(work.shape, work.batch, work.length + 1, page_size=plan.page_size, **kind)
    pages.fill(dense, work.length)
    pages.cache.reserve(1)
    return Keeping(dense, pages)


def attention_of(way: str, model: Model, work: Work, keeping: Keeping | None) -> Attention:
    """Attention in one way, at the place where a step of this kind is taken."""
    attention = Attention(way, work.shape, model.sinks, keeping)
    attention.position = work.length if keeping else 0
    return attention


def compile_ahead(
    plan: Plan, ways: Sequence[str], *, seed: int = 0, progress: Callable[[str], None] | None = None
) -> dict[tuple[Work, str], str]:
    """Compile the steps of a plan in processes of their own, where this machine has cores and memory for some.

    Returns
    -------
    dict
        By work and way, what happened to a process that did not survive, as a clause: this process must not take that
        step. What raised is not in it; that is seen when the step is measured.
    """
    if not plan.gpu or "compiled" not in plan.modes:
        return {}
    workers = crew(Here(), most=max(1, device.memory_bytes() // CARD_BYTES))
    if isinstance(workers, Here):
        return {}
    each = [(work, way) for work in plan.works for way in ways]
    tasks = [
        Task(f"compile {work.shape.id}, {work.phase}, {way}", _compiled, (plan, work, way, seed),
             limit_s=AHEAD_LIMIT_S, cost_s=float(work.shape.layers),
             owed=({"kind": "model", "backend": way, "data": {"number": number}},))
        for number, (work, way) in enumerate(each)
    ]  # fmt: skip
    if progress:
        progress(f"compiling {len(tasks)} steps ahead")
    began = time.time()
    try:
        (trials,) = perform(tasks, pool=workers)
    finally:
        workers.close()
    _forget_choices(began)
    return {
        each[trial.data["number"]]: f"tried in a process of its own, it did not survive: {trial.reason}"
        for trial in trials
        if trial.data.get("crashed")
    }


def _forget_choices(since: float) -> None:
    """Remove what torch noted since then on which form of a kernel was quicker: others used the card meanwhile.

    The process that measures finds it out again, in milliseconds, from the same compiled forms.
    """
    from torch._inductor.runtime.runtime_utils import cache_dir

    for note in Path(cache_dir()).glob(f"*/*{CHOICE}"):
        with contextlib.suppress(OSError):  # another process of torch's may remove it too
            if note.stat().st_mtime >= since - 1.0:
                note.unlink()


def _compiled(plan: Plan, work: Work, way: str, seed: int) -> Iterator[Trial]:
    """Compile one step in this process, on one core, and take it."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # there are as many processes as cores
    try:
        with ambient.shield(modes=True), torch.no_grad():  # as where it is measured, or it counts as another step
            alone = replace(plan, works=tuple(one for one in plan.works if one.shape == work.shape))
            model, keeping = model_of(alone, work.shape, seed), kept(plan, work, seed)
            attention, tokens = attention_of(way, model, work, keeping), step_tokens(plan, work, seed)
            steps = steps_of(model, attention, tokens, ["compiled"])
        failed = [step for step in steps.values() if isinstance(step, Exception)]
        yield Trial(kind="model", backend=way, status="error" if failed else "ok",
                    reason=f"{type(failed[0]).__name__}: {failed[0]}"[:300] if failed else None)  # fmt: skip
    finally:
        torch.compiler.reset()
