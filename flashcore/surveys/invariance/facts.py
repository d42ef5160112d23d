"""Read records of kind `invariance`: tables and a sentence for a reader, without torch.

A record is one implementation in one mode. Its `data` hold `mode`, `cases`, `kept`, `broken`, `subjects` (sequences),
`settings`, `asked`, `stopped`, `pairs` ([kept, all] by kinds of ways), `others` (the same, of cases in which rows
beside had other queries), `breaks` (`pair`, `said`, and `line`: Python that asks it again), `over_pages`, `sources`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

from flashcore.records import Trial
from flashcore.tables import WORDS

if TYPE_CHECKING:
    import pandas

KIND = "invariance"
KINDS = ("alone", "batch", "chunks", "pages")
PAIRS = tuple(", ".join(pair) for pair in combinations_with_replacement(KINDS, 2))
PROMISE = (
    "That mode promises that the bits of a row do not depend on who shares the call, how a prefill is cut into chunks, "
    "or where pages lie"
)
COMPARED = (
    "A case is one sequence computed in two ways, and kept where all bits of out and lse are equal. Alone: a call of "
    "its own, also again, with other strides, and with other queries in the rows beside it. Batch: among 1 to "
    "255 others, dense, padded or ragged. Chunks: later chunks of a prompt, and decode steps. Pages: K and V in pages "
    "of 16 to 256 tokens, anywhere in a pool, some shared"
)


def records_of(trials: Iterable[Trial]) -> list[Trial]:
    """The records of this kind; of an implementation and mode that was asked again the last."""
    last = {(t.backend, t.variant): t for t in trials if t.kind == KIND}
    return sorted(last.values(), key=lambda t: (t.variant != "invariant", t.data.get("role") != "ours"))


def table(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row an implementation and mode: cases kept and asked, and of each pair of ways; or why there are none."""
    import pandas

    rows = []
    for trial in records_of(trials):
        data = trial.data
        row = {"backend": str(trial.backend), "mode": str(data.get("mode", trial.variant)),
               "kept": _share(data.get("kept", 0), data.get("cases", 0)),
               "sequences": data.get("subjects", 0)}  # fmt: skip
        for pair in PAIRS:
            row[pair] = _share(*_counts(data.get("pairs", {}).get(pair)))
        row["result"] = _result(trial)
        rows.append(row)
    columns = ["backend", "mode", "kept", "sequences", *PAIRS, "result"]
    frame = pandas.DataFrame(rows, columns=columns)
    empty = [pair for pair in PAIRS if not len(frame) or (frame[pair] == "").all()]
    return frame.drop(columns=empty)


def breaks_table(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row a break that was made smaller: whose, of which ways, and the line of Python that asks it again."""
    import pandas

    rows = [
        {"backend": str(t.backend), "mode": str(t.data.get("mode", t.variant)), "ways": str(found.get("pair", "")),
         "what differs": str(found.get("said", "")), "to ask it again": str(found.get("line", ""))}
        for t in records_of(trials) for found in t.data.get("breaks", [])
    ]  # fmt: skip
    return pandas.DataFrame(rows, columns=["backend", "mode", "ways", "what differs", "to ask it again"])


def sentence(trials: Iterable[Trial]) -> str:
    """How many cases each keeps, those that promise it first, as one line."""
    found = records_of(trials)
    return "; ".join(filter(None, [promised(found), unpromised(found)]))


def promised(trials: Iterable[Trial]) -> str:
    """How many cases each keeps in the mode that promises it, as one line."""
    found = records_of(trials)
    if not found:
        return "no case was asked"
    kept = [f"{t.backend} keeps {_of(t)} cases in the batch-invariant mode" for t in _asked(found, "invariant")]
    return "; ".join(kept) or "nothing here promises the same bits"


def unpromised(trials: Iterable[Trial]) -> str:
    """How many cases each keeps though nobody promised it, as one line; empty where nobody was asked."""
    kept = [f"{t.backend} {_of(t)}" for t in _asked(records_of(trials), "ordinary")]
    return f"in the ordinary mode, which promises nothing: {', '.join(kept)}" if kept else ""


def _asked(found: Iterable[Trial], mode: str) -> list[Trial]:
    return [t for t in found if t.data.get("mode") == mode and t.data.get("cases")]


def _of(trial: Trial) -> str:
    return f"{trial.data['kept']:,} of {trial.data['cases']:,}"


def _share(kept: Any, count: Any) -> str:
    return f"{kept:,} of {count:,}" if count else ""


def _counts(pair: Any) -> tuple[int, int]:
    return (int(pair[0]), int(pair[1])) if pair else (0, 0)


def _result(trial: Trial) -> str:
    if trial.status == "ok":
        told = "all kept" if not trial.data.get("broken") else "breaks some, and promises nothing"
        return told if trial.data.get("stopped", "all were asked") == "all were asked" else f"{told}; then " + str(
            trial.data["stopped"])  # fmt: skip
    word = "BROKEN" if trial.status == "failed" else WORDS[trial.status]
    return f"{word}: {trial.reason}" if trial.reason else word
