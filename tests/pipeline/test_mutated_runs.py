"""1,000 random mutations of a run, its gates and its claims: each is answered, in words, and none turns NO-GO into GO.

What is promised, and what is not:

- Whatever lies in the files, every reader gives its result or one of FlashCore's own errors, in one line.
- A run that was judged NO-GO and sealed never says GO while the seal is there, and not when the seal alone was removed:
  its records say that it was sealed. Whoever rewrites records, verdict and seal together is beyond any promise.
- A run that never was sealed does not say GO after one mutation either: what is damaged, gone, renamed or contradicts
  the rest leaves it NO-GO or INCONCLUSIVE. The base is one figure short of GO, the speed of its fastest peer, so that
  losing sight of that figure would show. A figure and all that belongs to it, changed to fit, is what seals are for.
- Markup from any of the files is text on the page, and an executed notebook brings nothing that acts.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

import nbformat
import pytest
from support import mutations
from support import synthetic_records as synthetic
from support.sampling import first
from typer.testing import CliRunner

from flashcore import page
from flashcore.cli import printing
from flashcore.cli.program import app
from flashcore.decision import claims, seal, verdict
from flashcore.errors import FlashCoreError
from flashcore.page.claims import audit_html
from flashcore.page.provenance import provenance_html
from flashcore.paths import data_dir
from flashcore.pipeline import rendering, superseding
from flashcore.problem import PRESETS
from flashcore.records import RunFolder, append_trials, parse_json

GATES = verdict.load_gates()
PROBLEMS = (None, PRESETS["tiny"], PRESETS["report"], PRESETS["latency"])
ONE_SHORT = {**synthetic.FAST, "sdpa-cudnn": 620.0}
"""One peer is faster than our kernel, and nothing else speaks against a GO."""
TRIALS = [t for t in synthetic.gpu_trials(ONE_SHORT) if t.problem in PROBLEMS and t.kind != "build"]
FORMATS = {"json": json.loads, "junit": ElementTree.fromstring, "markdown": str, "github": str}
BLOCK = 50
T = TypeVar("T")


def environment() -> dict:
    """The machine, with what a report writes of the peers that it planned."""
    found = synthetic.environment()
    found["parameters"] = {**found["parameters"], "peers": ["sdpa-math", "sdpa-flash", "sdpa-cudnn"]}
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> tuple[RunFolder, RunFolder]:
    """A run that says NO-GO, sealed, and the same before anybody judged it."""
    folder = tmp_path_factory.mktemp("bases")
    run = synthetic.write_run(folder / "sealed", TRIALS, environment())
    (run.path / "notebooks").mkdir()
    nbformat.write(executed(), run.path / "notebooks" / "01_environment.ipynb")
    append_trials(run.path / "superseded.jsonl", TRIALS[:3])
    decision = verdict.judge(run, gates=GATES)
    assert decision.verdict == "NO-GO" and [gate.id for gate in decision.blocking] == ["report-ahead"]
    plain = RunFolder(shutil.copytree(run.path, folder / "plain"))
    run.append(decision.to_trial(sealed=True))
    seal.seal(run, GATES, verdict=decision.verdict)
    return run, plain


def executed() -> nbformat.NotebookNode:
    """A notebook with an output of each kind."""
    new = nbformat.v4.new_output
    outputs = [
        new("display_data", data={"text/html": "<table><tr><td style='color:red'>1</td></tr></table>"}),
        new("stream", name="stdout", text="hello\n"),
        new("error", ename="ValueError", evalue="no", traceback=["line 1"]),
        new("execute_result", data={"text/plain": "2"}, execution_count=1),
    ]
    cells = [
        nbformat.v4.new_markdown_cell("# Title", id="a"),
        nbformat.v4.new_code_cell("1 + 1", id="b", execution_count=1, outputs=outputs),
    ]
    return nbformat.v4.new_notebook(cells=cells)


# ------------------------------------------------------------------------------------------------------ what is held


class Acting(HTMLParser):
    """What in some HTML would act: scripts, and handlers of elements."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found += [tag] if tag == "script" else []
        self.found += [name for name, _ in attrs if name.startswith("on")]


def answered(reader: Callable[[], T]) -> T | None:
    """What a reader gives, or None where it raised an error of ours in one line."""
    try:
        return reader()
    except FlashCoreError as error:
        assert "\n" not in str(error) and str(error).rstrip().endswith((".", "?")), str(error)
        return None


def as_text(html: str) -> None:
    """Markup of a mutation is text there."""
    assert mutations.MARKUP not in html and "<script>acts" not in html and 'onerror="acts()">' not in html


def said(*arguments: str, reads: Callable[[str], object] = str) -> int:
    """The exit code of a command that was answered; `reads` raises for what is not in the form that was asked for."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert "Traceback" not in done.output
    if done.exit_code != 2:
        reads(done.stdout)
    return done.exit_code


def run_is_answered(run: RunFolder, base: RunFolder, *, aloud: bool) -> None:
    """A run with something changed in it, through what reads runs."""
    sealed = (run.path / seal.FILE).exists()
    decision = answered(lambda: verdict.judge(run, gates=GATES))
    assert decision is None or decision.verdict != "GO"
    state = answered(lambda: seal.check(run, GATES))
    assert state is None or not sealed or not state.holds or means_the_same(run, base)
    answered(lambda: seal.earlier(run))
    if decision is not None:
        on_the_page(decision)
        as_text(provenance_html(run.name, decision, verdict.gather(run)))
        page.resources(run, decision)
    if aloud:
        assert said("verdict", str(run.path)) in (2, 3, 4) and said("verify", str(run.path)) in (0, 2, 3, 4)
        for form, reads in FORMATS.items():
            assert said("verdict", str(run.path), "--format", form, reads=reads) in (2, 3, 4)
        assert said("compare", str(base.path), str(run.path), "--all") in (0, 2)
        assert said("claims", "--run", str(run.path)) in (0, 2)
    answered(lambda: seal.unseal(run))
    planned = synthetic.NOTEBOOKS
    answered(lambda: superseding.set_aside(run, planned[:1], planned=planned))
    answered(lambda: append_trials(run.records_path, TRIALS[:1]))


def means_the_same(run: RunFolder, base: RunFolder) -> bool:
    """Whether the mutation changed no more than white space of a JSON file, or a file that no seal is over."""
    if run.records_path.read_bytes() != base.records_path.read_bytes():
        return False
    names = ("environment.json", seal.FILE)
    with contextlib.suppress(OSError, ValueError):
        return all(parse_json((run.path / n).read_bytes()) == parse_json((base.path / n).read_bytes()) for n in names)
    return False


def on_the_page(decision: verdict.Decision) -> None:
    as_text(page.banner_html(decision) + page.options_html(decision) + page.gates_html(decision))
    as_text(page.blockers_html(decision))


# ------------------------------------------------------------------------------------------------------ the mutations


def one(seed: int, folder: Path, sealed: RunFolder, plain: RunFolder) -> None:
    """One mutation, and all that reads the file."""
    rng = random.Random(seed)
    target = rng.choice(
        ["records"] * 5 + ["environment"] * 2 + ["gates"] * 2 + ["claims", "notebook", "seal", "superseded"]
    )
    aloud = seed % 40 == 0
    if target in ("gates", "claims"):
        path = Path(shutil.copy(data_dir("reports") / f"{target}.toml", folder))
        how = mutations.mutated(rng, path, mutations.toml_changed, most=2)
        with told(seed, how):
            gates_are_answered(path, sealed) if target == "gates" else claims_are_answered(path, sealed, aloud=aloud)
        return
    bare = target in ("records", "environment") and rng.random() < 0.4
    base = plain if bare else sealed
    run = RunFolder(shutil.copytree(base.path, folder / "run"))
    name, change = {
        "records": ("records.jsonl", mutations.lines_changed),
        "environment": ("environment.json", mutations.object_changed),
        "notebook": ("notebooks/01_environment.ipynb", mutations.object_changed),
        "seal": (seal.FILE, mutations.object_changed),
        "superseded": ("superseded.jsonl", mutations.lines_changed),
    }[target]
    how = mutations.mutated(rng, run.path / name, change, most=1 if bare else 3)
    with told(seed, f"{'not sealed, ' if bare else ''}{how}"):
        if target == "notebook":
            found, damaged = rendering._evidence(run)
            assert len(found) + len(damaged) <= 1 and all(not Acting(item["html"]).found for item in found)
        if target == "records" and not bare and rng.random() < 0.1:
            (run.path / seal.FILE).unlink()
        run_is_answered(run, base, aloud=aloud)


@contextlib.contextmanager
def told(seed: int, how: str):
    """Says with a failure which mutation it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"mutation {seed}: {how}")
        raise


def gates_are_answered(path: Path, run: RunFolder) -> None:
    gates = answered(lambda: verdict.load_gates(path))
    if gates is None:
        return
    decision = answered(lambda: verdict.judge(run, gates=gates))
    if decision is not None:
        assert decision.verdict != "GO"
        on_the_page(decision)
        with contextlib.redirect_stdout(io.StringIO()):
            printing.print_decision(decision)


def claims_are_answered(path: Path, run: RunFolder, *, aloud: bool) -> None:
    def audited() -> str:
        audits = claims.audit(claims.load_claims(path), run.trials(), environment=run.environment())
        assert all(json.dumps(found.as_dict()) for found in audits)
        return audit_html(audits)

    as_text(answered(audited) or "")
    if aloud:
        assert said("claims", str(path), "--run", str(run.path)) in (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("block", first(range(20), 1))
def test_whatever_the_files_hold_is_answered_and_none_turns_no_go_into_go(tmp_path, bases, block):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of records that are damaged, as they should be
        for seed in range(block * BLOCK, (block + 1) * BLOCK):
            folder = tmp_path / str(seed)
            folder.mkdir()
            one(seed, folder, *bases)
