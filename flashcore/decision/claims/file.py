"""Read claims: published figures as data, each with its unit, workload and source, and the data sheets of the GPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flashcore.decision.toml_tables import TomlFile, parse_toml, read_toml
from flashcore.errors import ClaimsError
from flashcore.problem import Problem, parse_problem
from flashcore.records import Kind

_SPEED_UNITS = {"GFLOPS": 1e-3, "TFLOPS": 1.0, "PFLOPS": 1e3}
UNITS: dict[str, dict[str, float] | None] = {
    "latency_us": {"ns": 1e-3, "us": 1.0, "µs": 1.0, "μs": 1.0, "ms": 1e3, "s": 1e6},
    "tflops": _SPEED_UNITS,
    "peak_tflops": _SPEED_UNITS,
    "work_gflop": {"MFLOP": 1e-3, "GFLOP": 1.0, "TFLOP": 1e3},
    "speedup": {"x": 1.0, "×": 1.0},
    "memory_share": {"%": 1.0},
    "tokens_per_s": {"tokens/s": 1.0},
    "clock_ghz": {"MHz": 1e-3, "GHz": 1.0},
    "sm_count": {"SMs": 1.0},
    "count": None,
}
"""Quantities, and how many of the quantity's own unit each unit is; None takes any word and counts single things."""
OWN_UNIT = {
    "latency_us": "µs", "tflops": "TFLOPS", "peak_tflops": "TFLOPS", "work_gflop": "GFLOP", "speedup": "×",
    "memory_share": "%", "tokens_per_s": "tokens/s", "clock_ghz": "GHz", "sm_count": "SMs",
}  # fmt: skip
"""The unit that a quantity is reckoned in; a count has the claim's."""
FAMILY = {"latency_us": "speed", "tflops": "speed"}
"""Quantities that say the same of a workload; every other one is its own family."""
ZEROS_MAY_MEAN = 0.05
"""The trailing zeros of a whole number may be rounding, up to this share of it."""

Quantity = Literal[
    "latency_us", "tflops", "peak_tflops", "work_gflop", "speedup", "memory_share", "tokens_per_s", "clock_ghz",
    "sm_count", "count",
]  # fmt: skip
Dtype = Literal["float16", "bfloat16", "float32"]
Interval = tuple[float, float]


class RecordsOf(BaseModel):
    """Where records of a run hold such a figure: the kind, the key in `data`, and what else must be equal there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    key: str = Field(min_length=1)
    where: dict[str, Any] = Field(default_factory=dict)

    @field_validator("where")
    @classmethod
    def _plain_numbers(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {k: float(v) if isinstance(v, Decimal) else v for k, v in value.items()}


class Claim(BaseModel):
    """One published figure; `reports/claims.toml` explains every key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    text: str = Field(min_length=1)
    source: str = Field(min_length=1)
    quantity: Quantity
    value: Decimal = Field(gt=0)
    unit: str = Field(min_length=1)
    bound: Literal["at least", "at most"] | None = None
    plus_minus: Decimal | None = Field(default=None, ge=0)
    workload: Problem | None = None
    share: float = Field(default=1.0, gt=0, le=1)
    may_mean: tuple[Problem, ...] = ()
    dtype: Dtype | None = None
    backend: str | None = None
    counterpart: str | None = None
    gpu: str | None = None
    definition: str | None = None
    factors: tuple[float, ...] = ()
    of: str | None = None
    over: str | None = None
    part_of: str | None = None
    same_as: tuple[str, ...] = ()
    records: RecordsOf | None = None
    measure: str | None = None
    note: str = ""

    @field_validator("value", "plus_minus", mode="before")
    @classmethod
    def _a_number(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            raise ValueError("write a number without quotes")
        return Decimal(repr(value)) if isinstance(value, float) else value

    @field_validator("workload", mode="before")
    @classmethod
    def _a_problem(cls, value: Any) -> Any:
        return _problem(value)

    @field_validator("may_mean", mode="before")
    @classmethod
    def _problems(cls, value: Any) -> Any:
        return tuple(map(_problem, value)) if isinstance(value, list | tuple) else (_problem(value),)

    @field_validator("same_as", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _parts_agree(self) -> Claim:
        units = UNITS[self.quantity]
        if units is not None and self.unit not in units:
            raise ValueError(f"{self.quantity} is given in {' or '.join(units)}, not in '{self.unit}'")
        if not 0 < self.number < math.inf:
            raise ValueError("the value is beyond what can be reckoned with")
        if (self.of is None) != (self.over is None) or (self.of and self.quantity != "speedup"):
            raise ValueError("'of' and 'over' go together, and belong to a speedup")
        if self.factors and self.quantity not in ("work_gflop", "count"):
            raise ValueError("'factors' belong to work_gflop and count")
        if not all(0 < factor < math.inf for factor in self.factors):
            raise ValueError("'factors' are positive numbers")
        if self.part_of and (self.family != "speed" or self.workload is None):
            raise ValueError("'part_of' belongs to a latency_us or tflops with a workload")
        if self.share != 1 and self.workload is None:
            raise ValueError("'share' is a share of a workload, and there is none")
        return self

    @property
    def family(self) -> str:
        return FAMILY.get(self.quantity, self.quantity)

    @property
    def own_unit(self) -> str:
        """The unit of `number` and `interval`."""
        return OWN_UNIT.get(self.quantity, self.unit)

    @property
    def scale(self) -> float:
        """How many of the quantity's own unit the claim's unit is."""
        units = UNITS[self.quantity]
        return 1.0 if units is None else units[self.unit]

    @property
    def number(self) -> float:
        """The value in the quantity's own unit: µs, TFLOPS, GFLOP, %, GHz."""
        return float(self.value) * self.scale

    @property
    def half_step(self) -> Decimal:
        """How far the truth may lie from the value by the digits it is given with, in the claim's unit."""
        if self.plus_minus is not None:
            return self.plus_minus
        exponent = self.value.as_tuple().exponent
        if exponent < 0:
            return Decimal(5).scaleb(exponent - 1)
        rounded = Decimal(5).scaleb(self.value.normalize().as_tuple().exponent - 1)
        return max(Decimal("0.5"), min(rounded, self.value * Decimal(str(ZEROS_MAY_MEAN))))

    @property
    def interval(self) -> Interval:
        """What the claim allows, in the quantity's own unit: its digits' rounding, or everything beyond its bound."""
        if self.bound == "at least":
            return self.number, math.inf
        if self.bound == "at most":
            return 0.0, self.number
        step = float(self.half_step) * self.scale
        return max(0.0, self.number - step), self.number + step

    @property
    def figure(self) -> str:
        """The value as it was given, with bound and unit."""
        plain = Decimal("1e-6") <= self.value < Decimal("1e15")
        return f"{self.bound or ''} {f'{self.value:,f}' if plain else f'{self.value:g}'} {self.unit}".strip()


class Gpu(BaseModel):
    """What a GPU can do by its data sheet; the roof that a claim is held against."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)
    names: tuple[str, ...]
    """Texts in the name that its driver reports."""
    peak_tflops: dict[Dtype, float]
    """Dense matrix products, without sparsity."""
    peak_clock_ghz: float | None = None
    """The clock at which the data sheet counts `peak_tflops`."""
    boost_ghz: float
    """The highest clock there is."""
    sm_count: int
    memory_tb_s: float
    l2_mb: float
    launch_us: float
    """What an empty kernel takes inside a CUDA graph, measured."""
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _positive(self) -> Gpu:
        figures = [*self.peak_tflops.values(), self.boost_ghz, self.sm_count, self.memory_tb_s, self.l2_mb]
        figures += [self.launch_us, self.peak_clock_ghz or 1.0]
        if not all(0 < figure < math.inf for figure in figures):
            raise ValueError("every figure of a GPU is a positive number")
        return self

    def is_named(self, name: Any) -> bool:
        """Whether a driver's name is one of this GPU."""
        return bool(name) and any(text in str(name) for text in self.names)


@dataclass(frozen=True)
class Claims:
    """The claims of one file in its order, and the GPUs they may be held against."""

    path: str
    claims: tuple[Claim, ...]
    gpus: tuple[Gpu, ...] = ()

    def __iter__(self):
        return iter(self.claims)

    def __len__(self) -> int:
        return len(self.claims)

    def get(self, id_: str | None) -> Claim | None:
        """The claim with this id, or None."""
        return next((claim for claim in self.claims if claim.id == id_), None)

    def gpu(self, id_: str | None) -> Gpu | None:
        """The GPU with this id, or None."""
        return next((gpu for gpu in self.gpus if gpu.id == id_), None)


def shipped_path() -> Path:
    """The claims file that comes with FlashCore."""
    from flashcore.paths import data_dir

    return data_dir("reports") / "claims.toml"


def load_claims(path: str | Path | None = None) -> Claims:
    """Read a claims file.

    Parameters
    ----------
    path
        A TOML file; None for the one FlashCore ships. Its GPUs are added to those of the shipped file, and replace one
        with the same id.

    Raises
    ------
    ClaimsError
        The file cannot be read, is no TOML, or holds a claim that makes no sense; names the line and the reason.
    """
    shipped = shipped_path()
    path = shipped if path is None else Path(path)
    known = () if path == shipped else _claims(_read(shipped)).gpus
    return _claims(_read(path), gpus=known)


def parse_claims(text: str, path: str = "claims", *, gpus: tuple[Gpu, ...] = ()) -> Claims:
    """Read the text of a claims file; `path` names it in errors, `gpus` are known besides its own."""
    return _claims(parse_toml(text, path, ClaimsError, parse_float=Decimal), gpus=gpus)


def _read(path: Path) -> TomlFile:
    return read_toml(path, "claims", ClaimsError, parse_float=Decimal)


def _claims(file: TomlFile, *, gpus: tuple[Gpu, ...] = ()) -> Claims:
    file.only(("claim", "gpu"))
    own = file.tables(Gpu, "gpu")
    known = {gpu.id: gpu for gpu in (*gpus, *own)}
    claims = file.tables(Claim, "claim")
    if not claims:
        raise file.wrong("there is no claim in it; write at least one [[claim]] table.")
    found = Claims(file.path, tuple(claims), tuple(known.values()))
    for index, claim in enumerate(claims):
        if bad := _bad_link(claim, found):
            raise file.wrong(f"claim '{claim.id}': {bad[1]}.", (("claim", index),), bad[0])
    return found


def _problem(value: Any) -> Any:
    """A problem from a preset's name, a label, or a table of its fields."""
    if isinstance(value, str):
        try:
            return parse_problem(value)
        except LookupError as error:  # pydantic takes a ValueError for a finding and lets others through
            raise ValueError(str(error)) from None
    if isinstance(value, Mapping):
        known = Problem.model_fields
        if unknown := sorted(set(value) - set(known)):
            raise ValueError(f"a problem has no '{unknown[0]}'; its fields are {', '.join(known)}")
        return Problem(**{k: float(v) if isinstance(v, Decimal) else v for k, v in value.items()})
    return value


def _bad_link(claim: Claim, found: Claims) -> tuple[str, str] | None:
    """Key and reason of the first link of a claim that leads nowhere, or to something of another kind."""
    if claim.gpu is not None and found.gpu(claim.gpu) is None:
        known = ", ".join(gpu.id for gpu in found.gpus) or "(none)"
        return "gpu", f"there is no gpu '{claim.gpu}'; use one of {known}, or write a [[gpu]] table"
    links = [("of", claim.of), ("over", claim.over), ("part_of", claim.part_of)]
    links += [("same_as", name) for name in claim.same_as]
    for key, name in links:
        if name is None:
            continue
        other = found.get(name)
        if other is None:
            return key, f"there is no claim '{name}' to link to"
        if other is claim:
            return key, f"'{key}' links the claim to itself"
        if key in ("same_as", "part_of") and other.family != claim.family:
            return key, f"'{name}' is a {other.quantity}, which cannot be compared with {claim.quantity}"
        if key == "same_as" and None not in (claim.workload, other.workload) and claim.workload != other.workload:
            return key, f"'{name}' has another workload, so it is not the same thing"
        if key == "part_of" and other.workload is None and other.quantity != "latency_us":
            return key, f"'{name}' names no workload, so how long it takes is not known"
    if claim.of is not None and _rate(found.get(claim.of)) != _rate(found.get(claim.over)):
        return "over", f"'{claim.of}' and '{claim.over}' are of two quantities, so they have no ratio"
    return None


def _rate(claim: Claim) -> str:
    """The quantity, with a peak counted as the speed that it is."""
    return claim.quantity.removeprefix("peak_")
