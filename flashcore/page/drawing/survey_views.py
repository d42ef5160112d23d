"""Draw a survey of cuBLASLt from its records: what workspace says, what each policy costs, where Tensor Cores begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import escape
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from flashcore.decision import compare
from flashcore.decision.compare import number
from flashcore.page.drawing.html_tables import nothing, table_html
from flashcore.page.drawing.svg import COLOURS, FONT_SIZE, named, style, titled, with_tips
from flashcore.problem import PRESETS
from flashcore.records import Trial
from flashcore.surveys.cublaslt import unfused_model
from flashcore.surveys.cublaslt.facts import (
    Regret,
    attention_timings,
    batch_points,
    by_case,
    correlation_words,
    facts_of,
    fastest,
    limits,
    mean,
    regrets,
    small_grid,
    smallest_shape,
    transpose_pair,
    workspace_correlation,
)  # fmt: skip
from flashcore.surveys.cublaslt.grid import measured_us, peers_of

NO_SURVEY = "No cuBLASLt survey is in these records; run 'flashcore survey' on a GPU."
PRINTED = {
    "report-qk": {"offered": "8", "workspace": "all 0 KB", "waves": "0.2424", "chosen": "candidate 0"},
    "report-pv": {"offered": "not printed", "workspace": "1024 KB, chosen", "waves": "not printed",
                  "chosen": "candidate 4"},
}  # fmt: skip
"""What the original status report of 2025-10-27 printed (H100 SXM, CUDA 12.4) for its two products."""
PRINTED_TFLOPS = 0.45
"""What it measured for the whole of attention on its workload."""
PRODUCT_WORDS = {"qk": "Q·Kᵀ", "pv": "P·V"}
POLICY_WORDS = {"first": "first of the heuristic", "largest-workspace": "largest workspace"}


def workspace_html(trials: Sequence[Trial]) -> str:
    """Workspace against time: one dot a candidate, its time over that of the fastest candidate of its product."""
    groups = {case: group for case, group in by_case(trials).items() if len(group) > 1}
    if not groups:
        return nothing(NO_SURVEY)
    message = correlation_words(workspace_correlation(trials))
    points = [
        (t.data["workspace_bytes"] / 1024, measured_us(t) / measured_us(fastest(group)), t.data.get("split_k") or 1)
        for group in groups.values()
        for t in group
    ]
    with style():
        figure = Figure(figsize=(6.6, 3.9))
        axes = figure.add_axes((0.115, 0.145, 0.86, 0.79))
        looks = ((False, "one pass", "s1", "o"), (True, "split-K", "s2", "^"))
        for split, words, colour, marker in looks:
            chosen = [p for p in points if (p[2] > 1) == split]
            if chosen:
                (dots,) = axes.plot(
                    [p[0] for p in chosen], [p[1] for p in chosen], marker, color=COLOURS[colour], markersize=6,
                    markerfacecolor="none" if split else COLOURS[colour], label=f"{words}: {len(chosen)} candidates",
                )  # fmt: skip
                with_tips(dots, [f"{p[0]:g} KB of workspace, {p[1]:.2f} times the fastest, {words}" for p in chosen])
        axes.set_xscale("symlog", linthresh=1, base=4)
        axes.set_xlim(-0.3, max(4.0, 3 * max(p[0] for p in points)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0.9, 1.08 * max(p[1] for p in points))
        axes.set_xlabel("Workspace, KB")
        axes.set_ylabel("Time over the fastest")
        axes.legend(frameon=False, loc="upper right", fontsize=FONT_SIZE - 1)
    alt = f"Scatter plot of {len(points)} candidates, time over the fastest of the product against workspace. {message}"
    return titled(figure, "Does workspace predict speed?", message, alt)


def regret_html(trials: Sequence[Trial]) -> str:
    """What each policy of choice costs against the best measured candidate: a dot a product, and a table."""
    found = regrets(trials)
    if not found:
        return nothing(NO_SURVEY)
    rows = [_regret_row(policy, [r for r in found if r.policy == policy]) for policy in POLICY_WORDS]
    rows.append({"Policy": "best measured", "Mean": "1.00 ×", "Worst": "1.00 ×", "At": "every product",
                 "Within 5 %": f"all of {rows[0]['n']}", "n": rows[0]["n"]})  # fmt: skip
    message = "; ".join(f"{r['Policy']}: {r['Mean']} on average, {r['Worst']} at worst" for r in rows[:-1])
    with style():
        figure = Figure(figsize=(6.6, 2.2))
        axes = figure.add_axes((0.30, 0.28, 0.67, 0.66))
        for place, (policy, colour, marker) in enumerate((("first", "s1", "o"), ("largest-workspace", "s2", "^"))):
            ratios = sorted(r.ratio for r in found if r.policy == policy)
            jitter = 0.28 * (np.arange(len(ratios)) % 7 - 3) / 3
            (dots,) = axes.plot(
                ratios, place + jitter, marker, color=COLOURS[colour], markersize=5, markerfacecolor="none"
            )
            with_tips(dots, [f"{POLICY_WORDS[policy]}: {ratio:.2f} times the best" for ratio in ratios])
            middle = mean(ratios)
            axes.plot([middle, middle], [place - 0.4, place + 0.4], color=COLOURS["ink"], linewidth=2)
        axes.set_yticks(range(2), list(POLICY_WORDS.values()))
        axes.set_ylim(1.55, -0.55)
        axes.set_xlim(0.97, 1.05 * max(1.1, *(r.ratio for r in found)))
        axes.tick_params(axis="y", length=0)
        axes.yaxis.grid(False)
        axes.set_xlabel("Time over the best measured; the line is the mean")
    picture = titled(figure, "What a policy of choice costs", f"{message}.", f"Dot plot of regret. {message}.")
    note = (
        "Mean: geometric. Every product counts once. Best measured is what the policy 'measured' takes, after it has "
        "timed every candidate once on this GPU."
    )
    numeric = ["Mean", "Worst", "n"]
    return picture + table_html(
        rows, "Time of each policy's choice over the best candidate", numeric=numeric, note=note
    )


def _regret_row(policy: str, group: Sequence[Regret]) -> dict[str, Any]:
    worst = max(group, key=lambda r: r.ratio)
    near = sum(r.ratio <= 1.05 for r in group)
    return {
        "Policy": POLICY_WORDS[policy], "Mean": f"{mean([r.ratio for r in group]):.2f} ×",
        "Worst": f"{worst.ratio:.2f} ×", "At": worst.case, "Within 5 %": f"{near} of {len(group)}", "n": len(group),
    }  # fmt: skip


HEAT_WORDS = {"first": "yes", "offered": "offered", "none": "no", "refused": "refused", "not known": "?"}
HEAT_LOOKS = {"first": ("s3", 0.40), "offered": ("s1", 0.22), "none": ("s2", 0.30), "refused": ("muted", 0.25),
              "not known": ("muted", 0.05)}  # fmt: skip


def smallest_html(trials: Sequence[Trial]) -> str:
    """Heat map over M and N, one panel a K: does the heuristic's first choice run on Tensor Cores?"""
    grid = small_grid(trials)
    if not grid:
        return nothing(NO_SURVEY)
    shape = smallest_shape(trials)
    message = "No product of the grid gets a Tensor Core kernel as first choice."
    if shape:
        message = (
            f"The smallest product whose first choice uses Tensor Cores is M={shape[0]}, N={shape[1]}, K={shape[2]}."
        )
    figures = []
    for k in sorted({s[2] for s in grid}):
        cells = {(m, n): word for (m, n, depth), word in grid.items() if depth == k}
        counts = {word: sum(w == word for w in cells.values()) for word in HEAT_WORDS}
        said = ", ".join(f"{count} {HEAT_WORDS[word]}" for word, count in counts.items() if count)
        alt = f"Heat map of M by N at K={k}, is the first choice a Tensor Core kernel: {said}. {message}"
        title = f"Tensor Core kernel as first choice, K={k}"
        figures.append(titled(_heat_map(cells), title, f"{said}.", alt))
    words = (
        f"{message} Yes: the heuristic's first choice multiplies on Tensor Cores; offered: only another candidate "
        "does; no: none does; refused: cuBLASLt offers nothing."
    )
    return f'<div class="fc-grid">{"".join(figures)}</div><p class="fc-note">{escape(words)}</p>'


def _heat_map(cells: Mapping[tuple[int, int], str]) -> Figure:
    rows, columns = sorted({m for m, _ in cells}), sorted({n for _, n in cells})
    with style():
        figure = Figure(figsize=(6.6, 1.3 + 0.42 * len(rows)))
        height = 1.3 + 0.42 * len(rows)
        axes = figure.add_axes((0.10, 0.72 / height, 0.88, 1 - 0.85 / height))
        for (m, n), word in cells.items():
            x, y = columns.index(n), rows.index(m)
            colour, strength = HEAT_LOOKS[word]
            axes.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=COLOURS[colour], alpha=strength, linewidth=0)
            axes.text(x + 0.5, y + 0.5, HEAT_WORDS[word], ha="center", va="center", fontsize=FONT_SIZE - 1)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks(np.arange(len(columns)) + 0.5, list(map(str, columns)))
        axes.set_yticks(np.arange(len(rows)) + 0.5, list(map(str, rows)))
        axes.tick_params(length=0)
        axes.grid(False)
        axes.set_xlabel("N, columns of the result")
        axes.set_ylabel("M, rows")
    return figure


def transpose_html(trials: Sequence[Trial]) -> str:
    """K as it lies against a K transposed beforehand, best candidate of each."""
    rows = []
    for name, words in TRANSPOSE_WORDS.items():
        pair = transpose_pair(trials, name)
        if pair is None:
            continue
        as_it_lies, beforehand = map(measured_us, pair)
        rows.append({
            "Product": words, "K as it lies, µs": number(as_it_lies), "K transposed beforehand, µs": number(beforehand),
            "As it lies over beforehand": f"{as_it_lies / beforehand:.2f} ×",
            "Kernels": "the same" if pair[0].data.get("kernel") == pair[1].data.get("kernel") else "different",
        })  # fmt: skip
    if not rows:
        return nothing(NO_SURVEY)
    numeric = ["K as it lies, µs", "K transposed beforehand, µs", "As it lies over beforehand"]
    note = "Fastest candidate of each. The time to transpose K beforehand is not counted."
    return table_html(rows, "Transposed in the product against transposed beforehand", numeric=numeric, note=note)


TRANSPOSE_WORDS = {
    "page": "Q·Kᵀ of one head and page", "batched": "Q·Kᵀ of one page, all heads",
    "row": "Q·Kᵀ over whole rows, four heads"
}  # fmt: skip


def batch_html(trials: Sequence[Trial]) -> str:
    """Batch against loop: what one page's product costs a head, by heads in one launch."""
    rows = []
    for kind, words in PRODUCT_WORDS.items():
        for batch, trial in batch_points(trials, kind).items():
            us = measured_us(trial)
            rows.append({
                "Product": words, "Heads in a launch": batch, "µs a launch": number(us),
                "µs a head": number(us / batch),
                "TFLOPS": number(trial.timing.tflops), "Waves": number(trial.data.get("waves_count")),
                "Kernel": trial.data.get("kernel") or "not seen",
            })  # fmt: skip
    if not rows:
        return nothing(NO_SURVEY)
    numeric = ["Heads in a launch", "µs a launch", "µs a head", "TFLOPS", "Waves"]
    note = "Fastest candidate each. Waves: thread blocks over what the chip holds at once; below 1 it is not full."
    return table_html(rows, "One launch a head against one launch for many", numeric=numeric, note=note)


def report_html(trials: Sequence[Trial], *, gpu: str | None = None) -> str:
    """The original report's exact case beside what it printed."""
    rows = []
    for case, printed in PRINTED.items():
        group = by_case(trials).get(case)
        if not group:
            continue
        facts, words = facts_of(trials, case), PRODUCT_WORDS[case[-2:]]
        best, workspaces = fastest(group), sorted({t.data["workspace_bytes"] for t in group})
        size = "all 0 KB" if workspaces == [0] else f"{_kb(workspaces[0])} to {_kb(workspaces[-1])}"
        waves = [t.data["waves_count"] for t in group]
        tensor = sum(t.data.get("tensor_core") is True for t in group)
        times = [measured_us(t) for t in group]
        prediction = facts.get("prediction") or {}
        for what, then, now in (
            ("candidates offered", printed["offered"], str(facts.get("offered", len(group)))),
            ("workspace", printed["workspace"], size),
            ("waves", printed["waves"], f"{number(min(waves))} to {number(max(waves))}"),
            ("on Tensor Cores", "'no Tensor Cores' assumed" if case == "report-qk" else "'likely' assumed",
             f"{tensor} of {len(group)}, by the kernel's name"),
            ("time", "not measured", f"{number(min(times))} to {number(max(times))} µs"),
            ("chosen, or fastest", printed["chosen"], f"candidate {best.data['rank']}: {best.data.get('kernel')}"),
            ("tile predicted without a GPU", "not asked", str(prediction.get("tile", "not known"))),
        ):  # fmt: skip
            rows.append({"Product": words, "What": what, "The report, 2025-10-27": then, gpu or "Here": now})
    if not rows:
        return nothing(NO_SURVEY)
    timed = {t.backend: t for t in attention_timings(trials, PRESETS["report"])}
    for backend in ("cublaslt-loop", "cublaslt-batched", "cublaslt"):
        if backend in timed:
            speed = f"{number(compare.tflops(timed[backend]))} TFLOPS"
            then = f"{PRINTED_TFLOPS} TFLOPS" if backend == "cublaslt-loop" else "not built"
            rows.append({"Product": "attention", "What": backend, "The report, 2025-10-27": then, gpu or "Here": speed})
    return table_html(
        rows,
        "The case that the October 2025 report measured, then and now",
        note="Then: H100 SXM, CUDA 12.4.",
        stack=True,
    )


def cublas_html(trials: Sequence[Trial]) -> str:
    """cuBLAS without Lt beside the first and the fastest candidate of cuBLASLt."""
    groups, rows = by_case(trials), []
    for case, peer in peers_of(trials).items():
        group = groups.get(case)
        if not group:
            continue
        best = fastest(group)
        same = {True: "the same kernel", False: "another kernel"}[
            peer.data.get("kernel") == group[0].data.get("kernel")
        ]
        seen = peer.data.get("kernel") and group[0].data.get("kernel")
        rows.append({
            "Case": case, "cuBLAS, µs": number(measured_us(peer)), "cuBLASLt first, µs": number(measured_us(group[0])),
            "cuBLASLt best, µs": number(measured_us(best)), "Against the first": same if seen else "kernel not seen",
            "Kernel of cuBLAS": peer.data.get("kernel") or "not seen",
        })  # fmt: skip
    if not rows:
        return nothing("cuBLAS without Lt was not measured in these records; run 'flashcore survey' on a GPU.")
    numeric = ["cuBLAS, µs", "cuBLASLt first, µs", "cuBLASLt best, µs"]
    note = "cuBLAS: cublasGemmStridedBatchedEx with its default algorithm."
    return table_html(rows, "cuBLAS without Lt", numeric=numeric, note=note)


def labels_html(trials: Sequence[Trial]) -> str:
    """Whether the algorithm that was labelled is the one that ran, by the profiler's kernel name."""
    proofs = [t for t in trials if t.kind == "gemm_candidate" and t.data.get("group") == "label-proof"]
    if not proofs:
        return nothing("No label was proven in these records; run 'flashcore survey' on a GPU.")
    rows = [
        {
            "Product": t.data.get("product"), "Policy": t.data.get("policy"), "Tile of the label": t.data.get("tile"),
            "Kernel that ran": t.data.get("kernel") or "not seen",
            "Result": "is the one labelled" if t.status == "ok" else f"IS NOT: {t.reason}",
        }
        for t in proofs
    ]  # fmt: skip
    return table_html(rows, "The algorithm labelled is the one that ran")


# ------------------------------------------------------------------------------------------------ the limit


def limit_html(trials: Sequence[Trial], *, l2_bytes: int | None) -> str:
    """What a model gives the unfused design against what was measured: a dot plot and a table with the terms."""
    problem = PRESETS["report"]
    found = limits(trials, l2_bytes=l2_bytes, problem=problem)
    if not found:
        return nothing("The machine's ceilings are not in these records; run 'flashcore survey' on a GPU.")
    ceilings = unfused_model.ceilings_of(trials, problem.dtype)
    cut, best = unfused_model.best(problem, ceilings, l2_bytes=l2_bytes)
    far = unfused_model.through_memory(problem, ceilings)
    rows = [_limit_row(one.backend, one.prediction, one.measured_tflops) for one in found]
    rows.append(_limit_row("best cut, scores in L2", best, None))
    rows.append(_limit_row("best cut, scores through memory", far, None))
    message = (
        f"By this model {number(best.tflops)} TFLOPS, with {unfused_model.cut_in_words(cut)}, "
        f"bound by {unfused_model.in_words(best)}; {number(far.tflops)} TFLOPS when scores go through device memory."
    )
    fused = [
        compare.tflops(t) for t in attention_timings(trials, problem) if compare.role(t) == "peer" and compare.tflops(t)
    ]  # fmt: skip
    entries = [(o.backend, o.prediction.tflops, o.measured_tflops) for o in found]
    entries += [("best cut", best.tflops, None)]
    with style():
        height = 1.0 + 0.46 * len(entries)
        figure = Figure(figsize=(6.6, height))
        axes = figure.add_axes((0.24, 0.62 / height, 0.71, 1 - 0.95 / height))
        for place, (_, limit, reached) in enumerate(entries):
            axes.plot([limit], [place], "|", color=COLOURS["ink"], markersize=20, markeredgewidth=2.4)
            if reached:
                axes.plot([reached, limit], [place, place], color=COLOURS["muted"], linewidth=1.2)
                (dot,) = axes.plot([reached], [place], "o", color=COLOURS["s1"], markersize=8)
                with_tips(
                    dot, [f"{entries[place][0]}: {number(reached)} TFLOPS measured, {number(limit)} by the model"]
                )
        if fused:
            axes.axvline(max(fused), color=COLOURS["p1"], linewidth=1.4, linestyle=(0, (4, 2)))
            axes.annotate("best fused peer", xy=(max(fused), 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                          textcoords="offset points", ha="right", va="bottom", color=COLOURS["p1"],
                          annotation_clip=False)  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks(range(len(entries)), [named(name) for name, *_ in entries])
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.yaxis.grid(False)
        axes.set_xlabel("TFLOPS, logarithmic: dot measured, bar the model")
    where = problem.label().replace(",", ", ")
    said = "; ".join(
        f"{name} reaches {number(reached)} of {number(limit)}" for name, limit, reached in entries if reached
    )
    alt = f"Dot plot, TFLOPS measured against the model at {where}. {message} {said or 'Nothing was measured'}."
    note = (
        "Model: the kernels of a group and page run one after the other; each takes at least the longest of its bytes "
        "over the measured bandwidth, its operations over the measured product speed, and one graph node. "
        "Exponentials are left out. Bandwidths and product speeds are those that plain kernels reached in this run."
    )
    numeric = ["Model, TFLOPS", "Measured, TFLOPS", "Share of the model", "Launches", "Device memory, GB", "L2, GB"]
    table = table_html(rows, f"The unfused design at {where}, by a model and measured", numeric=numeric, note=note)
    return titled(figure, "What a model gives this design", message, alt) + table


def _limit_row(name: str, prediction: unfused_model.Prediction, reached: float | None) -> dict[str, Any]:
    share = prediction.terms_us[prediction.binds] / prediction.time_us
    binds = f"{prediction.binds}, {100 * share:.0f} %"
    return {
        "Cut": name, "Page": prediction.page_size, "Heads at once": prediction.heads, "Launches": prediction.launches,
        "Device memory, GB": number(prediction.memory_bytes / 1e9), "L2, GB": number(prediction.l2_bytes / 1e9),
        "Model, TFLOPS": number(prediction.tflops), "What binds": binds,
        "Measured, TFLOPS": number(reached) if reached else "not measured",
        "Share of the model": f"{100 * reached / prediction.tflops:.0f} %" if reached else "–",
    }  # fmt: skip


def _kb(size: int) -> str:
    return "0 KB" if size == 0 else f"{size} bytes" if size < 1024 else f"{size / 1024:,.0f} KB"
