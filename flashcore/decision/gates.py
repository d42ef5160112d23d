"""Read the gates that a run is judged by, and the options that they decide between: both are data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flashcore.decision import compare
from flashcore.decision.toml_tables import TomlFile, read_toml
from flashcore.errors import FlashCoreError, GatesError, did_you_mean
from flashcore.problem import parse_problem
from flashcore.records import Kind, Trial

METRIC_KIND = {
    "correct_percent": "correctness",
    "tflops": "attention_timing",
    "latency_us": "attention_timing",
    "ratio_to_best_peer": "attention_timing",
    "kept_percent": "invariance",
}
SHARES = {"correct_percent": "right results", "kept_percent": "cases kept"}
"""Metrics that are a share of something, and of what."""
GROUPS = {"ours": "ours", "peers": "peer", "any": None}
"""Names a gate may give instead of a backend, and the role of the backends meant."""


class Gate(BaseModel):
    """One condition on measured records; `reports/gates.toml` explains every key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)  # strict: "320" and "yes" are no 320 and true

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    title: str = Field(min_length=1)
    why: str = ""
    kind: Kind
    backend: str = Field(default="any", min_length=1)
    problem: str = "any"
    metric: str
    where: dict[str, Any] = Field(default_factory=dict)
    reduce: Literal["best", "worst"] | None = None
    method: str | None = None
    l2: str | None = None
    at_least: float | None = Field(default=None, allow_inf_nan=False)
    at_most: float | None = Field(default=None, allow_inf_nan=False)
    unit: str = ""
    min_count: int = Field(default=0, ge=0)
    required: bool
    measure: str = Field(min_length=1)

    @field_validator("problem")
    @classmethod
    def _problem_exists(cls, value: str) -> str:
        if value != "any":
            try:
                parse_problem(value)
            except FlashCoreError as error:
                raise ValueError(str(error)) from None
        return value

    @field_validator("metric")
    @classmethod
    def _metric_exists(cls, value: str) -> str:
        if value not in METRIC_KIND and not re.fullmatch(r"data\.\w+", value):
            told = f"there is no metric '{value}'; use one of {', '.join(METRIC_KIND)} or data.<key>"
            raise ValueError(f"{told}. {did_you_mean(value, METRIC_KIND)}".removesuffix(". "))
        return value

    @model_validator(mode="after")
    def _parts_agree(self) -> Gate:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a gate needs exactly one of at_least and at_most")
        wanted = METRIC_KIND.get(self.metric)
        if wanted and self.kind != wanted:
            raise ValueError(f"metric '{self.metric}' belongs to kind '{wanted}', not '{self.kind}'")
        if self.metric in SHARES and self.at_most is not None:
            raise ValueError(f"a share of {SHARES[self.metric]} is judged by at_least")
        if wanted == "attention_timing" and self.problem == "any":
            raise ValueError("a timing is judged on one problem; name it instead of 'any'")
        return self

    @property
    def threshold(self) -> float:
        return self.at_least if self.at_least is not None else self.at_most

    @property
    def comparison(self) -> Literal["at least", "at most"]:
        return "at least" if self.at_least is not None else "at most"

    def means(self, trial: Trial) -> bool:
        """Whether the trial's backend is the one, or of the group, that the gate names."""
        if self.backend in GROUPS:
            return self.backend == "any" or compare.role(trial) == GROUPS[self.backend]
        return trial.backend == self.backend

    def concerns(self, trial: Trial) -> bool:
        """Whether the trial is of the problem that the gate names; one that is no problem's own stands for each."""
        if self.problem == "any" or (trial.status == "unavailable" and trial.problem is None):
            return True
        return compare.same_problem(trial.problem, parse_problem(self.problem))

    def wants(self, trial: Trial) -> bool:
        """Whether the trial is of this gate's kind, backend, problem and data, whatever came of it."""
        return trial.kind == self.kind and self.asks(trial) and self.takes(trial)

    def asks(self, trial: Trial) -> bool:
        """Whether the trial's backend and problem are the gate's: alike for trials alike in these and in status."""
        return self.means(trial) and self.concerns(trial)

    def takes(self, trial: Trial) -> bool:
        """Whether the trial was timed, and holds the data, as the gate wants it."""
        if trial.timing is not None and (
            (self.method and trial.timing.method != self.method) or (self.l2 and trial.timing.l2 != self.l2)
        ):
            return False
        return all(trial.data.get(key) == value for key, value in self.where.items())

    def margin(self, value: float) -> float:
        """Distance to the threshold in the gate's unit; positive on the passing side."""
        return value - self.threshold if self.at_least is not None else self.threshold - value


class Condition(Gate):
    """A gate that belongs to one option: the option hangs on it, and the run does not."""

    required: Literal[True] = True


class Option(BaseModel):
    """One thing that could be shipped; `reports/gates.toml` explains every key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str = Field(min_length=1)
    means: str = Field(min_length=1)
    effort: str = Field(min_length=1)
    risk: str = Field(min_length=1)
    backend: str | None = Field(default=None, min_length=1)
    conditions: tuple[str, ...] = ()
    condition: tuple[Condition, ...] = ()

    @field_validator("backend")
    @classmethod
    def _one_backend(cls, value: str | None) -> str | None:
        if value in GROUPS:
            raise ValueError("an option ships one backend; name it instead of a group")
        return value

    @model_validator(mode="after")
    def _has_conditions(self) -> Option:
        if not self.conditions and not self.condition:
            raise ValueError(
                "it has no condition; name gates in 'conditions', or write an [[option.condition]] below it"
            )
        return self

    def asked(self, gates: Gates) -> tuple[Gate, ...]:
        """Its conditions as gates; one on "ours" asks this option's backend alone: another's speed does not ship it."""
        found = []
        for name in self.conditions:
            gate = gates.get(name)
            if self.backend and gate.backend == "ours":
                changes = {"backend": self.backend, "title": f"{gate.title} ({self.backend})"}
                gate = gate.model_copy(update=changes)
            found.append(gate)
        return (*found, *self.condition)


@dataclass(frozen=True)
class Gates:
    """The gates and options of one file, in its order."""

    path: str
    gates: tuple[Gate, ...]
    options: tuple[Option, ...] = ()
    rank_options_by: str | None = None
    """Id of the gate that says which of several options that may ship is recommended; None: the first in the file."""
    options_judged_by: str = ""
    """Whose words `effort` and `risk` are, and of when; without it nobody is shown them, since nobody stands for them.
    Words alone, on which nothing hangs, so a run's seal does not hold it."""

    def __iter__(self) -> Iterator[Gate]:
        return iter(self.gates)

    def __len__(self) -> int:
        return len(self.gates)

    def get(self, id_: str) -> Gate | None:
        """The gate with this id, or None."""
        return next((gate for gate in self.gates if gate.id == id_), None)


def load_gates(path: str | Path | None = None) -> Gates:
    """Read a gates file.

    Parameters
    ----------
    path
        A TOML file; None for the one FlashCore ships.

    Raises
    ------
    GatesError
        The file cannot be read, is no TOML, or holds a gate or an option that makes no sense; names line and reason.
    """
    if path is None:
        from flashcore.paths import data_dir

        path = data_dir("reports") / "gates.toml"
    file = read_toml(Path(path), "gates", GatesError)
    file.only(("gate", "option"), keys=("rank_options_by", "options_judged_by"))
    if not isinstance(file.values.get("gate"), list) or not file.values["gate"]:
        raise file.wrong("there is no gate in it; write at least one [[gate]] table.", (), "gate")
    gates = file.tables(Gate, "gate")
    if not any(gate.required for gate in gates):
        raise file.wrong("no gate is required, so nothing would ever stop a GO; require at least one.")
    judged_by = file.values.get("options_judged_by", "")
    if not isinstance(judged_by, str):
        raise file.wrong("who judged effort and risk is told in words, in quotes.", (), "options_judged_by")
    options = tuple(file.tables(Option, "option"))
    found = Gates(file.path, tuple(gates), options, file.values.get("rank_options_by"), judged_by)
    _check_names(file, found)
    return found


def _check_names(file: TomlFile, found: Gates) -> None:
    """Refuse a name of a gate that leads nowhere, and one condition asked twice."""
    ids_known = [gate.id for gate in found]
    known = ", ".join(ids_known)
    ranking = found.rank_options_by
    if ranking is not None and (not isinstance(ranking, str) or found.get(ranking) is None):
        hint = did_you_mean(str(ranking), ids_known)
        told = f"there is no gate '{ranking}' to rank options by; use one of {known}. {hint}".rstrip()
        raise file.wrong(told, (), "rank_options_by")
    for index, option in enumerate(found.options):
        place = (("option", index),)
        for name in option.conditions:
            if found.get(name) is None:
                reason = f"option '{option.id}': there is no gate '{name}'; use one of {known}, or write it below as an"
                told = f"{reason} [[option.condition]]. {did_you_mean(name, ids_known)}".rstrip()
                raise file.wrong(told, place, "conditions", name)
            if option.conditions.count(name) > 1:
                raise file.wrong(f"option '{option.id}': the gate '{name}' is named twice.", place, "conditions", name)
        ids = [condition.id for condition in option.condition]
        for number, name in enumerate(ids):
            if found.get(name) is not None or name in ids[:number]:
                reason = (
                    f"option '{option.id}': there is another gate or condition with the id '{name}'; choose a new one."
                )
                raise file.wrong(reason, (*place, ("condition", number)), "id")
