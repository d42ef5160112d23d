"""Answer the questions that the original status report left open, each in two sentences, from the records alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

from flashcore.decision import compare
from flashcore.decision.compare import number
from flashcore.page.drawing import survey_views
from flashcore.page.drawing.html_tables import table_html, version_words
from flashcore.problem import PRESETS
from flashcore.records import Trial
from flashcore.surveys.cublaslt import facts, unfused_model
from flashcore.surveys.cublaslt.grid import candidates_of, measured_us, peers_of

SURVEY, SWEEP, REPORT = "flashcore survey", "flashcore report --backend all", "flashcore report"
OURS = "cublaslt"
NEAR = 0.03
"""Relative difference of two medians below which they are called equal: their spread is of that size."""
NAN_FAULTS = ("F1", "F2", "F3", "F6")
"""Planted bugs that show as NaN or Inf."""


@dataclass(frozen=True)
class Answer:
    """One question, and what this run's records say to it."""

    question: str
    sentences: tuple[str, ...]
    """Two, or one that names the command to run when the records are missing."""
    figures: tuple[str, ...] = ()
    """HTML of what stands behind the sentences."""
    trials: tuple[Trial, ...] = ()
    """The records that were used."""
    missing: bool = False
    """Whether records are missing for an answer."""


def answers(trials: Sequence[Trial], *, environment: Mapping[str, Any] | None = None) -> list[Answer]:
    """The seven questions, answered from `trials`; `environment` gives the size of the L2 cache and the versions."""
    machine = (environment or {}).get("before") or {}
    return [
        workspace(trials, machine), smallest(trials), transpose(trials), without_lt(trials), batching(trials),
        not_a_number(trials), limit(trials, machine),
    ]  # fmt: skip


def answers_html(found: Sequence[Answer], *, figures: bool = True) -> str:
    """The answers as a list: question, sentences, and, unless `figures` is false, the figure behind each."""
    items = []
    for answer in found:
        text = escape(" ".join(answer.sentences))
        css = "fc-none" if answer.missing else "fc-answer"
        behind = "".join(answer.figures) if figures else ""
        items.append(f'<li><strong>{escape(answer.question)}</strong><p class="{css}">{text}</p>{behind}</li>')
    return f'<ol class="fc-answers">{"".join(items)}</ol>'


def _missing(question: str, what: str, command: str) -> Answer:
    return Answer(question, (f"{what} is not in these records; '{command}' on a GPU measures it.",), missing=True)


def _times(slow: float, fast: float) -> str:
    return f"{slow / fast:.2f} times"


def _against(one: float, other: float) -> str:
    """How one time stands to another, in words."""
    if abs(one / other - 1) <= NEAR:
        return "no slower and no faster than"
    return f"{_times(one, other)} as slow as" if one > other else f"{_times(other, one)} as fast as"


# ------------------------------------------------------------------------------------------------ the questions


def workspace(trials: Sequence[Trial], machine: Mapping[str, Any]) -> Answer:
    """1. Why Q·Kᵀ gets only algorithms without workspace, and whether it matters."""
    question = "Why does Q·Kᵀ get only algorithms without workspace, and does it matter?"
    groups = facts.by_case(trials)
    group = groups.get("report-qk")
    if not group:
        return _missing(question, "The survey of the report's product", SURVEY)
    asking = sum(t.data["workspace_bytes"] > 0 for t in group)
    tensor = sum(t.data.get("tensor_core") is True for t in group)
    every = candidates_of(trials)
    split = [t for t in every if t.data["split_k"] > 1]
    paying = [t for t in split if t.data["workspace_bytes"] > 0]
    whole = [t for t in every if t.data["split_k"] <= 1]
    found = machine.get("cublaslt")
    library = f"cuBLASLt {version_words('cublaslt', found)}" if found else "This cuBLASLt"
    offered = facts.facts_of(trials, "report-qk").get("offered", len(group))
    large = [t for t in every if t.data["workspace_bytes"] >= 1024]
    if not large:
        why = "no product of the survey was offered a kilobyte or more, so that workspace marks nothing here"
    elif 2 * sum(t.data["split_k"] > 1 for t in large) >= len(large):
        why = (
            f"workspace pays for splitting the sum over K, as {len(paying)} of {len(split)} split candidates of the "
            f"survey ask for some and {_large(whole)} of {len(whole)} others for a kilobyte, and a sum of 64 is too "
            "short to split"
        )
    else:
        why = (
            f"of {len(large)} candidates of the survey with a kilobyte or more, most do not split the sum over K either"
        )
    first = (
        f"{library} offers {offered} candidates for it, {asking} of which ask for workspace, and {tensor} of "
        f"{len(group)} run on Tensor Cores by the kernel's own name; {why}."
    )
    best, largest = facts.fastest(group), max(group, key=lambda t: (t.data["workspace_bytes"], -t.data["rank"]))
    second = (
        f"Choosing by workspace gives {number(measured_us(largest))} µs and the fastest candidate takes "
        f"{number(measured_us(best))} µs; "
        f"{_lower(facts.correlation_words(facts.workspace_correlation(trials)))}"
    )
    figures = (survey_views.workspace_html(trials), survey_views.report_html(trials))
    return Answer(question, (first, second), figures, tuple(every))


def _large(trials: Iterable[Trial]) -> int:
    return sum(t.data["workspace_bytes"] >= 1024 for t in trials)


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def smallest(trials: Sequence[Trial]) -> Answer:
    """2. The smallest product with a Tensor Core kernel."""
    question = "What is the smallest matrix product that gets a Tensor Core kernel?"
    grid = facts.small_grid(trials)
    if not grid:
        return _missing(question, "The search over small shapes", SURVEY)
    shape = facts.smallest_shape(trials)
    words = {word: sum(w == word for w in grid.values()) for word in set(grid.values())}
    if shape is None:
        first = f"None of the {len(grid)} shapes tried gets one as the heuristic's first choice."
    else:
        first = (
            f"M={shape[0]}, N={shape[1]}, K={shape[2]} is the smallest of {len(grid)} shapes whose first choice "
            "multiplies on Tensor Cores."
        )
    without = sorted((s for s, word in grid.items() if word in ("none", "offered")), key=math.prod)
    second = (
        f"Of the others, {words.get('offered', 0)} have such a kernel further down the list, {words.get('none', 0)} "
        f"have none and {words.get('refused', 0)} are refused"
    )
    if without:
        m, n, k = without[-1]
        second += f"; the largest whose first choice does without is M={m}, N={n}, K={k}"
    used = tuple(t for t in trials if t.kind == "gemm_candidate" and t.data.get("group") == "smallest")
    return Answer(question, (first, f"{second}."), (survey_views.smallest_html(trials),), used)


def transpose(trials: Sequence[Trial]) -> Answer:
    """3. Whether a pre-transposed K helps."""
    question = "Does the transpose matter: would a K transposed beforehand be faster?"
    pairs = {name: facts.transpose_pair(trials, name) for name in survey_views.TRANSPOSE_WORDS}
    pairs = {name: pair for name, pair in pairs.items() if pair}
    if not pairs:
        return _missing(question, "The comparison with a transposed K", SURVEY)
    name = "page" if "page" in pairs else next(iter(pairs))
    as_it_lies, beforehand = map(measured_us, pairs[name])
    first = (
        f"{survey_views.TRANSPOSE_WORDS[name]} takes {number(as_it_lies)} µs with K as it lies and "
        f"{number(beforehand)} µs with K transposed beforehand: it is {_against(as_it_lies, beforehand)} "
        f"the latter{_in_another_part(trials, name, as_it_lies)}."
    )
    ratios = {n: measured_us(a) / measured_us(b) for n, (a, b) in pairs.items()}
    worst = max(ratios, key=lambda n: abs(math.log(ratios[n])))
    matters = abs(ratios[worst] - 1) > 0.1
    workspaces = [{t.data["workspace_bytes"] for t in candidates_of(trials, case=f"transpose-{n}-{h}")}
                  for n in pairs for h in ("transposed", "beforehand")]  # fmt: skip
    differ = any(max(a) != max(b) for a, b in zip(workspaces[::2], workspaces[1::2], strict=True))
    second = (
        f"The largest difference over {len(pairs)} such products is {number(100 * abs(ratios[worst] - 1))} % "
        f"({survey_views.TRANSPOSE_WORDS[worst]}), so the transpose "
        f"{'matters there' if matters else 'does not matter'}, and "
        f"{'it changes' if differ else 'it does not change'} the workspace that is asked for."
    )
    return Answer(question, (first, second), (survey_views.transpose_html(trials),), tuple(sum(pairs.values(), ())))


def _in_another_part(trials: Sequence[Trial], name: str, here: float) -> str:
    """What the survey's part on the report's own case says of this very product, where it says otherwise."""
    other = facts.fastest(candidates_of(trials, case="report-qk")) if name == "page" else None
    if other is None or abs(measured_us(other) / here - 1) <= NEAR:
        return ""
    return (
        f" (in the survey's part on the report's own case the very product takes {number(measured_us(other))} µs; "
        "only times of one part are compared)"
    )


def without_lt(trials: Sequence[Trial]) -> Answer:
    """4. Whether cuBLAS without Lt chooses otherwise."""
    question = "Would cuBLAS without Lt choose otherwise?"
    groups = facts.by_case(trials)
    peers = {case: peer for case, peer in peers_of(trials).items() if case in groups}
    if not peers:
        return _missing(question, "cuBLAS without Lt", SURVEY)
    known = {c: p for c, p in peers.items() if p.data.get("kernel") and groups[c][0].data.get("kernel")}
    same = [c for c, p in known.items() if p.data["kernel"] == groups[c][0].data["kernel"]]
    offered = [c for c, p in known.items() if p.data["kernel"] in {t.data.get("kernel") for t in groups[c]}]
    first = (
        f"It launches the very kernel that cuBLASLt puts first for {len(same)} of {len(known)} products, and one that "
        f"cuBLASLt offers too for {len(offered)}."
    )
    ratios = {c: measured_us(p) / measured_us(facts.fastest(groups[c])) for c, p in peers.items()}
    worst = max(ratios, key=ratios.get)
    if "report-qk" in peers:
        qk, mine = peers["report-qk"], groups["report-qk"]
        times = [number(measured_us(t)) for t in (qk, mine[0], facts.fastest(mine))]
        second = (
            f"On the report's Q·Kᵀ it takes {times[0]} µs against {times[1]} µs of the first and {times[2]} µs of the "
            f"fastest candidate; at worst it takes {ratios[worst]:.2f} times as long as the fastest ({worst})."
        )
    else:
        second = f"At worst it takes {ratios[worst]:.2f} times as long as the fastest candidate ({worst})."
    return Answer(question, (first, second), (survey_views.cublas_html(trials),), tuple(peers.values()))


def batching(trials: Sequence[Trial]) -> Answer:
    """5. What batching heads and fusing pages buys."""
    question = "What do batching and fusing pages buy?"
    points = facts.batch_points(trials, "qk")
    timed = facts.attention_by_backend(trials)
    loop, others = timed.get("cublaslt-loop"), [t for b, t in timed.items() if b.startswith(OURS)]
    if len(points) < 2 and (loop is None or len(others) < 2):
        return _missing(question, "A comparison of batch sizes", SURVEY)
    sentences = []
    if len(points) >= 2:
        low, high = min(points), max(points)
        each, many = measured_us(points[low]) / low, measured_us(points[high]) / high
        sentences.append(
            f"Q·Kᵀ of a page costs {number(each)} µs a head with {low} in a launch and {number(many)} µs with {high}, "
            f"{_times(each, many)} less; a launch of {low} fills "
            f"{number(points[low].data.get('waves_count'))} waves of the chip, one of {high} "
            f"{number(points[high].data.get('waves_count'))}."
        )
    else:
        sentences.append(f"Products of several heads are not in these records; '{SURVEY}' measures them.")
    if loop is not None and len(others) > 1:
        best = min(others, key=compare.latency_us)
        gain = compare.latency_us(loop) / compare.latency_us(best)
        sentences.append(
            f"For the whole of attention a launch a head and page takes {number(compare.latency_us(loop) / 1e3)} ms "
            f"({number(compare.tflops(loop))} TFLOPS) and {best.backend} takes "
            f"{number(compare.latency_us(best) / 1e3)} ms ({number(compare.tflops(best))}), {number(gain)} "
            "times as fast."
        )
    else:
        sentences.append(f"The variants of the whole of attention are not in these records; '{SWEEP}' measures them.")
    used = (*points.values(), *others)
    return Answer(question, tuple(sentences), (survey_views.batch_html(trials),), used)


def not_a_number(trials: Sequence[Trial]) -> Answer:
    """6. Where NaN and Inf come from."""
    question = "Where does NaN or Inf come from, if anywhere?"
    mine = [t for t in trials if (t.backend or "").startswith(OURS)]
    checked = [t for t in mine if t.kind == "correctness" and t.correctness is not None]
    if not checked:
        return _missing(question, "A check of the cuBLASLt backends", SWEEP)
    bad = [t for t in checked if t.correctness.num_nan or t.correctness.num_inf]
    values = sum(t.correctness.checked for t in checked)
    if bad:
        worst = max(bad, key=lambda t: t.correctness.num_nan + t.correctness.num_inf)
        first = (
            f"{len(bad)} of {len(checked)} checks hold NaN or Inf, most in {worst.backend} at {worst.problem.label()}: "
            f"{worst.correctness.num_nan} NaN and {worst.correctness.num_inf} Inf."
        )
    else:
        first = (
            f"From nowhere: {len(checked)} checks of the cuBLASLt backends compared {values:,} values with float64 and "
            "met no NaN and no Inf, so that the report's 'Has NaN' with a tick is most likely a tick read the wrong "
            "way round."
        )
    planted = [t for t in mine if t.kind == "fault" and t.data.get("fault") in NAN_FAULTS]
    ran = [t for t in planted if t.data.get("outcome") not in ("not applicable", "not run")]
    if ran:
        found = [t for t in ran if t.data.get("outcome") == "found"]
        stages = sorted({f"{t.data.get('fault')} at {t.data.get('expected_stage')}" for t in found})
        second = (
            f"Bugs that do make NaN or Inf were planted {len(ran)} times and found at their own stage {len(found)} "
            f"times{': ' + ', '.join(stages) if stages else ''}."
        )
    else:
        bisected = [t for t in mine if t.kind == "bisection"]
        clean = sum(t.status == "ok" for t in bisected)
        second = (
            f"Stage by stage {clean} of {len(bisected)} bisections of these backends are clean."
            if bisected
            else "No bug that makes NaN was planted in these backends here; 'flashcore faults' does that."
        )
    rows = []
    for backend in sorted({str(t.backend) for t in checked}):
        own = [t for t in checked if t.backend == backend]
        rows.append({
            "Backend": backend, "Checks": len(own), "Values compared": f"{sum(t.correctness.checked for t in own):,}",
            "NaN": sum(t.correctness.num_nan for t in own), "Inf": sum(t.correctness.num_inf for t in own),
        })  # fmt: skip
    table = table_html(rows, "NaN and Inf in every check", numeric=["Checks", "Values compared", "NaN", "Inf"])
    return Answer(question, (first, second), (table,), (*checked, *planted))


def limit(trials: Sequence[Trial], machine: Mapping[str, Any]) -> Answer:
    """7. What the design can reach, and why."""
    question = "What can the cuBLASLt design reach, and why?"
    problem, l2_bytes = PRESETS["report"], machine.get("l2_bytes")
    ceilings = unfused_model.ceilings_of(trials, problem.dtype)
    if ceilings is None or not l2_bytes:
        return _missing(question, "What plain kernels reach on this machine", REPORT)
    cut, best = unfused_model.best(problem, ceilings, l2_bytes=l2_bytes)
    far = unfused_model.through_memory(problem, ceilings)
    bound = unfused_model.in_words(best)
    first = (
        f"On the report's workload a model gives it {number(best.tflops)} TFLOPS, with "
        f"{unfused_model.cut_in_words(cut)}, because of {bound}; with scores that go through device memory "
        f"{number(far.tflops)}."
    )
    timed = facts.attention_by_backend(trials, problem)
    ours = [t for b, t in timed.items() if b in unfused_model.VARIANTS]
    if ours:
        mine = max(ours, key=compare.tflops)
        peers = [t for t in timed.values() if compare.role(t) == "peer"]
        fused = max(peers, key=compare.tflops, default=None)
        own = unfused_model.predict(problem, unfused_model.VARIANTS[mine.backend], ceilings, l2_bytes=l2_bytes)
        second = (
            f"{mine.backend} reached {number(compare.tflops(mine))}, {100 * compare.tflops(mine) / own.tflops:.0f} % "
            "of what the model gives its own cut"
        )
        second += f"; the best fused peer, {fused.backend}, reached {number(compare.tflops(fused))}." if fused else "."
    else:
        second = f"No cuBLASLt variant was timed in these records; '{SWEEP}' does that."
    figures = (survey_views.limit_html(trials, l2_bytes=l2_bytes),)
    used = (*(t for t in trials if t.kind == "ceiling"), *timed.values())
    return Answer(question, (first, second), figures, used)
