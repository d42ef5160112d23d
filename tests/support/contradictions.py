"""Read a finished page beside its records, and find what its own figures contradict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from bs4 import BeautifulSoup

from flashcore.decision import compare
from flashcore.records import Trial

FIGURE = r"[−+-]?\d[\d,]*(?:\.\d+)?(?:e[−+-]?\d+)?"
ABSOLUTE = re.compile(
    r"no kernel can|can ?not be (?:faster|exceeded|beaten)|can't be|nobody can|impossible|at best\b|\broof\b|"
    r"a claim above|faster than (?:this|the hardware)|theoretical(?:ly)? max|upper bound of the machine",
    re.IGNORECASE,
)
"""Words that promise what a measurement cannot: that nothing will ever be beyond it."""
LIMIT = re.compile(
    rf"(?<!no )\b(?:limit|maximum|ceiling|the most|peak)\b[^.;]{{0,80}}?(?P<value>{FIGURE}) TFLOPS", re.IGNORECASE
)
DIGITS = 6e-3
"""How far a figure of three digits may lie from what it tells."""


def contradictions(page: str, trials: Sequence[Trial]) -> list[str]:
    """Sentences on whatever the page says and its records, or its other figures, contradict; empty for a sound page.

    Parameters
    ----------
    page
        The HTML as it is sent.
    trials
        The records that the page was made from.
    """
    soup = BeautifulSoup(page, "html.parser")
    for gone in soup(["script", "style"]):
        gone.decompose()
    return [*_words(soup), *_limits(soup, trials), *_shares(soup), *_errors(soup, trials),
            *_errors_in_words(soup, trials), *_fastest(soup, trials), *_cards(soup, trials)]  # fmt: skip


def _number(text: str) -> float:
    found = re.match(FIGURE, text.strip())
    return float(found[0].replace(",", "").replace("−", "-")) if found else math.nan


def _words(soup) -> Iterator[str]:
    text = " ".join(soup.get_text(" ").split()) + " ".join(e["aria-label"] for e in soup.select("svg[aria-label]"))
    for found in ABSOLUTE.finditer(text):
        yield f"absolute: …{text[max(0, found.start() - 40) : found.end() + 40]}…"


def _limits(soup, trials: Sequence[Trial]) -> Iterator[str]:
    """A speed called a limit, below a speed that was measured and right."""
    speeds = [rate for t in trials if t.kind == "attention_timing" and (rate := compare.tflops(t)) is not None]
    quoted = [table for table in soup.select("table") if table.find("th", string="Claim")]  # what others have claimed
    blocks = [
        block for block in soup.find_all(["p", "li", "td", "th", "figcaption", "caption"])
        if not any(parent in quoted for parent in block.parents if parent.name == "table")
    ]  # fmt: skip
    texts = (" ".join(block.get_text(" ").split()) for block in blocks)  # a sentence never goes on in another block
    for found in (match for text in texts for match in LIMIT.finditer(text)):
        if speeds and _number(found["value"]) < max(speeds) * (1 - DIGITS):
            yield f"limit: '{found[0]}', and {max(speeds):.0f} TFLOPS were measured"


def _rows(table) -> list[dict[str, str]]:
    heads = [" ".join(th.get_text().split()) for th in table.select("thead th")]
    return [
        dict(zip(heads, (" ".join(cell.get_text(" ").split()) for cell in tr.find_all(["th", "td"])), strict=False))
        for tr in table.select("tbody tr")
    ]


def _shares(soup) -> Iterator[str]:
    for table in soup.select("table"):
        for row in _rows(table):
            for name, value in row.items():
                if name.startswith("Share of the") and _number(value) > 100:
                    yield f"share: {value} of a whole in '{name}'"


def _errors(soup, trials: Sequence[Trial]) -> Iterator[str]:
    """Largest error and share of the bound against every check of that backend."""
    for table in soup.select("table"):
        for row in _rows(table):
            if "Largest error" not in row:
                continue
            judged = [
                t.correctness for t in trials
                if t.kind == "correctness" and t.backend == row["Backend"] and t.correctness is not None
                and compare.passed(t) is not None
            ]  # fmt: skip
            if not judged or any(math.isnan(c.max_abs_error) for c in judged):
                continue
            largest, share = max(c.max_abs_error for c in judged), max(c.max_abs_error / c.bound for c in judged)
            if _number(row["Largest error"]) < largest * (1 - DIGITS):
                yield f"error: {row['Backend']} shows {row['Largest error']}, and {largest:.3g} is in the records"
            if _number(row["Share of its bound"]) < 100 * share - 0.51:
                yield f"share: {row['Backend']} shows {row['Share of its bound']}, and {100 * share:.0f} % is recorded"


def _errors_in_words(soup, trials: Sequence[Trial]) -> Iterator[str]:
    """'Nearest its bound is 43 % of it, and the largest is 0.0139', against every check of every backend."""
    judged = [
        t.correctness for t in trials
        if t.kind == "correctness" and t.backend and t.correctness is not None and compare.passed(t) is not None
    ]  # fmt: skip
    said = re.compile(rf"nearest its bound is ({FIGURE}) % of it.*the largest is ({FIGURE})")
    for found in filter(None, (said.search(p.get_text()) for p in soup.select("p"))):
        if not judged or any(math.isnan(c.max_abs_error) for c in judged):
            continue
        largest, share = max(c.max_abs_error for c in judged), max(c.max_abs_error / c.bound for c in judged)
        if _number(found[2]) < largest * (1 - DIGITS) or _number(found[1]) < 100 * share - 0.51:
            yield f"error: '{found[0]}', and {largest:.3g} and {100 * share:.0f} % are in the records"


def _fastest(soup, trials: Sequence[Trial]) -> Iterator[str]:
    """'X is fastest with N µs', against every timing of that problem."""
    for caption in soup.select("figcaption"):
        label, text = caption.find("strong"), caption.get_text(" ")
        found = re.search(rf"is fastest with ({FIGURE}) µs", text)
        if label is None or found is None:
            continue
        times = [
            latency for t in trials
            if t.problem is not None and t.problem.label() == label.get_text().replace(" ", "")
            and t.backend not in compare.FOR_CHECKS and (latency := compare.latency_us(t)) is not None
        ]  # fmt: skip
        if times and _number(found[1]) > min(times) * (1 + DIGITS):
            yield f"fastest: '{found[0]}', and {min(times):.3g} µs were measured"


def _cards(soup, trials: Sequence[Trial]) -> Iterator[str]:
    """A card of our speed against every kernel of ours, on its problem and on all; no variant for checks is named.

    A card is of the ordinary mode: what was timed with `batch_invariant` stands in a table of its own.
    """
    rates = [
        (rate, t.problem.label().replace(",", ", ")) for t in trials
        if t.kind == "attention_timing" and compare.contends(t) and compare.in_ordinary_mode(t)
        and (rate := compare.tflops(t)) is not None
    ]  # fmt: skip
    for card in soup.select(".fc-cards li"):
        title, where = card.find("h2").get_text(), card.select_one(".fc-where").get_text()
        if any(name in card.get_text() for name in compare.FOR_CHECKS):
            yield f"variant: '{title}' names one that is for checks"
        if "speed" not in title.lower() or "TFLOPS" not in card.select_one(".fc-value").get_text() or not rates:
            continue
        value, highest = _number(card.select_one(".fc-value").get_text()), max(rates)[0]
        there = [rate for rate, label in rates if f", {label}, " in f", {where}, "]
        if there and value < max(there) * (1 - DIGITS):
            yield f"best: {value} TFLOPS is shown as the best, and {max(there):.0f} were measured"
        if value < highest * (1 - DIGITS):
            if "best" in title.lower() or "workload that decides" not in title or not there:
                yield f"workload: {value} TFLOPS, no workload that decides is named, and {highest:.0f} were measured"
            elif not any(
                abs(_number(f) / highest - 1) < DIGITS for f in re.findall(rf"({FIGURE}) TFLOPS", _below(card))
            ):
                yield f"workload: {value} TFLOPS without the {highest:.0f} at another problem"


def _below(card) -> str:
    """What a card says under its figure."""
    return " ".join(line.get_text(" ") for line in card.select("p:not(.fc-value)"))
