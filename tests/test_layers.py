"""The layers of the house: a module imports only from lower ones, and what must stay light never imports torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import flashcore

PACKAGE = Path(flashcore.__file__).parent

LAYERS = [
    {"errors"},
    {"problem"},
    {"records"},
    {
        "build",
        "outputs",
        "inputs",
        "reference",
        "compare",
        "tables",
        "kernel_names",
        "profiling",
        "unfused_model",
        "toml_tables",
    },
    {"device", "launching", "tolerance", "isolation", "sanitizer_log", "cublaslt"},
    {"paging"},
    {"backends", "survey_grid", "matmul_heuristics", "cublas"},
    {"ops", "check", "timing", "stagewise", "zoom", "ceilings", "planting"},
    {"plants", "paged_ops"},
    {"bisection", "faults", "sweep", "determinism", "survey", "survey_facts", "paging_survey", "paging_facts"},
    {"proving", "sanitizer", "sanitizer_target"},
    {"gates", "evidence", "notebooks"},
    {"judging"},
    {"flips"},
    {"options"},
    {"option_words"},
    {"verdict", "claims"},
    {"svg", "html_tables", "pdf"},
    {"plots", "stage_plots", "survey_views", "paging_views"},
    {"history"},
    {"page"},
    {"answers"},
    {"rendering", "superseding"},
    {"pipeline", "cli_print", "cli_debug", "cli_survey", "cli_paging"},
    {"redo"},
    {"cli_claims", "cli_compare", "cli_report"},
    {"cli"},
]
FOLDERS = {"backends", "claims", "history", "page", "paging", "paging_survey", "plants"}  # files may import each other
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
MAY_IMPORT_TORCH = {
    "outputs", "launching",
    "inputs", "reference", "tolerance", "backends", "ops", "check", "timing", "stagewise", "zoom", "ceilings",
    "bisection", "faults", "sweep", "determinism", "profiling", "paging", "paged_ops",
    "paging_survey",
}  # fmt: skip
"""Modules that compute. Everything else must load, and `flashcore --help` answer, without torch's seconds of import."""

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """The layer's name of a file: its stem, or the folder's name for everything in `backends` or `paging`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, at_module_level: bool = False) -> set[str]:
    """Dotted names a file imports; optionally only those that importing the file itself would run."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if typing_only or (at_module_level and function):
            skipped.update(inner for inner in ast.walk(node) if inner is not node)
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer; write the full name"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(node.module)
    return found


def own(names: set[str]) -> set[str]:
    """The modules of ours among dotted names."""
    return {n.split(".")[1] for n in names if n.startswith("flashcore.") and n.split(".")[1] in RANK}


def breaches(module: str, names: set[str]) -> list[str]:
    """Modules that `module` may not import, of those it does."""
    return sorted(n for n in own(names) if RANK[n] >= RANK[module] and not (n == module and n in FOLDERS))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_lower_layers(path):
    module = module_of(path)
    if module in ("__init__", "__main__"):
        return
    assert module in RANK, f"{path.name} belongs to no layer: give it one in this test and in docs/architecture.md"
    assert breaches(module, imports(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_light_modules_never_import_torch_when_loaded(path):
    heavy = {n.split(".")[0] for n in imports(ast.parse(path.read_text()), at_module_level=True)} & {
        "torch",
        "cupy",
        "cuda",
    }
    assert heavy <= ({"torch"} if module_of(path) in MAY_IMPORT_TORCH else set())


@pytest.mark.parametrize(
    "module",
    ["errors", "problem", "records", "gates", "judging", "options", "verdict", "evidence", "plots", "page", "tables"],
)
def test_what_decides_and_draws_never_imports_torch_at_all(module):
    path = PACKAGE / f"{module}.py"
    for file in [path] if path.is_file() else sorted((PACKAGE / module).glob("*.py")):
        assert "torch" not in {n.split(".")[0] for n in imports(ast.parse(file.read_text()))}


def test_this_test_sees_a_breach():
    text = "def f():\n    from flashcore import pipeline\n    import flashcore.cli\n"
    text += "if TYPE_CHECKING:\n    import flashcore.sweep\n"
    assert breaches("records", imports(ast.parse(text))) == ["cli", "pipeline"]
    assert imports(ast.parse(text), at_module_level=True) == set()
    assert imports(ast.parse("try:\n    import torch\nexcept ImportError:\n    pass"), at_module_level=True) == {
        "torch"
    }
