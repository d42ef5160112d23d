"""The seal: each kind of edit made beside FlashCore is named, what FlashCore does itself breaks nothing."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable

import pytest
from support import synthetic_records as synthetic
from support.sampling import sampled

from flashcore.decision import seal, verdict
from flashcore.decision.gates import Gates, load_gates
from flashcore.errors import RecordsError
from flashcore.paths import data_dir
from flashcore.records import RunFolder, Trial, append_trials

GATES = load_gates()


def sealed(folder, speed=synthetic.FAST) -> RunFolder:
    """A whole run with verdict, seal, page, PDF, an executed notebook and superseded records."""
    trials = synthetic.gpu_trials(speed)
    run = synthetic.write_run(folder, trials, synthetic.environment())
    (run.path / "notebooks").mkdir()
    for name in ("01_environment", "04_tflops_sweep"):
        (run.path / "notebooks" / f"{name}.ipynb").write_text('{"cells": [], "nbformat": 4}')
    append_trials(run.path / "superseded.jsonl", trials[:3])
    decision = verdict.judge(run, gates=GATES)
    run.append(decision.to_trial(sealed=True))
    seal.seal(run, GATES, verdict=decision.verdict)
    for name in seal.PAGES:
        (run.path / name).write_text(f"the page: {decision.verdict}")
    seal.seal_pages(run)
    return run


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sealed run that says GO."""
    return sealed(tmp_path_factory.mktemp("good") / "run")


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A sealed run that says NO-GO."""
    return sealed(tmp_path_factory.mktemp("bad") / "run", synthetic.SPEED)


@pytest.fixture
def run(good, tmp_path):
    """A copy of the run that says GO, to be edited."""
    return RunFolder(shutil.copytree(good.path, tmp_path / "run"))


def test_an_untouched_run_holds_and_says_so(good, bad):
    for run, word in ((good, "GO"), (bad, "NO-GO")):
        state = seal.check(run, GATES)
        assert state.holds and state.changes == () and state.sentence.endswith(" holds.")
        decision = verdict.judge(run)
        assert decision.verdict == word and decision.stored == "" and state.digest in decision.seal


# ------------------------------------------------------------------------------------------------- edits by hand


def lines_of(run: RunFolder) -> list[str]:
    return run.records_path.read_text().splitlines()


def put(run: RunFolder, lines: list[str]) -> None:
    run.records_path.write_text("".join(f"{line}\n" for line in lines))


def place_of(run: RunFolder, **wanted) -> int:
    """Number of the first record with these fields."""
    return next(i for i, line in enumerate(lines_of(run)) if wanted.items() <= json.loads(line).items())


def record(change: Callable[[dict], None], **wanted) -> Callable[[RunFolder], None]:
    """Change the first record with these fields."""

    def edit(run: RunFolder) -> None:
        lines, place = lines_of(run), place_of(run, **wanted)
        fields = json.loads(lines[place])
        change(fields)
        put(run, [*lines[:place], json.dumps(fields), *lines[place + 1 :]])

    return edit


def environment(change: Callable[[dict], None]) -> Callable[[RunFolder], None]:
    def edit(run: RunFolder) -> None:
        fields = run.environment()
        change(fields)
        run.environment_path.write_text(json.dumps(fields))

    return edit


def removed(name: str) -> Callable[[RunFolder], None]:
    return lambda run: (run.path / name).unlink()


def appended(name: str, text: str) -> Callable[[RunFolder], None]:
    return lambda run: (run.path / name).write_text((run.path / name).read_text() + text)


def in_seal(change: Callable[[dict], None]) -> Callable[[RunFolder], None]:
    def edit(run: RunFolder) -> None:
        fields = json.loads((run.path / seal.FILE).read_text())
        change(fields)
        (run.path / seal.FILE).write_text(json.dumps(fields))

    return edit


def whole(change: Callable[[list[str]], list[str]]) -> Callable[[RunFolder], None]:
    return lambda run: put(run, change(lines_of(run)))


TIMED = {"kind": "attention_timing", "backend": "wmma"}
PEER = {"kind": "attention_timing", "backend": "sdpa-cudnn"}
CHECKED = {"kind": "correctness", "backend": "wmma"}
EDITS: dict[str, tuple[str, Callable[[RunFolder], None]]] = {
    # records: figures of ours, of peers, checks, what they claim to be of
    "a latency of ours": ("records", record(lambda r: r["timing"].update(latency_us=1.0), **TIMED)),
    "a sample of ours": ("records", record(lambda r: r["timing"]["samples_us"].pop(), **TIMED)),
    "TFLOPS of ours": ("records", record(lambda r: r["timing"].update(tflops=900), **TIMED)),
    "the way of timing": ("records", record(lambda r: r["timing"].update(method="events"), **TIMED)),
    "the state of the cache": ("records", record(lambda r: r["timing"].update(l2="warm"), **TIMED)),
    "the round of a timing": ("records", record(lambda r: r["timing"].update(round="x"), **TIMED)),
    "a latency of a peer": ("records", record(lambda r: r["timing"].update(latency_us=9e9), **PEER)),
    "a peer unavailable": ("records", record(lambda r: r.update(status="unavailable"), **PEER)),
    "a peer unsupported": ("records", record(lambda r: r.update(status="unsupported"), **PEER)),
    "a peer renamed": ("records", record(lambda r: r.update(backend="sdpa-other"), **PEER)),
    "ours renamed": ("records", record(lambda r: r.update(backend="hopper"), **TIMED)),
    "a check made wrong": ("records", record(lambda r: r["correctness"].update(passed=False), **CHECKED)),
    "the error of a check": ("records", record(lambda r: r["correctness"].update(max_abs_error=0.0), **CHECKED)),
    "the bound of a check": ("records", record(lambda r: r["correctness"].update(bound=9.0), **CHECKED)),
    "elements compared": ("records", record(lambda r: r["correctness"].update(checked=10**9), **CHECKED)),
    "elements out of bound": ("records", record(lambda r: r["correctness"].update(num_bad=1), **CHECKED)),
    "the problem of a check": ("records", record(lambda r: r["problem"].update(seqlen_q=1), **CHECKED)),
    "the source of a check": ("records", record(lambda r: r.update(source_hash="0" * 16), **CHECKED)),
    "the machine of a check": ("records", record(lambda r: r.update(environment="env-other"), **CHECKED)),
    "the time of a record": ("records", record(lambda r: r.update(time="2001-01-01T00:00:00+00:00"), **CHECKED)),
    "a reason": ("records", record(lambda r: r.update(reason="so it was"), **CHECKED)),
    "a variant": ("records", record(lambda r: r.update(variant="other"), **CHECKED)),
    "a field more": ("records", record(lambda r: r.update(note="by hand"), **CHECKED)),
    "the version of a line": ("records", record(lambda r: r.update(schema_version=0), **CHECKED)),
    "a ceiling": ("records", record(lambda r: r["data"].update(value=9999), kind="ceiling")),
    "registers of a build": ("records", record(lambda r: r["data"].update(registers=1), kind="build")),
    "memory saved": ("records", record(lambda r: r["data"].update(saved_percent=99.0), kind="paging")),
    "a notebook's mark": ("records", record(lambda r: r.update(status="error"), kind="notebook")),
    "the verdict's word": ("records", record(lambda r: r["data"].update(verdict="NO-GO"), kind="verdict")),
    "the verdict without its seal": ("records", record(lambda r: r["data"].pop("sealed"), kind="verdict")),
    # records as a file
    "a line deleted": ("records", whole(lambda lines: lines[:40] + lines[41:])),
    "the first line deleted": ("records", whole(lambda lines: lines[1:])),
    "the last line deleted": ("records", whole(lambda lines: lines[:-1])),
    "all of a backend deleted": ("records", whole(lambda lines: [x for x in lines if '"sdpa-cudnn"' not in x])),
    "a line twice": ("records", whole(lambda lines: [*lines[:9], lines[8], *lines[9:]])),
    "a line added": ("records", whole(lambda lines: [*lines, synthetic.memory_saved(99.0).model_dump_json()])),
    "two lines exchanged": ("records", whole(lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]])),
    "white space in a line": ("records", whole(lambda lines: [lines[0] + " ", *lines[1:]])),
    "an empty line": ("records", whole(lambda lines: [*lines[:5], "", *lines[5:]])),
    # the environment
    "the GPU": ("environment", environment(lambda e: e.update(gpu="NVIDIA H100"))),
    "no GPU": ("environment", environment(lambda e: e.update(gpu=None))),
    "the environment's id": ("environment", environment(lambda e: e.update(id="env-other"))),
    "the date": ("environment", environment(lambda e: e.update(date="2031-01-01"))),
    "the notebooks planned": ("environment", environment(lambda e: e["parameters"].update(notebooks=[]))),
    "a kernel's hash": ("environment", environment(lambda e: e["kernels"].update(attention_wmma="0" * 16))),
    "the commit": ("environment", environment(lambda e: e["git"].update(commit="1" * 40))),
    "the driver": ("environment", environment(lambda e: e["before"].update(driver="1"))),
    "the state after": ("environment", environment(lambda e: e.pop("after"))),
    "a key more": ("environment", environment(lambda e: e.update(note="by hand"))),
    # what lies beside
    "the page": ("pages", appended("report.html", "GO")),
    "the PDF": ("pages", appended("report.pdf", "GO")),
    "the page removed": ("pages", removed("report.html")),
    "an executed notebook": ("files", appended("notebooks/01_environment.ipynb", " ")),
    "an executed notebook removed": ("files", removed("notebooks/01_environment.ipynb")),
    "an executed notebook more": ("files", lambda run: (run.path / "notebooks" / "09_x.ipynb").write_text("{}")),
    "superseded records": ("files", appended("superseded.jsonl", "{}\n")),
    "superseded records removed": ("files", removed("superseded.jsonl")),
    # the seal itself
    "the seal removed": ("seal", removed(seal.FILE)),
    "the seal emptied": ("seal", lambda run: (run.path / seal.FILE).write_text("")),
    "a hash in the seal": ("seal", in_seal(lambda s: s["records"].__setitem__(3, "0" * 16))),
    "the date of the seal": ("seal", in_seal(lambda s: s.update(date="2031-01-01"))),
    "the history of the seal": ("seal", in_seal(lambda s: s.update(earlier=[{"digest": "x"}]))),
    "the page's hash in the seal": ("seal", in_seal(lambda s: s["pages"].update({"report.pdf": "0" * 16}))),
    "another version of the seal": ("seal", in_seal(lambda s: s.update(version=2))),
    "a seal that is a list": ("seal", lambda run: (run.path / seal.FILE).write_text("[1]")),
}


def test_there_are_enough_kinds_of_edits():
    assert len(EDITS) >= 46


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_is_named(run, what):
    part, edit = EDITS[what]
    edit(run)
    trials = verdict.gather(run, gates=GATES).seal
    assert not trials.holds and part in {change.part for change in trials.changes}, trials
    assert all(change.sentence.endswith(".") for change in trials.changes)
    assert "does not hold" in trials.sentence


@pytest.mark.parametrize(
    ("what", "before"),  # each edit of one of the two runs
    sampled(itertools.product((w for w, (part, _) in EDITS.items() if part in seal.EVIDENCE), ["GO", "NO-GO"])),
)
def test_a_run_whose_evidence_was_edited_is_never_go(good, bad, tmp_path, before, what):
    run = RunFolder(shutil.copytree((good if before == "GO" else bad).path, tmp_path / "run"))
    EDITS[what][1](run)
    decision = verdict.judge(run)
    assert decision.verdict == "INCONCLUSIVE", decision.reason
    assert "does not hold" in decision.seal


def test_the_sentence_says_which_record_was_changed(run):
    place = place_of(run, **TIMED)
    EDITS["a latency of ours"][1](run)
    [change] = seal.check(run).changes
    assert change.sentence == (f"records.jsonl: line {place + 1} (attention_timing of wmma) is not as it was sealed.")


def test_the_state_is_one_sentence(run):
    digest = json.loads((run.path / seal.FILE).read_text())["digest"]
    assert len(digest) == seal.HEX
    date = seal.check(run).date
    for name, more in (("the PDF", ""), ("the GPU", " (1 more change)"), ("the driver", " (1 more change)")):
        EDITS[name][1](run)
        state = seal.check(run)
        first = state.changes[0].sentence
        assert state.sentence == f"Seal {digest} of {date} does not hold: {first}{more}"
    EDITS["an executed notebook"][1](run)
    assert seal.check(run).sentence.endswith(" (2 more changes)")
    EDITS["the seal removed"][1](run)
    gone = f"The run was sealed at its verdict, and {seal.FILE} is gone."
    assert seal.check(run, sealed_before=True).sentence == f"The seal does not hold: {gone}"
    assert seal.check(run).sentence == "This run carries no seal."
    assert seal.seal(run, GATES, verdict="GO") == seal.check(run).digest


def test_records_that_are_gone_are_one_sentence(run):
    run.records_path.unlink()
    with pytest.raises(RecordsError, match="records.jsonl cannot be read .*; restore the file"):
        seal.check(run)


def test_lines_that_are_gone_or_in_another_order_are_told_apart(run, good, tmp_path):
    EDITS["a line deleted"][1](run)
    [change] = seal.check(run).changes
    assert "1 line that was sealed is gone, the first after line 40" in change.sentence
    other = RunFolder(shutil.copytree(good.path, tmp_path / "other"))
    EDITS["two lines exchanged"][1](other)
    [change] = seal.check(other).changes
    assert "lines 6 to 7 stand in another order" in change.sentence


def test_what_came_after_the_seal_is_named(run):
    lines = lines_of(run)
    EDITS["a line added"][1](run)
    [change] = seal.check(run).changes
    assert change.sentence == f"records.jsonl: line {len(lines) + 1} (paging) was added after the seal."
    added = synthetic.memory_saved(99.0).model_dump_json()
    put(run, [*lines[:5], added, lines[6], lines[5], *lines[7:]])
    [change] = seal.check(run).changes
    assert change.sentence == "records.jsonl: line 6 (paging) was added after the seal.", "others moved and were there"
    put(run, lines)
    seal.seal(run, GATES, verdict="GO", earlier=seal.unseal(run))
    [change] = seal.check(run, GATES).changes
    assert change.part == "pages" and change.sentence == "report.html, report.pdf were added after the seal."


def test_other_gates_are_named_and_decide_nothing_until_the_run_is_sealed_by_them(run):
    lower = [g.model_copy(update={"at_least": 1.0}) if g.id == "report-320" else g for g in GATES]
    gates = Gates(GATES.path, tuple(lower), GATES.options, GATES.rank_options_by)
    state = seal.check(run, gates)
    assert [c.part for c in state.changes] == ["gates"] and "gate report-320" in state.changes[0].sentence
    assert verdict.judge(run, gates=gates).verdict == "INCONCLUSIVE"
    seal.seal(run, gates, verdict="GO", earlier=seal.unseal(run))
    assert verdict.judge(run, gates=gates).verdict == "GO"


def test_other_kernel_source_and_other_claims_are_named(run, monkeypatch, tmp_path):
    hashes = {**synthetic.HASHES, "attention_wmma": "0" * 16}
    monkeypatch.setattr("flashcore.gpu.build.source_hashes", lambda: {**hashes, "attention_new": "1" * 16})
    claims = tmp_path / "claims.toml"
    shutil.copy(data_dir("reports") / "claims.toml", claims)
    claims.write_text(claims.read_text() + "\n# by hand\n")
    monkeypatch.setattr(seal, "_claims_path", lambda: claims)
    state = seal.check(run, GATES)
    assert {c.part for c in state.changes} == {"kernels", "claims"}
    assert "kernel source attention_wmma is not as it was sealed." in state.of(("kernels",))
    assert not any("attention_new" in c.sentence for c in state.changes), (
        "a kernel that came later was judged by nobody"
    )


def test_a_stored_verdict_that_differs_from_todays_is_said(tmp_path):
    trials = synthetic.gpu_trials(synthetic.SPEED)
    run = synthetic.write_run(tmp_path / "run", trials, synthetic.environment())
    for word in ("INCONCLUSIVE", "GO"):  # the newest one counts
        run.append(Trial(kind="verdict", data={"verdict": word}))
    decision = verdict.judge(run)
    assert decision.verdict == "NO-GO" and "was GO; judged today it is NO-GO" in decision.stored
    assert decision.seal == "This run carries no seal."


# -------------------------------------------------------------------------------------- what FlashCore does itself


def test_records_that_flashcore_adds_come_under_the_seal(run):
    before = seal.check(run, GATES).digest
    with seal.additions(run, GATES):
        run.append(synthetic.memory_saved(70.4))
    state = seal.check(run, GATES).without("pages")
    assert state.holds and state.digest != before and verdict.judge(run).stored == ""
    [sentence] = seal.earlier(run)
    assert before in sentence and "held" in sentence and "records were added by FlashCore" in sentence


def test_nothing_added_to_doubtful_records_makes_them_better(run):
    EDITS["a latency of ours"][1](run)
    with seal.additions(run, GATES):
        run.append(synthetic.memory_saved(70.4))
    assert not seal.check(run).holds and verdict.judge(run).verdict == "INCONCLUSIVE"


def test_what_was_added_before_an_interruption_comes_under_the_seal_too(run):
    with pytest.raises(KeyboardInterrupt), seal.additions(run, GATES):
        run.append(synthetic.memory_saved(70.4))
        raise KeyboardInterrupt
    assert seal.check(run, GATES).without("pages").holds


def test_a_new_seal_keeps_what_was_wrong_under_the_old_one(run):
    EDITS["a latency of ours"][1](run)
    seal.seal(run, GATES, verdict="GO", earlier=seal.unseal(run))
    assert seal.check(run).without("pages").holds
    [sentence] = seal.earlier(run)
    assert "did not hold: records.jsonl: line" in sentence and sentence.endswith("; then it was sealed anew.")
    assert ".;" not in sentence


def test_a_run_kept_without_its_notebooks_still_holds(good, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("records.jsonl", "environment.json", seal.FILE, *seal.PAGES, "superseded.jsonl"):
        shutil.copy(good.path / name, kept)
    assert seal.check(RunFolder(kept), GATES).holds


def test_a_recorded_run_that_was_edited_decides_nothing_where_it_is_borrowed(good, tmp_path):
    recorded = tmp_path / "recorded"
    shutil.copytree(good.path, recorded / "h200")
    own = synthetic.write_run(tmp_path / "own", synthetic.cpu_trials(), synthetic.environment(gpu=None))
    assert verdict.judge(own, recorded_dir=recorded).verdict == "GO"
    EDITS["a latency of ours"][1](RunFolder(recorded / "h200"))
    assert verdict.judge(own, recorded_dir=recorded).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("key", ["records", "environment", "files", "gates", "claims", "kernels", "pages", "earlier"])
@pytest.mark.parametrize("value", ["gone", None, 3, "text", [3], {"a": []}])
def test_a_seal_that_lacks_a_part_or_holds_another_does_not_hold(run, key, value):
    """Also where its digest was made to fit."""
    path = run.path / seal.FILE
    found = json.loads(path.read_text())
    if value == "gone":
        del found[key]
    else:
        found[key] = value
    path.write_text(json.dumps({**found, "digest": seal._digest(found)}))
    state = seal.check(run, GATES)
    assert not state.holds or key in ("earlier", "pages")
    assert all(isinstance(sentence, str) for sentence in seal.earlier(run))
    assert isinstance(seal.unseal(run), list) and not path.exists()


def test_a_folder_in_the_place_of_the_seal_is_one_sentence(run):
    (run.path / seal.FILE).unlink()
    (run.path / seal.FILE).mkdir()
    assert verdict.judge(run).verdict == "INCONCLUSIVE"
    with pytest.raises(RecordsError, match="cannot be removed .*; remove it by hand"):
        seal.unseal(run)


def test_the_forms_of_a_kernel_are_told_in_words():
    before = {"a": "1", "a with options": "2", "b": "3", "b with options": "4"}
    said = seal._differing(before, {**before, "a": "x", "a with options": "y"}, "kernel source ")
    assert said == ["kernel source a is not as it was sealed."]
    said = seal._differing(before, {**before, "b with options": "y"}, "kernel source ")
    assert said == ["kernel source b (its masked and batch-invariant forms) is not as it was sealed."]


def test_a_page_that_another_process_draws_while_it_is_sealed_is_sealed_as_it_then_is(tmp_path, monkeypatch):
    """Whoever draws last seals last, but the one before may have read the page in between, and write later."""
    run = sealed(tmp_path / "run")
    (run.path / "report.html").write_text("drawn here")

    def write(run, made, real=seal._write):
        if not written:
            (run.path / "report.html").write_text("drawn there")
        written.append(made)
        real(run, made)

    written = []
    monkeypatch.setattr(seal, "_write", write)
    seal.seal_pages(run)
    assert seal.check(run, GATES).of(("pages",)) == [] and len(written) == 2
