"""Collect what a verdict and a page may use for a run: its own records, and a recorded run where it had no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashcore.decision import seal
from flashcore.decision.gates import Gates
from flashcore.decision.seal import State
from flashcore.errors import FlashCoreError
from flashcore.records import RunFolder, Trial, readable_trials


@dataclass(frozen=True)
class Recorded:
    """A run kept from another machine: the evidence of a report made without a GPU."""

    trials: tuple[Trial, ...]
    environment: Mapping[str, Any]
    folder: str = ""
    problems: tuple[str, ...] = ()

    @property
    def gpu(self) -> str:
        return str(self.environment.get("gpu") or "an unknown GPU")

    @property
    def date(self) -> str:
        return str(self.environment.get("date") or "")[:10] or "an unknown date"

    @property
    def kernels(self) -> Mapping[str, Any]:
        """Hash of each kernel's source when the run was made, by name; empty where the run does not say."""
        kernels = self.environment.get("kernels")
        return kernels if isinstance(kernels, Mapping) else {}

    def changed(self, current_hashes: Mapping[str, str]) -> list[str]:
        """Names of kernels whose source is not the one that was recorded."""
        return sorted(name for name, now in current_hashes.items() if self.kernels.get(name, now) != now)

    def added(self, current_hashes: Mapping[str, str]) -> list[str]:
        """Names of kernels that exist now and were not recorded."""
        return sorted(current_hashes.keys() - self.kernels.keys())


@dataclass(frozen=True)
class Evidence:
    """Everything a verdict and a page may use for one run."""

    trials: tuple[Trial, ...]
    environment: Mapping[str, Any]
    current_hashes: Mapping[str, str]
    recorded: Recorded | None = None
    problems: tuple[str, ...] = ()
    """What is wrong with the run's own records, as sentences; any of them rules out a decision."""
    seal: State = State(None)
    """What the run's seal says today."""

    @property
    def gpu_trials(self) -> tuple[Trial, ...]:
        """The trials to show where a GPU matters: the recorded run's when this run had no GPU."""
        return self.recorded.trials if self.recorded is not None else self.trials

    @property
    def gpu_environment(self) -> Mapping[str, Any]:
        return self.recorded.environment if self.recorded is not None else self.environment

    @property
    def label(self) -> str:
        """Where the GPU figures come from, in words."""
        return label(self.recorded, self.environment, self.current_hashes)

    @property
    def brief(self) -> str:
        """The same for a first look: kernels that differ or are newer are counted, and `label` names them."""
        if self.recorded is None and not self.environment.get("gpu"):
            return self.label
        there = self.recorded or Recorded((), self.environment)
        where = f"{'Measured live' if self.recorded is None else 'Recorded'} on {there.gpu}, {there.date}"
        changed = _count(there.changed(self.current_hashes))
        if self.recorded is None:
            return f"{where}{f'; {changed} of its kernels changed since' if changed else ''}."
        if not there.kernels:
            return f"{where}; it does not say which kernels it measured."
        told = f"{changed} of its kernels changed since" if changed else "its kernels are unchanged"
        added = _count(there.added(self.current_hashes))
        newer = f", and {added} newer {'ones were' if added > 1 else 'one was'} not measured" if added else ""
        return f"{where}; {told}{newer}."


def _count(kernels: Sequence[str]) -> int:
    """How many kernels these are: a kernel and its form with options are one."""
    from flashcore.gpu.options import WITH_OPTIONS

    return len({name.removesuffix(WITH_OPTIONS) for name in kernels})


def label(recorded: Recorded | None, environment: Mapping[str, Any], current_hashes: Mapping[str, str]) -> str:
    """Where GPU figures come from, as one sentence for a reader."""
    if recorded is None:
        if environment.get("gpu"):
            changed = Recorded((), environment).changed(current_hashes)
            since = f"; kernel sources differ now: {spoken(changed)}" if changed else ""
            day = str(environment.get("date") or "")[:10] or "date not known"
            return f"Measured live on {environment['gpu']}, {day}{since}."
        return "No GPU evidence: this machine has no GPU, and there is no recorded run."
    if not recorded.kernels:
        match = "it does not say which kernel sources were measured"
    elif changed := recorded.changed(current_hashes):
        match = f"kernel sources differ: {spoken(changed)}"
    else:
        match = "kernel sources match the current ones"
    if recorded.kernels and (added := recorded.added(current_hashes)):
        match += f". Not measured there, since they are newer: {spoken(added)}"
    return f"Recorded on {recorded.gpu}, {recorded.date}; {match}."


def spoken(kernels: Sequence[str]) -> str:
    """Names of kernels for a reader, who knows none of the marks that tell a kernel's forms apart.

    A hash of a kernel with its options covers code that its plain form does not hold, so the two may differ apart.
    """
    from flashcore.gpu.options import WITH_OPTIONS

    plain = [name for name in kernels if not name.endswith(WITH_OPTIONS)]
    forms = [name.removesuffix(WITH_OPTIONS) for name in kernels if name.endswith(WITH_OPTIONS)]
    forms = [name for name in forms if name not in plain]  # of a kernel that is named whole
    listed = " and ".join(filter(None, [", ".join(forms[:-1]), *forms[-1:]]))
    told = f"the masked and batch-invariant forms of {listed}" if forms else ""
    return ", and ".join(filter(None, [", ".join(plain), told]))


def gather(run: RunFolder, *, gates: Gates | None = None, recorded_dir: str | Path | None = None) -> Evidence:
    """Collect what the gates may use for a run.

    A run made with a GPU stands on its own records. A run made without one borrows the newest run that lies, with its
    environment, in a folder under `recorded_dir` (default: ``reports/recorded``).

    Parameters
    ----------
    gates
        What the run is judged by now, to be held against those it was sealed with.

    Raises
    ------
    RecordsError
        The run's own records or environment cannot be read. A recorded run that cannot be read is only left out.
    """
    from flashcore.gpu.build import source_hashes
    from flashcore.paths import data_dir

    trials, problems = readable_trials(run.records_path)
    environment = run.environment()
    sealed = seal.check(run, gates, sealed_before=_says_sealed(trials))
    problems += tuple(sealed.of((*seal.EVIDENCE, "gates")))
    if not environment.get("gpu") and (seen := _needed_a_gpu(trials)):
        problems += (f"The run's environment names no GPU, and {seen}.",)
    recorded = None
    if not environment.get("gpu"):
        root = Path(recorded_dir) if recorded_dir is not None else data_dir("reports") / "recorded"
        runs, left_out = recorded_runs(root)
        problems += left_out
        recorded = runs[-1] if runs else None
    return Evidence(trials, environment, source_hashes(), recorded, problems, sealed)


FLEET = "fleet"
"""The kind of records that compare cards: a run of these alone is no evidence of a kernel."""


def recorded_runs(root: Path) -> tuple[list[Recorded], tuple[str, ...]]:
    """The runs made on a GPU in the folders under `root`, oldest first, and a sentence on each that cannot be read."""
    found, left_out = [], []
    for folder in sorted(root.glob("*/")) if root.is_dir() else []:
        try:
            other = RunFolder(folder)
            trials, damage = readable_trials(other.records_path)
            damage += tuple(seal.check(other, sealed_before=_says_sealed(trials)).of(seal.EVIDENCE))
            candidate = Recorded(trials, other.environment(), folder.name, damage)
        except FlashCoreError as error:
            left_out.append(f"The recorded run in {folder.name} was left out: {error}")
            continue
        if candidate.environment.get("gpu") and any(trial.kind != FLEET for trial in trials):
            found.append(candidate)
    return sorted(found, key=lambda run: str(run.environment.get("date") or "")), tuple(left_out)


def _says_sealed(trials: Sequence[Trial]) -> bool:
    """Whether the newest verdict among the records was followed by a seal."""
    return next((bool(t.data.get("sealed")) for t in reversed(trials) if t.kind == "verdict"), False)


def _needed_a_gpu(trials: Sequence[Trial]) -> str:
    """What among the records only a GPU could have measured, as a clause; empty where there is nothing."""
    for trial in trials:
        if trial.kind == "attention_timing" and trial.timing is not None and trial.timing.method != "host":
            return f"{trial.backend} was timed by {trial.timing.method.replace('_', ' ')}, which takes one"
        if trial.kind == "correctness" and trial.status in ("ok", "failed") and trial.source_hash is not None:
            return f"{trial.backend}, a kernel, was run and checked in it"
    return ""
