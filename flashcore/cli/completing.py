"""What the shell offers after an option: backends, bugs, problems, runs and the like, from the registries themselves.

A completion prints nothing and never fails: where a name cannot be looked up, nothing is offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

Names = Callable[[], Iterable[str]]
Completer = Callable[[str], list[str]]


def one(names: Names) -> Completer:
    """Complete one name."""

    def complete(incomplete: str) -> list[str]:
        return _offered(names, incomplete)

    return complete


def several(names: Names) -> Completer:
    """Complete the last of several names that stand between commas; one that stands there already is not offered."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        given = before.split(",")
        return [f"{before}{comma}{name}" for name in _offered(names, last) if name not in given]

    return complete


def _offered(names: Names, incomplete: str) -> list[str]:
    try:
        return [name for name in names() if name.startswith(incomplete)]
    except Exception:  # a plug-in that breaks is told when a command runs, and not while somebody types
        return []


def _backends() -> list[str]:
    from flashcore import backends

    return [backend.id for backend in backends.all_backends()]


def _backends_or_all() -> list[str]:
    return ["all", *_backends()]


def _exploits() -> list[str]:
    from flashcore.measure.exploits import catalogue

    return [exploit.id for exploit in catalogue.EXPLOITS]


def _faults() -> list[str]:
    from flashcore.bisection.faults import catalogue

    return [fault.id for fault in catalogue.FAULTS]


def _formats() -> list[str]:
    from flashcore.decision import formats

    return ["text", *formats.FORMATS]


def _kernels() -> list[str]:
    from flashcore.gpu import build

    return build.kernel_names()


def _patterns() -> list[str]:
    from flashcore.numerics import inputs

    return list(inputs.PATTERNS)


def _presets() -> list[str]:
    from flashcore.problem import PRESETS

    return list(PRESETS)


def _runs() -> list[str]:
    from flashcore.paths import data_dir
    from flashcore.pipeline import folders

    recorded = [str(path.parent) for path in (data_dir("reports") / "recorded").glob("*/records.jsonl")]
    own = sorted((path.parent.name for path in folders.runs_dir().glob("*/records.jsonl")), reverse=True)
    return [folders.LATEST, *(name for name in own if name != folders.LATEST), *sorted(recorded)]


def _sections() -> list[str]:
    from flashcore import page

    return list(page.SECTIONS)


backend = one(_backends)
backends = several(_backends_or_all)
exploits = several(_exploits)
fault = one(_faults)
format_ = one(_formats)
kernels = several(_kernels)
pattern = one(_patterns)
problem = one(_presets)
run = one(_runs)
sections = several(_sections)
