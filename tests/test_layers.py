"""The folders are the layers: no circle between them, none between modules, and nothing private used from outside."""

from __future__ import annotations

import ast
import collections
import functools
import graphlib
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import flashcore

PACKAGE = Path(flashcore.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file())
ROOMS = sorted(FOLDERS + [f"{p.parent.parent.name}.{p.parent.name}" for p in PACKAGE.glob("*/*/__init__.py")])
"""The folders, and those that lie within them: `measure` and `measure.cluster`."""
ROOT_MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("__"))
MOST_ROOT_MODULES = 8
MOST_FOLDERS = 16
DECIDES_AND_DRAWS = ("decision", "page", "errors", "problem", "records", "tables", "paths")
"""Records in, words and pictures out: torch has no business there, not even inside a function."""
LOADS_TORCH = ("backends", "backends.others", "bisection", "bisection.diagnosis", "bisection.faults",
               "bisection.interactive", "compat", "gpu", "integrations", "library", "measure", "measure.exploits",
               "numerics", "paging", "parallel", "surveys.invariance", "surveys.models", "surveys.paging", "ops",
               "paged_ops", "varlen_ops")  # fmt: skip
"""What computes. Everything else loads, and `flashcore --help` answers, without the seconds that torch takes."""


def name_of(path: Path) -> str:
    """The dotted name of a file's module."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def place(module: str) -> str:
    """The folder under the root that a module lies in; a module of the root stands for itself."""
    return module.split(".")[1] if "." in module else ""


def room(module: str) -> str:
    """The room that a module lies in: its folder, or the one within that; a module of the root stands for itself."""
    return max((r for r in ROOMS if lies_in(module, f"flashcore.{r}")), key=len, default=place(module))


def lies_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def nodes(tree: ast.AST, typing_too: bool) -> Iterator[ast.AST]:
    """All nodes of a source; without `typing_too` those that a type checker alone reads are left out."""
    left = collections.deque([tree])
    while left:
        node = left.popleft()
        if not typing_too and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        left.extend(ast.iter_child_nodes(node))


def imports(text: str, *, typing_too: bool = False) -> list[tuple[str, str]]:
    """(module, name) of each import of ours in a source; the name is empty where a whole module is meant.

    What is imported inside a function counts. What only a type checker imports counts with `typing_too`.
    """
    return _imports(text)[typing_too]


@functools.cache
def _imports(text: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """`imports` without and with what only a type checker imports.

    The trees are not kept: they hold so many nodes that each search for garbage after this would take a second.
    """
    tree = ast.parse(text)
    return _imported(nodes(tree, False)), _imported(nodes(tree, True))


def _imported(found_nodes: Iterable[ast.AST]) -> list[tuple[str, str]]:
    found = []
    for node in found_nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "flashcore"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the folder; write the full name"
            if node.module.split(".")[0] == "flashcore":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found.append((whole, "") if whole in MODULES else (node.module, alias.name))
    return found


def used(module: str, *, typing_too: bool = False) -> set[str]:
    """The modules of ours that a module imports."""
    return {to for to, _ in imports(MODULES[module].read_text(), typing_too=typing_too)} - {module, "flashcore"}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, as the nodes on it; empty when there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def between(where: Callable[[str], str], pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """Which folder (`place`) or room (`room`) uses which, from pairs of modules."""
    graph: dict[str, set[str]] = {}
    for module, other in pairs:
        if where(module) and where(other) and where(module) != where(other):
            graph.setdefault(where(module), set()).add(where(other))
    return graph


def breaches(module: str, text: str) -> list[str]:
    """What a module takes from a folder that it does not lie in and that does not offer it in its `__all__`."""
    found = []
    for target, name in imports(text):
        parts = target.split(".")
        if len(parts) < 2 or parts[1] not in FOLDERS:
            continue
        # Each step down from a folder of others has to be offered by the one above it.
        for depth in range(2, len(parts)):
            above = ".".join(parts[:depth])
            if not lies_in(module, above) and parts[depth] not in importlib.import_module(above).__all__:
                found.append(target)
        package = (MODULES[target].name == "__init__.py") if target in MODULES else False
        if not name or lies_in(module, target if package else target.rpartition(".")[0]):
            continue
        if name.startswith("_") or (package and name not in importlib.import_module(target).__all__):
            found.append(f"{target}.{name}")
    return found


def test_the_root_holds_the_words_and_what_a_model_calls():
    assert len(ROOT_MODULES) <= MOST_ROOT_MODULES, ROOT_MODULES
    assert [p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name not in (*FOLDERS, "__pycache__", "_data")] == []


def test_the_folders_are_few_enough_to_be_seen_at_once():
    assert len(FOLDERS) <= MOST_FOLDERS, FOLDERS


def test_no_prefix_stands_for_a_folder():
    """Two modules `x_a` and `x_b` beside each other want a folder `x`."""
    for folder in {path.parent for path in FILES}:
        stems = [p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")]
        first = [stem.split("_")[0] for stem in stems if "_" in stem]
        families = {f for f in first if first.count(f) > 1 and folder.name not in ("backends", "plants")}
        assert families == set(), f"{folder.name} has families {families}"


@pytest.mark.slow
def test_there_is_no_circle_between_folders():
    assert circle(between(place, ((m, to) for m in MODULES for to in used(m)))) == []


@pytest.mark.slow
def test_there_is_no_circle_between_the_rooms_within_folders_either():
    """What lies in a folder itself counts as one room, beside those within it."""
    assert circle(between(room, ((m, to) for m in MODULES for to in used(m)))) == []


@pytest.mark.slow
def test_there_is_no_circle_between_modules_not_even_for_types():
    assert circle({module: used(module, typing_too=True) for module in MODULES}) == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_takes_from_other_folders_only_what_they_offer(module):
    assert breaches(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize("folder", sorted({p.parent for p in FILES if p.name == "__init__.py"} - {PACKAGE}), ids=str)
def test_a_folder_says_what_lives_there_and_what_others_may_use(folder):
    module = importlib.import_module(name_of(folder / "__init__.py"))
    assert len(module.__doc__.strip().splitlines()) >= 3, "three sentences: what lives here, and what each part is for"
    for name in module.__all__:
        assert hasattr(module, name) or f"{module.__name__}.{name}" in MODULES, f"{name} is offered and not there"


@pytest.mark.slow
def test_what_does_not_compute_loads_without_torch():
    """All of it in one process, which names the first module that brought torch along."""
    rooms = [p for p in ROOMS + ROOT_MODULES if p not in LOADS_TORCH]
    names = [m for m in MODULES if room(m) in rooms]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'importing {name} loads torch')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert len(rooms) > 10 and set(map(room, names)) == set(rooms)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_folder_loads_none_of_the_rooms_within_it():
    """Else whoever asks for one room waits for all of them."""
    within = [r for r in ROOMS if "." in r]
    parents = sorted({r.partition(".")[0] for r in within})
    code = f"import sys, {', '.join(f'flashcore.{p}' for p in parents)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(parents) > 3 and {f"flashcore.{p}" for p in parents} <= set(loaded)
    assert {f"flashcore.{r}" for r in within} & set(loaded) == set() and not {"torch", "matplotlib"} & set(loaded)


@pytest.mark.slow
def test_what_computes_loads_without_torchs_compiler():
    """It takes as long to load as the rest of torch, and most processes compile nothing."""
    names = [m for m in MODULES if place(m) in ("backends", "compat", "library", "ops", "paged_ops", "varlen_ops")]
    code = (
        f"import sys, {', '.join(names)}\n"
        "import torch\n"
        "from flashcore.bisection.diagnosis.hypotheses import place_of\n"
        "from flashcore.bisection.diagnosis.probes import memory\n"
        "from flashcore.problem import square\n"
        "place_of(torch.ones(2, 4, 4, dtype=torch.bool), square(1, 2, 4, 4))\n"
        "from flashcore.numerics import ambient\n"
        "with memory.full_of_nan(), ambient.shield(): sys.exit(bool({'torch._dynamo', 'sympy'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "torch._dynamo or sympy is loaded with them"


@pytest.mark.parametrize("where", DECIDES_AND_DRAWS)
def test_what_decides_and_draws_never_imports_torch_at_all(where):
    for module in (m for m in MODULES if place(m) == where):
        tree = ast.parse(MODULES[module].read_text())
        heads = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        heads |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not heads & {"torch", "cupy", "cuda"}, module


def test_these_tests_see_a_breach():
    text = "def f():\n    from flashcore.paging import arguments\n    from flashcore.gpu.build import _bare\n"
    assert breaches("flashcore.records", text) == ["flashcore.paging.arguments", "flashcore.gpu.build._bare"]
    assert breaches("flashcore.paging.cache", "from flashcore.paging import arguments") == []
    text = "from flashcore.bisection import zoom\nfrom flashcore.bisection.faults import planting\n"
    assert breaches("flashcore.bisection.interactive.moving", text) == ["flashcore.bisection.faults.planting"]
    assert breaches("flashcore.measure.check", text) == [
        "flashcore.bisection.zoom",
        "flashcore.bisection.faults.planting",
    ]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and circle({"a": {"b"}, "b": set()}) == []
    typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from flashcore.paging import PagedKV\n"
    assert imports(typing) == [] and imports(typing, typing_too=True) == [("flashcore.paging", "PagedKV")]
    pairs = [("flashcore.gpu.build", "flashcore.page.pdf"), ("flashcore.page.pdf", "flashcore.gpu.device")]
    assert circle(between(place, pairs)) and circle(between(room, pairs))
    pairs = [("flashcore.page.pdf", "flashcore.page.history.runs"), ("flashcore.page.history.views", "flashcore.page")]
    assert not circle(between(place, pairs)) and set(circle(between(room, pairs))) == {"page", "page.history"}
    assert [room(m) for m in ("flashcore", "flashcore.ops", "flashcore.bisection.faults.plants.cpu")] == [
        "", "ops", "bisection.faults",
    ]  # fmt: skip
