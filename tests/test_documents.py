"""What the documents name exists: files, folders, modules and functions."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashcore

ROOT = Path(flashcore.__file__).parent.parent
if not (ROOT / "docs").is_dir():
    pytest.skip("these tests read the checkout, and FlashCore runs from an install here", allow_module_level=True)

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/batch-invariance.md", "docs/ci.md",
             "docs/many-gpus.md", "docs/parallel.md", "kernels/README.md"]  # fmt: skip
HOMES = ["", "flashcore", "kernels", "kernels/include"]
"""Folders from which a document may name a file."""
SUFFIXES = ("py", "cu", "cuh", "toml", "ipynb", "svg", "md")
MADE = {"mine", "attention_mine", "NN_name", "runs"}
"""Names of what a reader makes; so is whatever has <angle brackets>. The folder that it goes to has to exist."""
ROOMS = [p.stem for p in (ROOT / "flashcore").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()]


def paths_named(text: str) -> Iterator[str]:
    """Files and folders that a document names in backticks, or in a block of code as the first word of a line."""
    for word in [*re.findall(r"`([^`\s]+)`", text), *re.findall(r"^ {4}(\S+/)(?=\s)", text, flags=re.MULTILINE)]:
        if re.fullmatch(rf"[\w./<>-]+(\.({'|'.join(SUFFIXES)})|/)", word) and not word.startswith("."):
            yield word


def names_named(text: str) -> Iterator[str]:
    """Dotted names under the package: in backticks, with or without `flashcore.`, and in lines that import."""
    for module, names in re.findall(r"from (flashcore[\w.]*) import ([\w, ]+)", text):
        yield from (f"{module}.{name.strip()}" for name in names.split(","))
    for word in re.findall(r"(?:`|\b(?<![\w/.]))((?:\w+\.)+\w+)\b", text):
        head, _, rest = word.partition(".")
        if rest.rpartition(".")[2] in (*SUFFIXES, "jsonl", "json", "html", "pdf"):
            continue
        if head == "flashcore":
            yield word
        elif head in ROOMS:
            yield f"flashcore.{word}"


def exists(path: str) -> bool:
    parts = path.strip("/").split("/")
    there = list(itertools.takewhile(lambda part: part.partition(".")[0] not in MADE and "<" not in part, parts))
    return any(ROOT.joinpath(home, *there).exists() for home in HOMES)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or what a module or a class in it holds."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for part in parts[depth:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_and_folder_that_a_document_names_exists(name):
    assert [path for path in paths_named((ROOT / name).read_text()) if not exists(path)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_dotted_name_of_the_package_in_a_document_exists(name):
    assert [word for word in names_named((ROOT / name).read_text()) if not resolves(word)] == []


def test_these_tests_see_what_is_not_there():
    text = "`nowhere.py`, `gpu/`, `no/mine.py`, `flashcore/page/mine.py`\n    tests/  docs\n`git/x.txt` `a/`\n"
    assert list(paths_named(text)) == [
        "nowhere.py", "gpu/", "no/mine.py", "flashcore/page/mine.py", "a/", "tests/",
    ]  # fmt: skip
    assert [path for path in paths_named(text) if not exists(path)] == ["nowhere.py", "no/mine.py", "a/"]
    text = "`gpu.build.no_such` `records.jsonl` `Trace.previous` flashcore.paging\nfrom flashcore.cli import app, x\n"
    missing = [word for word in names_named(text) if not resolves(word)]
    assert missing == ["flashcore.cli.x", "flashcore.gpu.build.no_such"]
    assert "flashcore.paging" in names_named(text)


@pytest.mark.slow
def test_the_snippets_of_the_readme_run_one_after_the_other_without_a_gpu(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = (ROOT / "README.md").read_text()
    before, _, rest = text.partition("### In a model\n")  # these run in test_readme_models.py: they need a model
    snippets = re.findall(r"```python\n(.*?)```", before + rest[rest.index("To check a kernel") :], flags=re.DOTALL)
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
        if "print(flashcore.diagnose(" in snippet:
            [shown] = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
            printed = capsys.readouterr().out
            # What torch says when it refuses, what the clock says and how many elements lie at a bound is not ours.
            outputs = (re.sub(r"[\d,]+ wrong elements", "N wrong elements", out) for out in (shown, printed))
            kept = [[line for line in out.splitlines()[:-1] if "RuntimeError" not in line] for out in outputs]
            assert kept[0] == kept[1] and len(kept[0]) == 9
    assert len(snippets) == 6 and names["lse"].shape == (1, 8, 512) and names["out"].shape == (2, 32, 1, 128)
    assert names["ragged"].shape == (512, 8, 64) and names["lse_of_rows"].shape == (8, 512)
    assert "row_max" in capsys.readouterr().out


def test_the_documents_name_enough_for_these_tests_to_mean_something():
    text = (ROOT / "docs/architecture.md").read_text()
    assert len(list(paths_named(text))) > 15 and len(list(names_named(text))) > 5
