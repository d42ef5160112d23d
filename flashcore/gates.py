"""Read the gates: the conditions a run is judged by, as data."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flashcore import compare
from flashcore.errors import FlashCoreError, GatesError
from flashcore.problem import parse_problem
from flashcore.records import Kind, Trial

METRIC_KIND = {
    "correct_percent": "correctness",
    "tflops": "attention_timing",
    "latency_us": "attention_timing",
    "ratio_to_best_peer": "attention_timing",
}
GROUPS = {"ours": "ours", "peers": "peer", "any": None}
"""Names a gate may give instead of a backend, and the role of the backends meant."""


class Gate(BaseModel):
    """One condition on measured records; `reports/gates.toml` explains every key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
            raise ValueError(f"there is no metric '{value}'; use one of {', '.join(METRIC_KIND)} or data.<key>")
        return value

    @model_validator(mode="after")
    def _parts_agree(self) -> Gate:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a gate needs exactly one of at_least and at_most")
        wanted = METRIC_KIND.get(self.metric)
        if wanted and self.kind != wanted:
            raise ValueError(f"metric '{self.metric}' belongs to kind '{wanted}', not '{self.kind}'")
        if self.metric == "correct_percent" and self.at_most is not None:
            raise ValueError("a share of right results is judged by at_least")
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
        if trial.kind != self.kind or not self.means(trial) or not self.concerns(trial):
            return False
        if trial.timing is not None and (
            (self.method and trial.timing.method != self.method) or (self.l2 and trial.timing.l2 != self.l2)
        ):
            return False
        return all(trial.data.get(key) == value for key, value in self.where.items())

    def margin(self, value: float) -> float:
        """Distance to the threshold in the gate's unit; positive on the passing side."""
        return value - self.threshold if self.at_least is not None else self.threshold - value


@dataclass(frozen=True)
class Gates:
    """The gates of one file, in its order."""

    path: str
    gates: tuple[Gate, ...]

    def __iter__(self) -> Iterator[Gate]:
        return iter(self.gates)

    def __len__(self) -> int:
        return len(self.gates)


def load_gates(path: str | Path | None = None) -> Gates:
    """Read a gates file.

    Parameters
    ----------
    path
        A TOML file; None for the one FlashCore ships.

    Raises
    ------
    GatesError
        The file cannot be read, is no TOML, or holds a gate that makes no sense; names the line and the reason.
    """
    if path is None:
        from flashcore.build import data_dir

        path = data_dir("reports") / "gates.toml"
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise GatesError(str(path), None, f"the gates file cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise GatesError(str(path), None, "the gates file is not UTF-8 text.") from error
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"at line (\d+)", str(error))
        line = int(at[1]) if at else len(text.splitlines())
        raise GatesError(str(path), line, f"this is not TOML: {error}.") from error
    unknown = sorted(set(document) - {"gate"})
    if unknown:
        raise GatesError(
            str(path),
            _line_of(text, None, unknown[0]),
            f"there is no '{unknown[0]}' here; only [[gate]] tables are read.",
        )
    tables = document.get("gate")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise GatesError(str(path), None, "there is no gate in it; write at least one [[gate]] table.")
    gates: list[Gate] = []
    for index, table in enumerate(tables):
        try:
            gate = Gate.model_validate(table, strict=False)
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0]) if first["loc"] else None
            name = table.get("id", f"number {index + 1}")
            raise GatesError(
                str(path), _line_of(text, index, key), f"gate '{name}': {_in_words(first, key)}."
            ) from None
        if any(gate.id == other.id for other in gates):
            raise GatesError(str(path), _line_of(text, index, "id"), f"there are two gates with the id '{gate.id}'.")
        gates.append(gate)
    if not any(gate.required for gate in gates):
        raise GatesError(str(path), None, "no gate is required, so nothing would ever stop a GO; require at least one.")
    return Gates(str(path), tuple(gates))


def _in_words(error: dict[str, Any], key: str | None) -> str:
    if error["type"] == "extra_forbidden":
        return f"there is no key '{key}'; the keys are {', '.join(Gate.model_fields)}"
    if error["type"] == "missing":
        return f"the key '{key}' is missing"
    if key == "kind":
        return f"there is no kind '{error['input']}'; use one of {', '.join(get_args(Kind))}"
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{key}: {message} (got {error['input']!r})" if key else message


def _line_of(text: str, gate: int | None, key: str | None) -> int | None:
    """Line of `key` in the gate with this index; of its [[gate]] header when the key is not written there."""
    header, found = -1, None
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(r"\s*\[\[\s*gate\s*\]\]", line):
            header += 1
            if header == gate:
                found = number
        elif (
            key and (gate is None or header == gate) and re.match(rf"\s*\[*[\"']?{re.escape(key)}[\"']?[\s.=\]]", line)
        ):
            return number
    return found
