"""Records: what is written is read back, and what a killed writer leaves behind spoils nothing."""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from flashcore import records
from flashcore.errors import RecordsDamaged, RecordsError, RecordsTooNew
from flashcore.paths import data_dir
from flashcore.problem import PRESETS, Problem, square
from flashcore.records import (
    SCHEMA_VERSION,
    Correctness,
    Ledger,
    RunFolder,
    Timing,
    Trial,
    append_trials,
    read_trials,
    readable_trials,
)

needs_modes = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere, so a mode keeps nobody out")


def timing(backend: str = "wmma") -> Trial:
    return Trial(
        kind="attention_timing",
        backend=backend,
        problem=PRESETS["report"],
        timing=Timing(
            method="graph_replay", latency_us=556.1, samples_us=[550.0, 556.1, 560.2], tflops=494.3, round="r1"
        ),
        source_hash="0123456789abcdef",
    )


def test_a_trial_reads_back_as_it_was_written(run):
    written = run.append(timing())
    assert run.trials() == [written]
    assert run.trials(kind="correctness") == []


def test_a_line_has_the_shape_that_others_read(run):
    run.append(timing())
    line = json.loads(run.records_path.read_text())
    assert line["schema_version"] == SCHEMA_VERSION == 1
    assert line["kind"] == "attention_timing"
    assert line["problem"]["num_heads_q"] == 16 and line["problem"]["causal"] is False
    assert line["timing"]["latency_us"] == 556.1 and line["timing"]["round"] == "r1"


def test_nan_and_infinity_survive_and_the_line_stays_plain_json(run):
    found = Correctness(
        passed=False, checked=4, num_bad=2, max_abs_error=math.nan, bound=1e-3, lse_max_abs_error=math.inf
    )
    run.append(Trial(kind="correctness", backend="wmma", status="failed", reason="wrong", correctness=found))
    json.loads(run.records_path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = run.trials()[0].correctness
    assert math.isnan(back.max_abs_error) and back.lse_max_abs_error == math.inf


def test_keys_that_are_not_known_yet_are_kept(run):
    run.append(Trial(kind="ceiling", colour="blue"))
    assert run.trials()[0].colour == "blue"


def test_a_trial_names_the_environment_it_was_measured_in(run):
    run.environment_path.write_text('{"id": "env-1"}')
    assert run.append(timing()).environment == "env-1"
    assert run.append(timing().model_copy(update={"environment": "env-0"})).environment == "env-0"


def test_a_cut_off_last_line_is_left_out_with_a_warning_that_names_it(run):
    run.append(timing("scalar"))
    run.append(timing("wmma"))
    text = run.records_path.read_text()
    run.records_path.write_text(text[:-40])
    with pytest.warns(RuntimeWarning, match=r"records\.jsonl, line 2 "):
        assert [t.backend for t in run.trials()] == ["scalar"]
    with pytest.raises(RecordsDamaged) as caught:
        read_trials(run.records_path, on_damage="raise")
    assert [t.backend for t in caught.value.trials] == ["scalar"] and caught.value.line == 2


def test_appending_after_a_cut_off_line_spoils_no_new_record(run):
    run.append(timing("scalar"))
    with run.records_path.open("a") as file:
        file.write('{"schema_version": 1, "ki')
    run.append(timing("wmma"))
    with pytest.warns(RuntimeWarning, match="line 2"):
        assert [t.backend for t in run.trials()] == ["scalar", "wmma"]


@pytest.mark.parametrize(
    "line", ["7", "[]", "null", '{"kind": "no such kind"}', '{"kind": "ceiling", "data": 3}', "\x00\x00"]
)
def test_a_line_that_is_no_record_is_damage_and_not_a_crash(run, line):
    run.append(timing())
    with run.records_path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RecordsDamaged, match="line 2"):
        read_trials(run.records_path, on_damage="raise")


def test_a_newer_schema_is_refused_and_says_both_versions(run):
    run.append(timing())
    with run.records_path.open("a") as file:
        file.write(json.dumps({"schema_version": SCHEMA_VERSION + 1, "kind": "telepathy"}) + "\n")
    with pytest.raises(RecordsTooNew, match=f"{SCHEMA_VERSION + 1}.*up to {SCHEMA_VERSION}"):
        run.trials()


def test_a_missing_run_or_records_file_is_one_clear_error(tmp_path):
    with pytest.raises(RecordsError, match="no run folder"):
        RunFolder(tmp_path / "nowhere")
    with pytest.raises(RecordsError, match="cannot be read"):
        read_trials(tmp_path / "records.jsonl")


def test_a_damaged_environment_is_one_clear_error(run):
    run.environment_path.write_text('{"id": ')
    with pytest.raises(RecordsError, match=r"environment\.json cannot be read"):
        run.environment()


def test_a_run_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordsError, match="cannot be written .*--out"):
        RunFolder.create(tmp_path / "file" / "run")


@needs_modes
def test_a_read_only_folder_is_one_clear_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RecordsError, match="--out"):
        RunFolder.create(tmp_path / "run")


def test_a_folder_that_is_there_is_taken_with_what_it_holds(run):
    written = run.append(timing())
    assert RunFolder.create(run.path).trials() == [written]


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_failed_write_left_is_taken_back_only_where_nobody_else_writes(run, monkeypatch, locks):
    run.append(timing("scalar"))
    before, write = run.records_path.read_bytes(), os.write

    def no_lock(*arguments):
        raise OSError("no locks here")

    def part_of_it(descriptor, content):
        if len(content) < 100:
            raise OSError(28, "No space left on device")
        return write(descriptor, content[:-50])

    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_lock)
    with monkeypatch.context() as full:
        full.setattr(os, "write", part_of_it)
        with pytest.raises(RecordsError, match="No space left"):
            run.append(timing("wmma"))
    left = run.records_path.read_bytes()[len(before) :]
    assert (left == b"") == locks, "another writer may have added to it"
    run.append(timing("cpu"))
    found, damage = readable_trials(run.records_path)
    assert [t.backend for t in found] == ["scalar", "cpu"] and bool(damage) == (not locks)


def test_a_full_disk_is_one_clear_error(run):
    run.records_path.unlink()
    run.records_path.symlink_to("/dev/full")
    with pytest.raises(RecordsError, match="No space left"):
        run.append(timing())


def _append_many(path, backend):
    for _ in range(50):
        append_trials(path, [timing(backend)])


@pytest.mark.slow
def test_several_processes_may_append_at_once(run):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(run.records_path, name)) for name in ("scalar", "wmma")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = [t.backend for t in read_trials(run.records_path, on_damage="raise")]
    assert found.count("scalar") == found.count("wmma") == 50


def test_masks_of_a_problem_are_written_only_where_there_are_some_and_read_back(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    plain = square(1, 2, 8, 64, causal=True)
    masked = plain.with_(window_left=4, softcap=30.0, sink=True, lengths="ragged")
    for problem in (plain, masked):
        run.append(Trial(kind="correctness", backend="cpu", problem=problem))
    lines = [json.loads(line)["problem"] for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    new = {"window_left": 4, "softcap": 30.0, "sink": True, "lengths": "ragged"}
    assert not set(new) & set(lines[0]) and lines[1] == lines[0] | new
    assert [trial.problem for trial in run.trials()] == [plain, masked]


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_problems_of_recorded_runs_know_nothing_of_batch_invariance_and_are_what_they_were(name, tmp_path):
    lines = (data_dir("reports") / "recorded" / name / "records.jsonl").read_text().splitlines()
    written = {json.dumps(line["problem"]): line["problem"] for line in map(json.loads, lines) if "problem" in line}
    found = [Problem(**fields) for fields in written.values()]
    assert len(found) > 50 and not any(problem.batch_invariant for problem in found)
    run = RunFolder.create(tmp_path / "run")
    append_trials(run.records_path, [Trial(kind="correctness", problem=problem) for problem in found])
    again = [json.loads(line)["problem"] for line in run.records_path.read_text().splitlines()]
    assert all(after.items() <= before.items() for before, after in zip(written.values(), again, strict=True))
    assert [trial.problem for trial in run.trials()] == found
    run.append(Trial(kind="correctness", problem=found[0].with_(batch_invariant=True)))
    *_, last = run.records_path.read_text().splitlines()
    assert json.loads(last)["problem"] == again[0] | {"batch_invariant": True}


def test_a_ledger_keeps_what_it_was_told_of_apart_from_what_it_is_given():
    known, made = Trial(kind="ceiling", data={"name": "read"}), Trial(kind="paging", status="failed", reason="no")
    ledger = Ledger([known])
    assert ledger.append(made) is made and ledger.made == [made]
    assert ledger.trials() == [known, made] and ledger.trials(kind="ceiling", status="ok") == [known]


def test_a_record_names_its_card_and_node_only_where_several_share_a_run(run):
    run.append(Trial(kind="ceiling"))
    run.append(Trial(kind="ceiling", card="GPU-1a2b", node="box"))
    first, second = run.records_path.read_text().splitlines()
    assert "card" not in first and "node" not in first and '"card":"GPU-1a2b","node":"box"' in second
    assert [(t.card, t.node) for t in run.trials()] == [(None, None), ("GPU-1a2b", "box")]


@pytest.fixture
def half_a_record(run):
    """A record of which another process has written one half, and holds the file until it has written the rest."""
    run.append(timing("first"))
    whole = run.records_path.read_bytes().replace(b'"first"', b'"second"').replace(b'"id":"', b'"id":"0')
    with open(run.records_path, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(whole[: len(whole) // 2])

        def the_rest():
            file.write(whole[len(whole) // 2 :])
            fcntl.flock(file, fcntl.LOCK_UN)

        yield the_rest


def test_who_reads_while_another_process_writes_a_record_sees_it_whole_or_not_at_all(run, half_a_record, monkeypatch):
    monkeypatch.setattr(records, "WRITER_S", 600.0)  # of a busy machine; nothing is judged by it
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(readable_trials, run.records_path)
        time.sleep(0.1)  # it is under way
        half_a_record()
        trials, damage = found.result()
    assert [t.backend for t in trials] == ["first", "second"] and damage == ()


def test_a_writer_that_somebody_stopped_keeps_no_reader_waiting(run, half_a_record, monkeypatch):
    monkeypatch.setattr(records, "WRITER_S", 0.05)
    trials, damage = readable_trials(run.records_path)
    assert [t.backend for t in trials] == ["first"] and "line 2" in damage[0]


def test_a_record_that_comes_while_a_file_is_read_is_not_read_by_half(run, tmp_path):
    """Lines are read up to the size that the file had between two writers."""
    run.append(timing("first"))
    with open(run.records_path, "rb") as file:
        state = records._between_writers(file)
        with open(run.records_path, "a") as more:
            more.write('{"kind":"attention_timing","backend":')
        assert len(list(records._lines_of(file, state))) == 1
    records.copy_records(run.records_path, tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == run.records_path.read_text()


def test_a_line_that_another_writer_was_killed_in_while_this_one_waited_is_closed(run, monkeypatch):
    """The file was empty when it was opened, and is not any more when it can be written to."""

    def waited(file, how):
        if how == fcntl.LOCK_EX:
            with open(run.records_path, "ab") as other:
                other.write(b'{"kind":')
        return None

    monkeypatch.setattr(records.fcntl, "flock", waited)
    run.append(timing("mine"))
    trials, damage = readable_trials(run.records_path)
    assert [t.backend for t in trials] == ["mine"] and "line 1" in damage[0]


def test_a_record_goes_into_the_file_that_has_come_into_its_place_meanwhile(run):
    """As when a part is measured again, and its older records are set aside."""
    run.append(timing("first"))
    with ThreadPoolExecutor(1) as pool:
        with records.held(run.records_path):
            written = pool.submit(run.append, timing("second"))
            time.sleep(0.1)  # it waits for the file as it was
            records.write_whole(run.records_path, run.records_path.read_bytes())
        written.result()
    assert [t.backend for t in run.trials()] == ["first", "second"]


def test_a_file_system_that_cannot_tell_files_apart_takes_records(run, monkeypatch):
    monkeypatch.setattr(records.os.path, "samestat", lambda one, other: False)
    run.append(timing("kept"))
    assert [t.backend for t in run.trials()] == ["kept"]


@pytest.fixture
def threads_take_turns():
    """Switch threads as often as Python can, so that two meet in the middle of anything."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_several_threads_may_read_at_once(tmp_path, threads_take_turns):
    """More files than are kept, so that each reading also forgets one; all settled, so that each is kept."""
    paths = []
    for number in range(8):
        run = RunFolder.create(tmp_path / str(number))
        run.append(timing(f"backend-{number}"))
        os.utime(run.records_path, ns=(1, 1))
        paths.append(run.records_path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read_trials, paths * 100))
    assert [[t.backend for t in trials] for trials in found] == [[f"backend-{n}"] for n in range(8)] * 100


def test_each_of_several_threads_is_told_of_its_own_damage(tmp_path, threads_take_turns):
    """Warnings are of the whole process: a page drawn beside another could have lost its own."""
    paths = []
    for number in range(4):
        run = RunFolder.create(tmp_path / str(number))
        run.append(timing())
        with open(run.records_path, "a") as file:
            file.write("{" * (number % 2))
        paths.append(run.records_path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(readable_trials, paths * 100))
    for path, (trials, damage) in zip(paths * 100, found, strict=True):
        assert [trial.backend for trial in trials] == ["wmma"]
        assert [str(path) in said for said in damage] == [True] * (int(path.parent.name) % 2)
