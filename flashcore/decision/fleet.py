"""Say which cards are off their fleet, from records of kind `fleet`: a robust test on each figure, and why.

A card is compared with those of its own kind. A figure is off when it lies on the worse side of the median by more
than `OFF` times the spread. The spread is the median absolute deviation as an estimate of a standard deviation
(`TO_SIGMA`), and no less than the figure's floor: among cards that agree to a thousandth, two thousandths mean nothing.
Median and deviation stay where they are when nearly half of the cards are off, as a mean would not.

Source: B. Iglewicz and D. C. Hoaglin, *How to Detect and Handle Outliers*, ASQC Quality Press, 1993, section 3.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flashcore.decision.compare import is_figure, number
from flashcore.records import Trial

WHAT = "card"
"""``data["what"]`` of a record that holds the list of one card."""
OFF = 3.5
"""Spreads beyond which a figure is off: Iglewicz and Hoaglin's bound for their modified z-score."""
TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""
FEWEST = 3
"""Cards of a kind below which none can be named: of two that differ, either may be the odd one."""
CPU_FLOOR = 0.25
"""Floor of every figure of a CPU, whose cores other work shares."""


@dataclass(frozen=True)
class Figure:
    """What a figure is, and how much of it is noise."""

    title: str
    better: Literal["more", "less"]
    floor: float
    """The least spread, as a share of the median."""


FIGURES = {
    "attention": Figure("Attention, D=64", "more", 0.015),
    "causal_attention": Figure("Causal attention, D=128", "more", 0.015),
    "small_call": Figure("Small call", "less", 0.015),
    "matmul_fp16": Figure("float16 product", "more", 0.015),
    "matmul_bf16": Figure("bfloat16 product", "more", 0.015),
    "matmul_fp32": Figure("float32 product", "more", 0.015),
    "copy_bandwidth": Figure("Memory copy", "more", 0.005),
    "graph_node": Figure("Smallest kernel", "less", 0.02),
    "host_copy": Figure("Copy from the host", "more", 0.03),
}  # fmt: skip
"""What a card is judged by; a figure of another name is shown and judges nothing."""
MEMORY = ("copy_bandwidth",)
SENSORS = {"sm_clock_mhz": ("SM clock", "MHz"), "memory_clock_mhz": ("Memory clock", "MHz"), "power_w": ("Power", "W"),
           "temperature_c": ("Temperature", "°C")}  # fmt: skip
"""What is read under load: why a card is off, and never that it is."""
CLOCK_SHARE, POWER_SHARE, HOTTER_C = 0.02, 0.05, 8.0
"""How far a clock or a power limit lies below the others', and a temperature above them, to be a reason."""


@dataclass(frozen=True)
class Spread:
    """One figure over the cards of a kind."""

    name: str
    title: str
    unit: str
    median: float
    least: float
    most: float
    limit: float
    """Beyond this value, on the worse side, a card is off, if the figure judges and the cards are enough."""
    n: int

    @property
    def percent(self) -> float:
        """From the least to the greatest, in % of the median."""
        return 100 * (self.most - self.least) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Off:
    """A card that is off its fleet, and why."""

    card: str
    node: str
    what: tuple[str, ...]
    """What is off, as clauses."""
    why: tuple[str, ...]
    """What its counters say about it, as clauses; empty when they say nothing."""

    @property
    def sentence(self) -> str:
        """All of it."""
        since = f", since {'; '.join(self.why)}" if self.why else ", and its counters do not say why"
        return f"{self.card} on {self.node}: {'; '.join(self.what)}{since}."


@dataclass(frozen=True)
class Kind:
    """The cards of one kind."""

    name: str
    cpu: bool
    cards: tuple[Trial, ...]
    spreads: tuple[Spread, ...] = ()
    sensors: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """Least, median and greatest reading of each sensor."""
    off: tuple[Off, ...] = ()
    remarks: tuple[str, ...] = ()
    """What is to be said of all of them, as sentences."""
    agrees: bool = True
    """Whether all cards give the same bits, each time."""


@dataclass(frozen=True)
class Fleet:
    """What came of it."""

    kinds: tuple[Kind, ...]

    @property
    def off(self) -> tuple[Off, ...]:
        """All cards that are off."""
        return tuple(one for kind in self.kinds for one in kind.off)

    @property
    def ok(self) -> bool:
        """Whether no card is off, and all of a kind give the same bits."""
        return not self.off and all(kind.agrees for kind in self.kinds)

    def sentences(self) -> list[str]:
        """The finding first, then each card that is off, then what else is to be said."""
        cards = sum(len(kind.cards) for kind in self.kinds)
        names = ", ".join(f"{len(kind.cards)} × {kind.name}" for kind in self.kinds)
        bits = "" if all(k.agrees for k in self.kinds) else ", and the bits of their results do not agree"
        if self.off or any(len(kind.cards) >= FEWEST for kind in self.kinds):
            first = f"{len(self.off)} of {cards} cards are off ({names}){bits}."
        else:  # where so few cannot be judged, none is said to be well either
            first = f"{cards} card{'s were' if cards != 1 else ' was'} measured ({names}){bits}."
        return [first, *(one.sentence for one in self.off), *(r for kind in self.kinds for r in kind.remarks)]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        kinds = [
            {
                "kind": kind.name, "cpu": kind.cpu, "agrees": kind.agrees,
                "cards": [{"card": card_name(t), "node": t.node, "status": t.status, "reason": t.reason, **t.data}
                          for t in kind.cards],
                "spreads": [asdict(one) | {"percent": round(one.percent, 2)} for one in kind.spreads],
                "sensors": {name: list(values) for name, values in kind.sensors.items()},
                "remarks": list(kind.remarks),
            }
            for kind in self.kinds
        ]  # fmt: skip
        off = [{**asdict(one), "sentence": one.sentence} for one in self.off]
        return {"ok": self.ok, "kinds": kinds, "off": off, "sentences": self.sentences()}


def cards_of(trials: Sequence[Trial]) -> list[Trial]:
    """The last record of each card, in the order of nodes and cards."""
    found = {card_name(t): t for t in trials if t.kind == "fleet" and t.data.get("what") == WHAT}
    return sorted(found.values(), key=lambda t: (str(t.node), card_name(t)))


def judge(trials: Sequence[Trial]) -> Fleet:
    """Compare the cards that a run measured, kind by kind."""
    kinds: dict[str, list[Trial]] = {}
    for trial in cards_of(trials):
        kinds.setdefault(str(trial.data.get("kind")), []).append(trial)
    return Fleet(tuple(_kind(name, cards) for name, cards in sorted(kinds.items())))


def card_name(trial: Trial) -> str:
    """The card of a record, as nvidia-smi takes it; a worker of a CPU has its node's name with it."""
    card = trial.card or "the only card"
    return card[:12] if card.startswith("GPU-") else f"{card} of {trial.node}"


def figure(trial: Trial, name: str) -> float | None:
    """A figure of a card; None where it was not measured, or is no number."""
    one = _mapping(_mapping(trial.data.get("figures")).get(name)).get("value")
    return float(one) if is_figure(one) and one > 0 else None


def _kind(name: str, cards: list[Trial]) -> Kind:
    cpu = any(trial.data.get("cpu") for trial in cards)
    what: dict[str, list[str]] = {card_name(trial): [] for trial in cards}
    memory: set[str] = set()
    spreads, remarks = [], []
    for key in dict.fromkeys(k for t in cards for k in _mapping(t.data.get("figures"))):
        spread = _spread(key, cards, cpu)
        if spread is None:
            continue
        spreads.append(spread)
        if spread.n < FEWEST:
            continue
        for trial in cards:
            said = _beyond(figure(trial, key), spread)
            if said:
                what[card_name(trial)].append(said)
                memory |= {card_name(trial)} if key in MEMORY else set()
    if 1 < len(cards) < FEWEST:
        remarks.append(f"{len(cards)} × {name} are too few to name one of them: of two that differ, either may be off.")
    agrees, other_bits = _bits(cards, remarks)
    for trial in cards:
        mine = what[card_name(trial)]
        mine += other_bits.get(card_name(trial), [])
        mine += [f"wrong results ({said})" for said in _texts(trial.data.get("wrong"))]
        if trial.status == "error":
            mine.append(f"it could not be measured ({(trial.reason or 'no reason recorded').rstrip('.')})")
        mine += _broken(_mapping(trial.data.get("counters")), [t for t in cards if t is not trial])
    sensors = {key: _three(cards, key) for key in SENSORS if _three(cards, key)}
    off = tuple(
        Off(card_name(t), str(t.node), tuple(what[card_name(t)]), tuple(_why(t, cards, card_name(t) in memory)))
        for t in cards if what[card_name(t)]
    )  # fmt: skip
    return Kind(name, cpu, tuple(cards), tuple(spreads), sensors, off, tuple(remarks), agrees)


def _spread(key: str, cards: Sequence[Trial], cpu: bool) -> Spread | None:
    values = [v for v in (figure(trial, key) for trial in cards) if v is not None]
    if not values:
        return None
    known = FIGURES.get(key)
    median = statistics.median(values)
    floor = CPU_FLOOR if cpu else known.floor if known else 0.0
    scale = max(TO_SIGMA * statistics.median(abs(v - median) for v in values), floor * median)
    better = known.better if known else "more"
    unit = next(str(_mapping(t.data["figures"][key]).get("unit", "")) for t in cards if figure(t, key) is not None)
    limit = median + OFF * scale * (1 if better == "less" else -1)
    return Spread(key, known.title if known else key.replace("_", " "), unit, median, min(values), max(values), limit,
                  len(values))  # fmt: skip


def _beyond(value: float | None, spread: Spread) -> str:
    """What a figure says against its card, as a clause; empty for nothing."""
    known = FIGURES.get(spread.name)
    if value is None:
        return f"{spread.title}: not measured"
    if known is None or not (value > spread.limit if known.better == "less" else value < spread.limit):
        return ""
    far = 100 * (value / spread.median - 1)
    return (
        f"{spread.title} {number(value)} {spread.unit}, {abs(far):.1f} % {'above' if far > 0 else 'below'} the median "
        f"of {number(spread.median)}"
    )


def _bits(cards: Sequence[Trial], remarks: list[str]) -> tuple[bool, dict[str, list[str]]]:
    """Whether all give the same bits; and by card what is said against it: those of most cards count as right."""
    against: dict[str, list[str]] = {}
    agrees = True
    for backend in dict.fromkeys(b for t in cards for b in _mapping(t.data.get("bits"))):
        found = {card_name(t): _texts(_mapping(t.data.get("bits")).get(backend)) for t in cards}
        counted = collections.Counter(hashes[0] for hashes in found.values() if len(hashes) == 1)
        usual, count = counted.most_common(1)[0] if counted else ("", 0)
        for card, hashes in found.items():
            if len(hashes) > 1:
                against.setdefault(card, []).append(f"{backend} gives other bits each time")
        if len(counted) > 1 and 2 * count <= sum(counted.values()):
            remarks.append(f"The cards do not agree on the bits of {backend}, and no result is that of most of them.")
            agrees = False
            continue
        for card, hashes in found.items():
            if len(hashes) == 1 and hashes[0] != usual:
                against.setdefault(card, []).append(f"{backend} gives other bits than on {count} other cards")
    return agrees and not against, against


def _broken(counters: Mapping[str, Any], others: Sequence[Trial]) -> list[str]:
    """What counters alone say against a card, however fast it is.

    A link that is as narrow on every card is how the box is built.
    """
    found = []
    if _positive(counters.get("ecc_uncorrected")):
        found.append(f"{counters['ecc_uncorrected']} memory errors that ECC could not correct")
    if counters.get("remap_failed"):
        found.append("a row of its memory could not be remapped")
    width, most = (
        counters.get("pcie_width"),
        _usual(others, "counters", "pcie_width") or counters.get("pcie_width_most"),
    )
    if _positive(width) and _positive(most) and width < most:
        found.append(f"PCIe width ×{width} instead of ×{most:.0f}")
    return found


def _why(trial: Trial, cards: Sequence[Trial], slow_memory: bool) -> list[str]:
    """What its sensors and counters say that those of the other cards do not."""
    load, counters = _mapping(trial.data.get("load")), _mapping(trial.data.get("counters"))
    others = [t for t in cards if t is not trial]
    found = []
    common = collections.Counter(
        r for t in others for r in _texts(_mapping(t.data.get("load")).get("throttle_reasons"))
    )
    held = [r for r in _texts(load.get("throttle_reasons")) if 2 * common[r] <= len(others)]
    if held:
        found.append(f"it was held down by {', '.join(held)}")
    for key, share in (("sm_clock_mhz", CLOCK_SHARE), ("memory_clock_mhz", CLOCK_SHARE)):
        usual = _usual(others, "load", key)
        if usual and is_figure(load.get(key)) and load[key] < (1 - share) * usual:
            found.append(f"its {SENSORS[key][0]} was {load[key]:,.0f} MHz beside {usual:,.0f}")
    usual = _usual(others, "load", "temperature_c")
    if usual is not None and is_figure(load.get("temperature_c")) and load["temperature_c"] > usual + HOTTER_C:
        found.append(f"it was hotter, {load['temperature_c']:.0f} °C beside {usual:.0f}")
    usual = _usual(others, "counters", "power_limit_w")
    if usual and is_figure(counters.get("power_limit_w")) and counters["power_limit_w"] < (1 - POWER_SHARE) * usual:
        found.append(f"its power limit is {counters['power_limit_w']:.0f} W beside {usual:.0f}")
    usual = _usual(others, "counters", "pcie_gen")
    if usual and is_figure(counters.get("pcie_gen")) and counters["pcie_gen"] < usual:
        found.append(f"its PCIe link is of generation {counters['pcie_gen']} beside {usual:.0f}")
    rows, usual = counters.get("rows_remapped"), _usual(others, "counters", "rows_remapped")
    if _positive(rows) and not usual:
        found.append(f"{rows} rows of its memory were remapped after errors")
    if _positive(counters.get("ecc_corrected")) and not _usual(others, "counters", "ecc_corrected"):
        found.append(f"ECC corrected {counters['ecc_corrected']} errors of its memory")
    if slow_memory and not found:
        found.append("its memory is slower")
    least = min((t.data["counters"]["others"] for t in others
                 if is_figure(_mapping(t.data.get("counters")).get("others"))), default=0)  # fmt: skip
    if is_figure(counters.get("others")) and counters["others"] > least + 1:  # the process that gives out work is one
        found.append(f"{counters['others']} other processes use it")
    return found


def _usual(cards: Sequence[Trial], part: str, key: str) -> float | None:
    values = [_mapping(t.data.get(part)).get(key) for t in cards]
    known = [float(v) for v in values if is_figure(v)]
    return statistics.median(known) if known else None


def _three(cards: Sequence[Trial], key: str) -> tuple[float, float, float] | tuple[()]:
    values = [float(v) for t in cards if is_figure(v := _mapping(t.data.get("load")).get(key))]
    return (min(values), statistics.median(values), max(values)) if values else ()


def _positive(value: Any) -> bool:
    return is_figure(value) and value > 0


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _texts(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list | tuple) else []
