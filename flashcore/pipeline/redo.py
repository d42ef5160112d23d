"""Measure one part of a run again and keep the rest of it: `flashcore report --only sweep`, or what did not finish."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore.decision import seal, verdict
from flashcore.errors import FlashCoreError, RecordsError
from flashcore.gpu import device
from flashcore.page import Variant
from flashcore.pipeline import folders, rendering, reporting, superseding
from flashcore.pipeline.rendering import Progress
from flashcore.records import RunFolder, write_whole

if TYPE_CHECKING:
    from flashcore.measure.cluster import Place


def redo(
    run: RunFolder,
    only: str,
    *,
    changes: Mapping[str, Any] | None = None,
    notebooks_dir: Path | None = None,
    timeout_s: float | None = None,
    within_s: float | None = None,
    variant: Variant | None = None,
    pdf: bool = True,
    progress: Progress | None = None,
    bars: bool = True,
    kernel: Mapping[str, Any] | None = None,
    places: Sequence[Place] = (),
) -> reporting.ReportResult:
    """Measure parts of a run again, on the machine that it was measured on, and judge and render it anew.

    What the parts had written moves to ``superseded.jsonl``; every other record stays. A part that does not finish
    leaves the run INCONCLUSIVE, as in a report.

    Parameters
    ----------
    only
        Names or short names of notebooks, separated by commas.
    changes
        Other values of ``profile``, ``backends``, ``problems`` or ``seed`` than the run was made with.
    kernel
        The function that the run was begun with, adopted again as in `reporting.report`; None for a run without one.
    within_s, bars, places
        As in `reporting.report`.

    Raises
    ------
    UnknownName, InvalidProblem
        A part, profile, backend or problem does not exist.
    FlashCoreError
        `kernel` is not the function that the run was begun with.
    RecordsError
        The run was measured on another machine or with other software, somebody else is measuring it, or its files
        cannot be written.
    """
    folders.refuse_recorded(run)
    until = reporting.deadline(within_s)
    folder = reporting.notebooks_folder(notebooks_dir)
    parts = reporting.parts_named(only, folder)
    with folders.measuring(run):
        environment = run.environment()
        parameters = environment.get("parameters")
        if not isinstance(parameters, Mapping):
            raise RecordsError(
                f"The run {run.name} does not say how it was made, so no part of it can be made again; "
                "'flashcore report' makes a new one."
            )
        refuse_other_kernel(run, kernel)
        defaults = {"profile": "quick", "backends": "all", "problems": "default", "seed": 0}
        common = {key: (changes or {}).get(key, parameters.get(key, value)) for key, value in defaults.items()}
        common["backends"] = reporting.with_kernel(common["backends"], kernel)
        reporting.check_request(common)
        now = _environment_now()
        _same_machine(run, environment, now)

        planned = [str(name) for name in _list(parameters.get("notebooks"))]
        say = progress or (lambda line: None)
        earlier = seal.unseal(run)  # before the pages go, which its seal holds too
        rendering.remove_pages(run)  # they show what the run said before, and this may be killed half way
        decision = verdict.judge(run).to_trial()  # also the mark that what follows is the work of these parts
        run.append(decision.model_copy(update={"data": {**decision.data, superseding.REDO: parts}}))
        moved = superseding.set_aside(run, parts, planned=planned)
        say(f"Run {run.name}: {', '.join(parts)} again; {moved} earlier records moved to superseded.jsonl")
        began = {"parts": parts, "date": datetime.now(UTC).isoformat(timespec="seconds"), "before": device.clocks(),
                 **({"cards": [place.as_dict() for place in places]} if places else {})}  # fmt: skip
        peers = reporting.planned_peers(common["backends"]) if reporting.SHORT["sweep"] in parts else None
        begun = _merged(run, environment, now, sorted({*planned, *parts}), peers)
        _write(run, begun)
        failed = reporting.measure(run, parts, common, folder=folder, timeout_s=timeout_s, until=until,
                                   progress=progress, bars=bars)  # fmt: skip
        if kernel is not None and _diagnosis_is_owed(run):
            reporting.diagnose_adopted(run, kernel, say, until=until)
        done = {**began, **{k: v for k, v in common.items() if v != parameters.get(k)}, "after": device.clocks()}
        begun["after"] = environment.get("after") or device.snapshot()  # a run that was killed never wrote it
        _write(run, {**begun, "redone": [*_list(environment.get("redone")), done]})
        return reporting.conclude(run, failed, folder=folder, variant=variant, pdf=pdf, progress=progress,
                                  earlier=earlier)  # fmt: skip


def kernel_of(run: RunFolder) -> Mapping[str, Any] | None:
    """What a run's environment tells of the function that it was begun with; None where it was begun without."""
    parameters = run.environment().get("parameters")
    told = parameters.get("kernel") if isinstance(parameters, Mapping) else None
    return told if isinstance(told, Mapping) else None


def refuse_other_kernel(run: RunFolder, kernel: Mapping[str, Any] | None) -> None:
    """Refuse to measure parts of a run without the function it was begun with, or with another one.

    Raises
    ------
    FlashCoreError
        There is none, and the run has one; or there is one, and the run has none, or not this one as it is now.
    """
    told = kernel_of(run)
    if told is None and kernel is not None:
        raise FlashCoreError(f"The run {run.name} was begun without --kernel, which makes a new run; leave --only and "
                             "--resume out, or --kernel.")  # fmt: skip
    if told is not None and kernel is None:
        raise FlashCoreError(f"The run {run.name} measures {told.get('function')}, a function of yours, beside the "
                             "others; name it again by --kernel.")  # fmt: skip
    if told is None or kernel is None:
        return
    now = reporting.as_told(kernel)
    other = [name for name in ("function", "layout", "lse", "sha256") if now[name] != told.get(name)]
    if other:
        name = {"sha256": "file's hash"}.get(other[0], other[0])
        raise FlashCoreError(
            f"--kernel is not the function that the run {run.name} was begun with: its {name} is {now[other[0]]}, and "
            f"was {told.get(other[0])}; 'flashcore report' makes a new run."
        )


def _diagnosis_is_owed(run: RunFolder) -> bool:
    """Whether the function that a run was begun with is not diagnosed yet: it ended before, or had no time left."""
    told = kernel_of(run)
    return told is not None and not any(
        trial.backend == told.get("backend") and not trial.variant for trial in run.trials(kind="diagnosis")
    )


def unfinished(run: RunFolder) -> list[str]:
    """The notebooks of a run's plan that did not come to their end, or were never begun."""
    parameters = run.environment().get("parameters")
    planned = _list(parameters.get("notebooks")) if isinstance(parameters, Mapping) else []
    last = {str(trial.data.get("name")): trial.status for trial in run.trials(kind="notebook")}
    return [str(name) for name in planned if last.get(str(name)) != "ok"]


def resume(run: RunFolder, **options: Any) -> reporting.ReportResult:
    """Measure what a run lacks: the parts that failed, that had no time left, or that were killed with the report.

    Parameters
    ----------
    options
        As of `redo`.

    Raises
    ------
    RecordsError
        It lacks nothing, or as in `redo`.
    """
    folders.refuse_recorded(run)
    if left := unfinished(run):
        return redo(run, ",".join(left), **options)
    owed = _diagnosis_is_owed(run)
    if not owed and run.trials(kind="verdict") or not run.trials():
        raise RecordsError(
            f"Every part of the run {run.name} finished; 'flashcore render {run.name}' draws its page, and "
            "'flashcore report --only PART' measures one again."
        )
    kernel, say = options.get("kernel"), options.get("progress") or (lambda line: None)
    refuse_other_kernel(run, kernel)
    until = reporting.deadline(options.get("within_s"))
    told = {name: options.get(name) for name in ("variant", "progress")} | {"pdf": options.get("pdf", True)}
    with folders.measuring(run):
        earlier = seal.unseal(run)
        rendering.remove_pages(run)
        if kernel is not None and owed:
            reporting.diagnose_adopted(run, kernel, say, until=until)
        return reporting.conclude(run, {}, folder=reporting.notebooks_folder(options.get("notebooks_dir")),
                                  earlier=earlier, **told)  # fmt: skip


def _list(value: Any) -> list[Any]:
    """A list of the environment's file; nothing where something else stands there."""
    return value if isinstance(value, list) else []


def _environment_now() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="flashcore-redo-") as folder:
        fresh = RunFolder.create(folder)
        device.record_environment(fresh, "before")
        return fresh.environment()


def _same_machine(run: RunFolder, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to put figures of two machines into one run: a verdict counts those of one alone."""
    if then.get("id") == now["id"]:
        return
    before, here = then.get("before") or {}, now["before"]
    moving = device.clocks()
    other = [f"{key} {before.get(key)} then, {here.get(key)} now" for key in here
             if key not in moving and before.get(key) != here.get(key)]  # fmt: skip
    why = "; ".join(other[:3]) or f"environment {then.get('id')} then, {now['id']} now"
    raise RecordsError(
        f"The run {run.name} was measured on another machine or with other software ({why}), so that a part measured "
        "here would not belong to it; 'flashcore report' makes a new run."
    )


def _merged(
    run: RunFolder,
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    notebooks: Sequence[str],
    peers: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The run's environment with the sources of now, except where records that stay are of the older ones.

    `peers` are those that the new sweep times; None keeps those of the old one.
    """
    old = then.get("kernels") if isinstance(then.get("kernels"), Mapping) else {}
    still = {trial.source_hash for trial in run.trials()}
    kernels = {name: old[name] if old.get(name) in still else new for name, new in now["kernels"].items()}
    parameters = {
        **then["parameters"],
        "notebooks": list(notebooks),
        **({} if peers is None else {"peers": list(peers)}),
    }
    return {**then, "kernels": kernels, "git": now["git"], "parameters": parameters}


def _write(run: RunFolder, environment: Mapping[str, Any]) -> None:
    try:
        write_whole(run.environment_path, (json.dumps(environment, indent=1, default=str) + "\n").encode())
    except OSError as error:
        raise FlashCoreError(f"{run.environment_path} cannot be written ({error.strerror}); free the disk.") from error
