"""Seal a run at its verdict, and say later whether it is still what was judged, and what is not.

A seal is a file of hashes over records, environment, gates, claims, kernel sources and executed notebooks. It proves no
honesty, since whoever can write the run can write a seal; it shows every edit made beside FlashCore.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from flashcore.decision.gates import Gates
from flashcore.errors import RecordsError
from flashcore.records import RunFolder, write_whole

VERSION = 1
FILE = "seal.json"
PAGES = ("report.html", "report.pdf")
DRAWN = "06_status_report.ipynb"
"""The executed notebook of the page: made anew by each rendering, from records that are sealed."""
HEX = 16
"""Hex digits kept of each hash: 64 bits, enough to show an edit that nobody searched a collision for."""
MOST_NAMED = 5
"""Changes of one part that are named one by one; the rest is counted."""

Part = Literal["seal", "records", "environment", "gates", "claims", "kernels", "files", "pages"]
EVIDENCE: tuple[Part, ...] = ("seal", "records", "environment")
"""What a decision rests on: a change of these after the seal leaves nothing decided."""


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was sealed."""

    part: Part
    sentence: str


@dataclass(frozen=True)
class State:
    """What a run's seal says today."""

    digest: str | None
    """The seal's own hash; None for a run without a seal."""
    date: str = ""
    changes: tuple[Change, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the run has a seal and everything under it is as it was."""
        return self.digest is not None and not self.changes

    def of(self, parts: Sequence[Part]) -> list[str]:
        """The sentences on changes of these parts."""
        return [change.sentence for change in self.changes if change.part in parts]

    def without(self, part: Part) -> State:
        """The state as if nothing of this part had been sealed."""
        return replace(self, changes=tuple(change for change in self.changes if change.part != part))

    @property
    def sentence(self) -> str:
        """The state in one sentence."""
        if self.digest is None and not self.changes:
            return "This run carries no seal."
        if self.digest is None:
            return f"The seal does not hold: {self.changes[0].sentence}"
        if not self.changes:
            return f"Seal {self.digest} of {self.date} holds."
        others = len(self.changes) - 1
        more = f" ({others} more change{'s' if others > 1 else ''})" if others else ""
        return f"Seal {self.digest} of {self.date} does not hold: {self.changes[0].sentence}{more}"


# ---------------------------------------------------------------------------------------------------- hashes


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:HEX]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str).encode()


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a records file as they lie there, one after the other; an empty one at the end is none."""
    try:
        with open(path, "rb") as file:
            for line in file:
                yield line.removesuffix(b"\n")
    except OSError as error:
        raise RecordsError(f"{path} cannot be read ({error.strerror}); restore the file.") from error


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, hash) of every value in nested mappings; a list is one value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name or "its whole content", _hash(_canonical(value))


def _of_gates(gates: Gates) -> dict[str, str]:
    found = {f"gate {gate.id}": _hash(_canonical(gate.model_dump(mode="json"))) for gate in gates}
    found |= {f"option {one.id}": _hash(_canonical(one.model_dump(mode="json"))) for one in gates.options}
    found["their order"] = _hash(_canonical([[g.id for g in gates], [o.id for o in gates.options]]))
    return {**found, "rank_options_by": _hash(_canonical(gates.rank_options_by))}


def _of_file(path: Path) -> str | None:
    try:
        return _hash(path.read_bytes())
    except OSError:
        return None


def _claims_path() -> Path:
    from flashcore.paths import data_dir

    return data_dir("reports") / "claims.toml"


def _kept_files(run: RunFolder) -> dict[str, str]:
    """What lies in the run besides records, environment and pages: executed notebooks, superseded records."""
    paths = [run.path / "superseded.jsonl", *sorted((run.path / "notebooks").glob("*.ipynb"))]
    paths = [path for path in paths if path.name != DRAWN]
    hashes = {path.relative_to(run.path).as_posix(): _of_file(path) for path in paths}
    return {name: found for name, found in hashes.items() if found is not None}


# ---------------------------------------------------------------------------------------------------- making


def make(run: RunFolder, gates: Gates, *, verdict: str, earlier: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The seal of a run as it lies on disk now.

    Parameters
    ----------
    gates
        What it was judged by.
    verdict
        The word that came of it.
    earlier
        Entries on seals that this one takes the place of: digest, date and what was changed under them.
    """
    from flashcore.gpu.build import source_hashes

    sealed = {
        "version": VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": verdict,
        "records": [_hash(line) for line in _lines(run.records_path)],
        "environment": dict(_leaves(run.environment())),
        "gates": _of_gates(gates),
        "claims": _of_file(_claims_path()),
        "kernels": source_hashes(),
        "files": _kept_files(run),
        "earlier": [dict(one) for one in earlier],
    }
    return {**sealed, "digest": _digest(sealed), "pages": {}, "pages_digest": None}


def _digest(sealed: Mapping[str, Any]) -> str:
    return _hash(_canonical({k: v for k, v in sealed.items() if k not in ("digest", "pages", "pages_digest")}))


def seal(run: RunFolder, gates: Gates, *, verdict: str, earlier: Sequence[Mapping[str, Any]] = ()) -> str:
    """Write ``seal.json`` into the run and give its digest; called when the verdict has been recorded.

    Raises
    ------
    RecordsError
        The file cannot be written.
    """
    made = make(run, gates, verdict=verdict, earlier=earlier)
    _write(run, made)
    return made["digest"]


def seal_pages(run: RunFolder) -> None:
    """Take the page and the PDF, as they have just been made, into a run's seal; nothing where it has none."""
    found = _read(run)
    if not isinstance(found, dict):
        return
    sealed = None
    while (pages := _pages(run)) != sealed:  # another process may be drawing it too, and be done first
        _write(run, {**found, "pages": pages, "pages_digest": _hash(_canonical([found.get("digest"), pages]))})
        sealed = pages


def _pages(run: RunFolder) -> dict[str, str]:
    """What the seal says of the page and the PDF as they are."""
    return {name: hashed for name in PAGES if (hashed := _of_file(run.path / name)) is not None}


def unseal(run: RunFolder) -> list[dict[str, Any]]:
    """Take the seal off a run that is about to be changed; gives the `earlier` entries of the seal to come.

    Raises
    ------
    RecordsError
        The seal cannot be removed, as a folder of its name cannot.
    """
    state, before = check(run), _earlier(_read(run))
    try:
        (run.path / FILE).unlink(missing_ok=True)
    except OSError as error:
        raise RecordsError(
            f"The seal {run.path / FILE} cannot be removed ({error.strerror}); remove it by hand, and make the folder "
            "writable."
        ) from error
    return [*before, _entry(state)] if state.digest is not None or state.changes else before


def _entry(state: State) -> dict[str, Any]:
    return {"digest": state.digest, "date": state.date, "changes": [change.sentence for change in state.changes]}


def _earlier(found: dict[str, Any] | str | None) -> list[dict[str, Any]]:
    """The entries on earlier seals in a seal as read; what is no entry is none."""
    entries = found.get("earlier") if isinstance(found, dict) else None
    return [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []


def earlier(run: RunFolder) -> list[str]:
    """Sentences on the seals that this one took the place of, the oldest first."""
    said = []
    for one in _earlier(_read(run)):
        changes = one.get("changes")
        changes = [str(change) for change in changes] if isinstance(changes, list) else []
        after = "records were added by FlashCore" if one.get("added") else "it was sealed anew"
        held = f"did not hold: {' '.join(changes).rstrip('.')}" if changes else "held"
        said.append(f"Before: seal {one.get('digest')} of {str(one.get('date'))[:10]}, which {held}; then {after}.")
    return said


@contextmanager
def additions(run: RunFolder, gates: Gates) -> Iterator[None]:
    """Records that FlashCore itself adds inside this context come under the run's seal, if it had one that held.

    A run whose seal does not hold stays so: what is added to doubtful records makes them no better.
    """
    state, found = check(run), _read(run)
    try:
        yield
    finally:  # what was measured before an error or Ctrl-C is FlashCore's own too
        if state.digest is not None and not state.of(EVIDENCE) and isinstance(found, dict):
            _seal_again(run, gates, state, found)


def _seal_again(run: RunFolder, gates: Gates, state: State, found: dict[str, Any]) -> None:
    earlier = [*_earlier(found), {**_entry(state), "added": True}]
    made = make(run, gates, verdict=str(found.get("verdict")), earlier=earlier)
    made["gates"] = found["gates"]  # those that its verdict was judged by
    _write(run, {**made, "digest": _digest(made)})


def _write(run: RunFolder, sealed: Mapping[str, Any]) -> None:
    try:
        write_whole(run.path / FILE, (json.dumps(sealed, indent=0) + "\n").encode())
    except OSError as error:
        raise RecordsError(
            f"The seal of {run.name} cannot be written ({error.strerror}); free the disk, then 'flashcore seal'."
        ) from error


def _read(run: RunFolder) -> dict[str, Any] | str | None:
    """The seal; None where there is none, and a sentence where the file is not one."""
    try:
        found = json.loads((run.path / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return f"{FILE} cannot be read as a seal."
    return found if isinstance(found, dict) else f"{FILE} cannot be read as a seal."


# -------------------------------------------------------------------------------------------------- checking


def check(run: RunFolder, gates: Gates | None = None, *, sealed_before: bool = False) -> State:
    """Hold a run against its seal.

    Parameters
    ----------
    gates
        What it would be judged by now; None leaves gates, claims and kernel sources out, which may rightly move on.
    sealed_before
        Whether its records say that it was sealed, so that a missing seal is a finding.
    """
    found = _read(run)
    if found is None:
        gone = Change("seal", f"The run was sealed at its verdict, and {FILE} is gone.")
        return State(None, changes=(gone,) if sealed_before else ())
    if isinstance(found, str):
        return State(None, changes=(Change("seal", found),))
    digest, date = str(found.get("digest")), str(found.get("date"))[:10]
    try:
        changes = tuple(_changes(run, found, gates))
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        changes = (Change("seal", f"{FILE} holds what no seal holds."),)
    return State(digest, date, changes)


def _changes(run: RunFolder, found: Mapping[str, Any], gates: Gates | None) -> Iterator[Change]:
    if found.get("version") != VERSION:
        yield Change("seal", f"{FILE} is of version {found.get('version')!r}; this FlashCore knows {VERSION}.")
        return
    if _digest(found) != found.get("digest"):
        yield Change("seal", f"{FILE} itself was changed.")
    for sentence in _records_changed(run, found["records"]):
        yield Change("records", sentence)
    for sentence in _differing(found["environment"], dict(_leaves(run.environment())), "environment.json: "):
        yield Change("environment", sentence)
    kept = _kept_files(run)
    folders = {run.path, *((run.path / n).parent for n in kept)}
    there = {n: h for n, h in found["files"].items() if (run.path / n).parent in folders}
    # A run that is kept elsewhere leaves its notebooks behind as a whole; one that is missing among others was removed.
    for sentence in _differing(there, kept, ""):
        yield Change("files", sentence)
    if gates is not None:
        from flashcore.gpu.build import source_hashes

        for sentence in _differing(found["gates"], _of_gates(gates), "gates: "):
            yield Change("gates", sentence)
        if found["claims"] != _of_file(_claims_path()):
            yield Change("claims", "The claims file is another one now.")
        sources = {name: h for name, h in source_hashes().items() if name in found["kernels"]}
        for sentence in _differing(found["kernels"], sources, "kernel source "):
            yield Change("kernels", sentence)
    pages = found["pages"]
    if pages and _hash(_canonical([found.get("digest"), pages])) != found.get("pages_digest"):
        yield Change("seal", f"{FILE} itself was changed.")
    now = {name: hashed for name in PAGES if (hashed := _of_file(run.path / name)) is not None}
    for sentence in _differing(pages, now, ""):
        yield Change("pages", sentence)


def _records_changed(run: RunFolder, sealed: Sequence[str]) -> list[str]:
    """Sentences on lines of the records that are not as they were sealed."""
    now = [_hash(line) for line in _lines(run.records_path)]
    if now == list(sealed):
        return []
    lines = list(_lines(run.records_path))
    start = next((i for i, (a, b) in enumerate(zip(sealed, now, strict=False)) if a != b), min(len(sealed), len(now)))
    end = 0
    while end < min(len(sealed), len(now)) - start and sealed[-1 - end] == now[-1 - end]:
        end += 1
    before, after = list(sealed[start : len(sealed) - end]), now[start : len(now) - end]
    gone, new = Counter(before) - Counter(after), Counter(after) - Counter(before)
    if not gone and not new:
        return [f"records.jsonl: lines {start + 1} to {start + len(after)} stand in another order."]
    added = []
    for number, hashed in enumerate(after, start=start + 1):
        if new[hashed] > 0:
            new[hashed] -= 1
            added.append(f"line {number} ({_what(lines[number - 1])})")
    n, m = gone.total(), len(added)
    if n and m:
        same = "is not as it was" if m == 1 else "are not as they were"
        found = [f"records.jsonl: {_listed(added)} {same} sealed."]
        return found if n == m else [*found, f"records.jsonl: it had {len(sealed)} lines and has {len(now)}."]
    if n:
        return [f"records.jsonl: {n} line{'s' if n > 1 else ''} that {'were' if n > 1 else 'was'} sealed "
                f"{'are' if n > 1 else 'is'} gone, the first after line {start}."]  # fmt: skip
    return [f"records.jsonl: {_listed(added)} {'was' if m == 1 else 'were'} added after the seal."]


def _what(line: bytes) -> str:
    """What a line is about, in a few words."""
    try:
        fields = json.loads(line)
        words = [str(fields.get("kind") or "no kind"), str(fields.get("backend") or "")]
        return " of ".join(word[:40] for word in words if word)
    except (ValueError, AttributeError, RecursionError):
        return "no record"


def _differing(sealed: Mapping[str, str], now: Mapping[str, str], what: str) -> list[str]:
    """Sentences on what differs between two mappings of names to hashes."""
    changed = [name for name in sealed if name in now and now[name] != sealed[name]]
    gone, new = [n for n in sealed if n not in now], [n for n in now if n not in sealed]
    found = []
    for names, one, many in (
        (changed, "is not as it was sealed", "are not as they were sealed"),
        (gone, "is gone", "are gone"),
        (new, "was added after the seal", "were added after the seal"),
    ):
        if names:
            told = _told(names)
            found.append(f"{what}{_listed(told)} {one if len(told) == 1 else many}.")
    return found


def _told(names: Sequence[str]) -> list[str]:
    """Names for a reader: of a kernel that is named whole its forms are not named again, and of another in words."""
    from flashcore.gpu.options import WITH_OPTIONS

    told = [name for name in names if name.removesuffix(WITH_OPTIONS) not in names or not name.endswith(WITH_OPTIONS)]
    return [
        f"{name.removesuffix(WITH_OPTIONS)} (its masked and batch-invariant forms)"
        if name.endswith(WITH_OPTIONS) else name
        for name in told
    ]  # fmt: skip


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
