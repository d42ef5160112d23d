"""Tables for a page: records in, accessible HTML out. States are words, numbers carry units and sensible digits."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import escape

from flashcore.decision import compare
from flashcore.decision.compare import is_figure, number
from flashcore.records import Trial

AGAINST_PEERS = "Our best backend against the best peer, by problem"
SMALL = "Small problems, every backend"
PEAK, MEMORY = "Of peak", "Of memory"
MOST_REASONS = 2
"""Why something was not checked, in a line; more are folded."""
AGREEMENT = "Agreement with the float64 reference"
"""Captions of tables whose rows are linked to."""


def table_html(
    rows: Sequence[Mapping[str, Any]],
    caption: str,
    *,
    numeric: Sequence[str] = (),
    note: str | None = None,
    stack: bool = False,
    css: str = "",
) -> str:
    """Rows as an HTML table: caption, column scopes, the first column as row headers.

    Parameters
    ----------
    rows
        One mapping a row, all with the keys of the first one, which name the columns. Text is escaped,
        `markupsafe.Markup` is not. (No data frame: pandas may turn markup into plain strings.)
    numeric
        Columns to align on the right.
    note
        A line under the table.
    stack
        On a narrow screen each row becomes a block with the column names beside its cells.
    """
    names = ("table", "rowgroup", "row", "cell", "rowheader", "columnheader")
    role = {name: f' role="{name}"' if stack else "" for name in names}  # a table laid out as blocks loses its own
    columns = _filled(rows)
    align = {c: ' class="num"' if c in numeric else "" for c in columns}
    head = "".join(f'<th scope="col"{role["columnheader"]}{align[c]}>{escape(c)}</th>' for c in columns)
    lines = []
    for row in rows:
        values = [row[c] for c in columns]
        cells = [f'<th scope="row"{role["rowheader"]}{align[columns[0]]}>{escape(_cell(values[0]))}</th>']
        for column, value in zip(columns[1:], values[1:], strict=True):
            cells.append(f'<td{role["cell"]}{align[column]} data-label="{escape(column)}">{escape(_cell(value))}</td>')
        lines.append(f"<tr{role['row']}>{''.join(cells)}</tr>")
    table = (
        f"<table{role['table']}><caption>{escape(caption)}</caption>"
        f"<thead{role['rowgroup']}><tr{role['row']}>{head}</tr></thead>"
        f"<tbody{role['rowgroup']}>{''.join(lines)}</tbody></table>"
    )
    classes = " ".join(filter(None, ["fc-table", "stack" if stack else "scroll", css]))
    focus = "" if stack else f' tabindex="0" role="group" aria-label="{escape(caption)}"'
    below = f'<p class="fc-note">{escape(note)}</p>' if note else ""
    return f'<div class="{classes}"{focus}>{table}</div>{below}'


def _filled(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that say something in at least one row; the first one names the rows and stays."""
    return [c for i, c in enumerate(rows[0]) if i == 0 or any(_cell(row[c]) not in ("", "–") for row in rows)]


def fold(summary: str, content: str) -> str:
    """Content that shows only its summary until the reader asks for it."""
    return f'<details class="fc-fold inline"><summary>{escape(summary)}</summary>{content}</details>'


def nothing(sentence: str) -> str:
    """What stands where a plot or table would, when there are no records for it."""
    return f'<p class="fc-none">{escape(sentence)}</p>'


class Unmeasured(str):
    """The sentence on a part that no record holds; several of a section become one by `gathered`."""

    parts: tuple[str, ...]
    command: str

    def __new__(cls, *parts: str, command: str) -> Unmeasured:
        """Name the parts as they go on after a colon, and the command that measures them."""
        found = super().__new__(
            cls, nothing(f"Not measured yet: {'; '.join(parts)}. Run '{command}' on an H100 or H200.")
        )
        found.parts, found.command = parts, command
        return found


def gathered(parts: Iterable[str]) -> str:
    """A section's parts in their order; behind them one sentence for each command that would measure what lacks."""
    parts = list(parts)
    lacking: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        if isinstance(part, Unmeasured):
            lacking[part.command] += part.parts
    there = [part for part in parts if not isinstance(part, Unmeasured)]
    return "".join([*there, *(Unmeasured(*names, command=command) for command, names in lacking.items())])


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not known"
    return value


def spaced(problem: Any) -> str:
    """A problem's label with spaces, so that a line can break in it."""
    return problem.label().replace(",", ", ")


def with_version(trial: Trial) -> str:
    """The backend that was timed, and beside a peer's name the version of the software that it calls."""
    version = trial.data.get("version")
    return f"{trial.backend} ({version})" if version else str(trial.backend)


def by_problem(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Timings by the label of their problem, in the order first seen; of a backend's several timings the last."""
    groups: dict[str, dict[str | None, Trial]] = defaultdict(dict)
    for trial in trials:
        if trial.kind == "attention_timing" and trial.problem is not None:
            groups[spaced(trial.problem)][trial.backend] = trial
    return {label: list(group.values()) for label, group in groups.items()}


def times_table(trials: Sequence[Trial]) -> str:
    """One row a problem: our fastest backend, the fastest peer of the same round, and the ratio with its interval.

    What was timed with `batch_invariant` has a table of its own (`invariance_views`).
    """
    rows = []
    for problem, group in by_problem([t for t in trials if compare.in_ordinary_mode(t)]).items():
        mine = [t for t in group if compare.contends(t) and compare.latency_us(t) is not None]
        if not mine:
            continue
        ours = min(mine, key=compare.latency_us)
        found = compare.ratio_to_best_peer(ours, group)
        bounds = found.interval if found else None
        rows.append(
            {
                "Problem": problem,
                "Ours": ours.backend,
                "µs": number(compare.latency_us(ours)),
                "TFLOPS": number(compare.tflops(ours)),
                "Best peer": with_version(found.other) if found else "none in this round",
                "Peer µs": number(compare.latency_us(found.other)) if found else "–",
                "Peer TFLOPS": number(compare.tflops(found.other)) if found else "–",
                "Ratio": f"{number(found.value)} ×" if found else "–",
                "Within": compare.between(bounds) if bounds else "not known",
                "In words": found.in_words() if found else "not compared",
                PEAK: percent(ours.timing.more("peak_share")),
                MEMORY: percent(ours.timing.more("memory_share")),
            }
        )
    if not rows:
        return nothing("No timing of ours is in these records.")
    numeric = ["µs", "TFLOPS", "Peer µs", "Peer TFLOPS", "Ratio", "Within", PEAK, MEMORY]
    note = (
        "Medians. Ratio: the peer's latency over ours, sample by sample in the same round; above 1 ours is faster. "
        f"Within: holds the true ratio in {compare.CONFIDENCE:g} of 100 cases; one that includes 1 is no difference."
    )
    if any(row[name] != "–" for row in rows for name in (PEAK, MEMORY)):
        note += (
            " Of peak, of memory: our share of what the data sheet says of matrix products, at the clock seen during "
            "the timing, and of the memory's speed."
        )
    return table_html(
        rows, AGAINST_PEERS, numeric=numeric, note=" ".join(filter(None, (note, clocks_sentence(trials))))
    )


def percent(share: Any) -> str:
    """A share that a record states, in percent; a dash for what is no figure."""
    return f"{100 * share:.0f} %" if is_figure(share) else "–"


def clocks_sentence(trials: Sequence[Trial]) -> str:
    """How far graph replay and CUPTI, two clocks that know nothing of each other, agree; empty where one was read."""
    shares = []
    for trial in trials:
        latency = compare.latency_us(trial)
        cupti = trial.timing.more("cupti_us") if latency else None
        if is_figure(cupti) and cupti > 0:
            shares.append(cupti / latency)
    if not shares:
        return ""
    low, high = min(shares), max(shares)
    many = f"each of {len(shares)} calls" if len(shares) > 1 else "a call"
    within = f"{number(low)} to {number(high)}" if number(low) != number(high) else number(low)
    return (
        f"By CUPTI, a second clock, the kernels of {many} take {within} times what the call takes in a graph, where "
        "the step from one kernel to the next counts too and caches may be warmer."
    )


def latency_table(trials: Sequence[Trial]) -> str:
    """One row a problem and backend: median, its interval, samples, and the host time of one eager call."""
    rows = []
    for problem, group in by_problem(trials).items():
        for trial in sorted((t for t in group if compare.latency_us(t) is not None), key=compare.latency_us):
            bounds = compare.interval_us(trial)
            launch = trial.timing.more("launch_us")
            rows.append(
                {
                    "Problem": problem,
                    "Backend": with_version(trial),
                    "µs a call": number(compare.latency_us(trial)),
                    "Median within, µs": compare.between(bounds) if bounds else "not known",
                    "Samples": len(compare.samples_us(trial)),
                    "Eager call, host µs": number(launch) if isinstance(launch, int | float) else "not measured",
                    "Method": f"{trial.timing.method}, L2 {trial.timing.l2 or 'not stated'}".replace("_", " "),
                }
            )
    if not rows:
        return nothing("No timing of a small problem is in these records.")
    numeric = ["µs a call", "Median within, µs", "Samples", "Eager call, host µs"]
    return table_html(rows, SMALL, numeric=numeric)


def correctness_table(trials: Sequence[Trial]) -> str:
    """One row a backend: how many checks passed, the error nearest its bound and its share, and the largest one.

    Those that could not be checked at all stand below the table, by reason.
    """
    by_backend: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        if trial.kind == "correctness" and trial.backend:
            by_backend[trial.backend].append(trial)
    if not by_backend:
        return nothing("No correctness check is in these records.")
    reasons: dict[str, list[str]] = defaultdict(list)
    for backend, group in by_backend.items():
        if not any(compare.passed(t) is not None or t.status == "error" for t in group):
            reasons[next((t.reason for t in group if t.reason), "no reason recorded")].append(backend)
    gone = {backend for names in reasons.values() for backend in names}
    rows = [_correctness_row(backend, group) for backend, group in by_backend.items() if backend not in gone]
    unchecked = _unchecked(reasons)
    if not rows:
        return unchecked
    numeric = ["Checks passed", "Not supported", "Elements compared", NEAREST, "Share of its bound", LARGEST]
    note = (
        "Every element of out and lse is compared. Each problem has its own bound, so the error nearest its bound and "
        "the largest one may be of different problems. The bound: twice the error the same maths makes in torch at "
        "that precision, plus a rounding term. A NaN fails."
    )
    return table_html(rows, AGREEMENT, numeric=numeric, note=note) + unchecked


def correctness_sentence(trials: Sequence[Trial]) -> str:
    """How many checks are right, whose error is nearest its bound, and the largest error; empty where none was made."""
    checks = [t for t in trials if t.kind == "correctness" and t.backend]
    judged = [t for t in checks if compare.passed(t) is not None]
    if not judged:
        return ""
    count, many = len(judged), len({t.backend for t in judged})
    of = f"check{'s' if count != 1 else ''} of {many} implementation{'s' if many != 1 else ''}"
    wrong: dict[str, int] = defaultdict(int)
    for trial in judged:
        if compare.passed(trial) is False:
            wrong[trial.backend] += 1
    told = [f"All {count:,} {of} are right" if count != 1 else f"The one {of} is right"]
    if wrong:
        names = ", ".join(f"{backend} in {bad:,}" for backend, bad in wrong.items())
        told = [f"{sum(wrong.values()):,} of {count:,} {of} are WRONG: {names}"]
    if broken := sum(t.status == "error" for t in checks):
        told.append(f"{broken:,} more did not finish")
    measured = [t for t in judged if t.correctness is not None]
    if measured:
        nearest, largest = max(measured, key=_share_of_bound), max(measured, key=_error)
        told.append(
            f"The error nearest its bound is {_of_bound(_share_of_bound(nearest))} of it ({nearest.backend}"
            f"{f' at {spaced(nearest.problem)}' if nearest.problem else ''}), and the largest is "
            f"{number(largest.correctness.max_abs_error)} ({largest.backend})"
        )
    return f"{'. '.join(told)}."


def _unchecked(reasons: Mapping[str, Sequence[str]]) -> str:
    """Who was not checked and why, as a line, or folded where it would be a long one; empty for nobody."""
    if not reasons:
        return ""
    if len(reasons) <= MOST_REASONS:
        named = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        return f'<p class="fc-note">{escape(f"Not checked: {named}.")}</p>'
    count = sum(map(len, reasons.values()))
    rows = [{"Not checked": ", ".join(names), "Why": reason} for reason, names in reasons.items()]
    table = table_html(rows, "What was not checked", stack=True)
    return fold(f"{count} that were not checked, and why", table)


def _correctness_row(backend: str, group: Sequence[Trial]) -> dict[str, Any]:
    outcomes = [compare.passed(t) for t in group]
    right, wrong = outcomes.count(True), outcomes.count(False)
    broken = sum(t.status == "error" for t in group)
    judged = [t for t in group if compare.passed(t) is not None and t.correctness is not None]
    nearest = max(judged, key=_share_of_bound, default=None)
    largest = max(judged, key=_error, default=None)
    if wrong:
        result = f"WRONG in {wrong} of {right + wrong}"
    elif broken:
        result = f"{broken} did not finish"
    else:
        result = "all right"
    return {
        "Backend": backend,
        "Result": result,
        "Checks passed": f"{right} of {right + wrong + broken}",
        "Not supported": sum(t.status == "unsupported" for t in group),
        "Elements compared": f"{sum(t.correctness.checked for t in judged):,}",
        NEAREST: number(nearest.correctness.max_abs_error) if nearest else "–",
        "Share of its bound": _of_bound(_share_of_bound(nearest)) if nearest else "–",
        "At": spaced(nearest.problem) if nearest and nearest.problem else "–",
        LARGEST: number(largest.correctness.max_abs_error) if largest else "–",
    }


NEAREST, LARGEST = "Error nearest its bound", "Largest error"


def _of_bound(share: float) -> str:
    return f"{100 * share:.0f} %" if math.isfinite(share) else "beyond any"


def _error(trial: Trial) -> float:
    error = trial.correctness.max_abs_error
    return math.inf if math.isnan(error) else error


def _share_of_bound(trial: Trial) -> float:
    found = trial.correctness
    share = found.max_abs_error / found.bound if found.bound else math.inf
    return math.inf if math.isnan(share) else share


def findings_table(trials: Sequence[Trial]) -> str:
    """One row a wrong or broken check, with its first bad element; empty text when there is none."""
    rows = []
    for trial in trials:
        wrong = compare.passed(trial) is False
        if trial.kind != "correctness" or not (wrong or trial.status == "error"):
            continue
        found = trial.correctness
        first = found.first_bad if found else None
        rows.append(
            {
                "Backend": trial.backend,
                "Problem": spaced(trial.problem) if trial.problem else "–",
                "What": "wrong" if wrong else "did not finish",
                "Bad elements": f"{found.num_bad:,} of {found.checked:,}" if found else "–",
                "First bad": ", ".join(f"{k} {v}" for k, v in first.items())
                if first
                else compare.first_line(trial.reason),
            }
        )
    return table_html(rows, "Checks that failed or did not finish", numeric=["Bad elements"]) if rows else ""


def build_table(trials: Sequence[Trial]) -> str:
    """One row a compiled variant without trace: registers, spills, shared memory, Tensor Core instructions."""
    rows = []
    for trial in trials:
        data = trial.data
        if trial.kind != "build" or data.get("trace"):
            continue
        tensor = data.get("tensor_instructions")
        words = "not disassembled"
        if isinstance(tensor, Mapping):
            words = ", ".join(f"{count} {name}" for name, count in tensor.items()) or "none"
        fine = trial.status == "ok"
        rows.append(
            {
                "Kernel": data.get("kernel"),
                "head_dim": data.get("head_dim"),
                "dtype": data.get("dtype"),
                "Registers a thread": data.get("registers") if fine else "–",
                "Spilled, bytes": data.get("spill_bytes") if fine else "–",
                "Shared memory, bytes": _thousands(data.get("shared_bytes")) if fine else "–",
                "Tensor Core instructions": words if fine else f"did not compile: {compare.first_line(trial.reason)}",
                "Source hash": (trial.source_hash or "not known")[:16],
            }
        )
    if not rows:
        return nothing("No build is in these records; run 'flashcore build'.")
    numeric = ["head_dim", "Registers a thread", "Spilled, bytes", "Shared memory, bytes"]
    note = (
        "Static shared memory; what a launch asks for comes on top. "
        "HMMA is a warp's matrix product, HGMMA a warpgroup's."
    )
    return table_html(rows, "Compiled kernels", numeric=numeric, note=note)


def ceilings_table(trials: Sequence[Trial]) -> str:
    """One row a ceiling: copy bandwidth, matrix products, launch overhead."""
    rows = [
        {
            "Plain kernel": str(t.data.get("name", "–")).replace("_", " "),
            "Measured": number(t.data["value"]) if is_figure(t.data.get("value")) else "not a number",
            "Unit": "µs" if t.data.get("unit") == "us" else str(t.data.get("unit", "–")),
            "How": t.data.get("method", "not recorded"),
        }
        for t in trials
        if t.kind == "ceiling" and t.status == "ok"
    ]
    if not rows:
        return nothing("No plain kernel was measured in these records.")
    return table_html(rows, "What plain kernels reached on this machine", numeric=["Measured"], stack=True)


ENVIRONMENT_ROWS = {
    "gpu": "GPU",
    "compute_capability": "Compute capability",
    "sm_count": "Streaming multiprocessors",
    "memory_bytes": "GPU memory",
    "l2_bytes": "L2 cache",
    "driver": "Driver",
    "cuda_driver": "CUDA of the driver",
    "cuda_runtime": "CUDA runtime",
    "cublaslt": "cuBLASLt",
    "cudnn": "cuDNN",
    "nvrtc": "NVRTC",
    "torch": "torch",
    "cupy": "CuPy",
    "python": "Python",
    "platform": "Platform",
    "cpu": "CPU",
    "cpu_count": "CPU cores",
    "sm_clock_mhz": "SM clock, MHz",
    "memory_clock_mhz": "Memory clock, MHz",
    "temperature_c": "Temperature, °C",
    "power_w": "Power, W",
    "throttle_reasons": "Held down by",
}


CODED = {"cudnn": (10_000, 100), "cublaslt": (10_000, 100), "cuda_driver": (1000, 10)}
"""Versions that come as one number, and what it multiplies major and minor with.

Source: cudnn_version.h, cublas_api.h and cuda.h.
"""
LAST_DIGIT = 10
"""Where a minor version is counted in tens, no patch is counted."""


def version_words(name: str, value: Any) -> str:
    """The version of what an environment names, as people write it: cuDNN's 91900 is 9.19.0."""
    major, minor = CODED[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < major:
        return str(value)
    last = value % minor
    return f"{value // major}.{value % major // minor}" + (f".{last}" if last or minor > LAST_DIGIT else "")


def environment_table(environment: Mapping[str, Any]) -> str:
    """What `environment.json` says of the machine; state that moves (clocks, heat) before and after."""
    before = environment.get("before") if isinstance(environment.get("before"), Mapping) else {}
    after = environment.get("after") if isinstance(environment.get("after"), Mapping) else {}
    rows = []
    for name in [*ENVIRONMENT_ROWS, *(k for k in before if k not in ENVIRONMENT_ROWS and k != "uuid")]:
        first = _fact(name, before.get(name))
        then = _fact(name, after.get(name)) if after else "not recorded"
        if first == "not known" and then in ("not known", "not recorded"):
            continue
        title = ENVIRONMENT_ROWS.get(name, name.replace("_", " "))
        rows.append({"Fact": title, "Before": first, "After": "the same" if then == first else then})
    if not rows:
        return nothing("The run did not record its machine.")
    return table_html(rows, "Machine, before and after the run", css="fc-facts")


def _fact(name: str, value: Any) -> str:
    if value is None:
        return "not known"
    if name == "throttle_reasons" and not value:
        return "nothing"
    if name in CODED:
        return version_words(name, value)
    if name.endswith("_bytes") and isinstance(value, int | float):
        return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
    if isinstance(value, Mapping):
        return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in value.items() if v is not None) or "not known"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return number(value) if isinstance(value, float) else str(value)


def _thousands(value: Any) -> Any:
    return f"{value:,}" if isinstance(value, int) else value
