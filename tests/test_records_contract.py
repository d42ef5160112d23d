"""What a records file may hold and what becomes of it: lines, copies, versions, nesting, full disks, many records."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
import time

import pytest
from support import synthetic_records as synthetic

from flashcore.decision import verdict
from flashcore.errors import FlashCoreError, GatesError, RecordsDamaged, RecordsError, RecordsTooNew
from flashcore.page._resources import embedded_records
from flashcore.pipeline import superseding
from flashcore.problem import PRESETS
from flashcore.records import SETTLED_NS, RunFolder, Trial, append_trials, parse_json, read_trials

SEPARATORS = ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]
"""What `str.splitlines` takes for the end of a line besides a line feed and a carriage return."""
MARK = b"\xef\xbb\xbf"


def raw(**fields) -> str:
    return json.dumps({"kind": "ceiling", "time": "2001-02-03T04:05:06+00:00", **fields}, ensure_ascii=False)


def write(run: RunFolder, *lines: str) -> None:
    run.records_path.write_bytes("".join(f"{line}\n" for line in lines).encode())


# ------------------------------------------------------------------------------------------------------ lines


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
def test_a_line_ends_at_a_line_feed_alone(run, separator):
    text = f"one{separator}two"
    run.append(Trial(kind="ceiling", reason=text, data={"name": text}))
    run.append(Trial(kind="notebook", data={"name": "01_a"}))
    found = read_trials(run.records_path, on_damage="raise")
    assert [t.kind for t in found] == ["ceiling", "notebook"] and found[0].reason == text
    before = run.records_path.read_bytes()
    assert superseding.set_aside(run, ["01_a"], planned=["01_a"]) == 2
    assert superseding.superseded_path(run).read_bytes() == before and run.trials() == []


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
def test_the_page_holds_the_records_as_they_are(run, separator):
    run.append(Trial(kind="ceiling", reason=f"one{separator}two"))
    [kept] = embedded_records(run, verdict.Evidence((), {}, {}))
    assert kept["text"].encode() == run.records_path.read_bytes() and kept["text"].count("\n") == 1


def test_a_byte_order_mark_costs_no_line(run):
    write(run, raw(backend="a"), raw(backend="b"))
    run.records_path.write_bytes(MARK + run.records_path.read_bytes().replace(b"\n", b"\n" + MARK, 1))  # as by `cat`
    assert [t.backend for t in read_trials(run.records_path, on_damage="raise")] == ["a", "b"]
    run.environment_path.write_bytes(MARK + b'{"id": "env-1"}')
    assert run.environment() == {"id": "env-1"}


def test_lines_of_another_system_and_empty_ones_are_read(run):
    run.records_path.write_bytes(f"{raw(backend='a')}\r\n\r\n\n{raw(backend='b')}".encode())
    assert [t.backend for t in read_trials(run.records_path, on_damage="raise")] == ["a", "b"]


# ---------------------------------------------------------------------------------------------------- writing


def test_a_write_that_takes_part_of_a_line_is_finished(run, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: real(fd, content[: max(1, len(content) // 3)]))
    append_trials(run.records_path, [Trial(kind="ceiling", backend=name * 40) for name in "ab"])
    assert [t.backend[0] for t in read_trials(run.records_path, on_damage="raise")] == ["a", "b"]


def test_a_full_disk_is_an_error_and_leaves_no_half_line(tmp_path):
    """The limit on a file's size stands for the disk: the system takes a part of the line, then nothing."""
    code = (
        "import resource, signal, sys; from flashcore.records import *; from flashcore.errors import RecordsError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "run = RunFolder.create(sys.argv[1]); run.append(Trial(kind='ceiling', backend='kept'))\n"
        "size = run.records_path.stat().st_size + 100; resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "try: run.append(Trial(kind='ceiling', reason='x' * 200))\n"
        "except RecordsError as error: print(error)\n"
        "else: print('it said that it succeeded')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "could not be written" in done.stdout and "Records already there are kept" in done.stdout, done
    assert [t.backend for t in read_trials(tmp_path / "records.jsonl", on_damage="raise")] == ["kept"]


def test_what_is_no_json_is_one_sentence_and_no_line(run):
    with pytest.raises(RecordsError, match="'ceiling' cannot be written as JSON"):
        run.append(Trial(kind="ceiling", data={"value": object()}))
    with pytest.raises(RecordsError, match="cannot be written as JSON"):
        run.append(Trial(kind="ceiling", reason="half of a letter: \udc80"))
    assert run.records_path.read_bytes() == b""


# ------------------------------------------------------------------------------------------ copies and versions


def test_a_record_that_stands_there_twice_counts_once(run):
    for _ in range(3):
        run.append(Trial(kind="ceiling", backend="a"))
    alike = run.append(Trial(kind="ceiling", backend="b"))
    content = run.records_path.read_bytes()
    run.records_path.write_bytes(content + content)
    assert [t.backend for t in run.trials()] == ["a", "a", "a", "b"]
    run.append(alike)  # as a writer does that was not told of its success
    assert [t.backend for t in run.trials()] == ["a", "a", "a", "b"]
    other_order = json.dumps(dict(reversed(json.loads(content.splitlines()[-1]).items())))
    with run.records_path.open("a") as file:
        file.write(f"{other_order}\n")
    assert [t.backend for t in run.trials()] == ["a", "a", "a", "b"]


def test_older_records_have_no_id_and_are_told_by_all_they_hold(run):
    write(run, raw(backend="a"), raw(backend="b"), raw(backend="a"), raw(backend="a", data={"value": 1}))
    assert [(t.backend, t.data, t.id) for t in run.trials()] == [
        ("a", {}, None),
        ("b", {}, None),
        ("a", {"value": 1}, None),
    ]
    assert run.trials() == run.trials()
    without = json.dumps({"kind": "ceiling", "backend": "c"})
    write(run, without, without)
    assert [t.backend for t in run.trials()] == ["c"]


def test_copied_checks_count_once(tmp_path):
    """Copies of the one check that is there make no ten checks out of it."""
    one = synthetic.correctness("cpu", PRESETS["tiny"])
    run = synthetic.write_run(tmp_path / "run", [one] * 25, synthetic.environment())
    gate = next(g for g in verdict.judge(run).gates if g.id == "cpu-correct")
    assert gate.n == 1


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [], {}, "new"])
def test_a_schema_version_that_is_none_is_damage(run, version):
    write(run, raw(backend="a", schema_version=1), raw(backend="b", schema_version=version))
    with pytest.raises(RecordsDamaged, match=r"line 2 .*schema_version"):
        read_trials(run.records_path, on_damage="raise")
    assert verdict.judge(run).verdict == "INCONCLUSIVE"
    run.environment_path.write_text(json.dumps({"id": "env-1", "schema_version": version}))
    with pytest.raises(RecordsError, match="schema_version"):
        run.environment()


@pytest.mark.parametrize("version", [2, 2.0, 1.5, "2", 10**30])
def test_a_newer_schema_is_refused_however_it_is_written(run, version):
    write(run, raw(schema_version=version))
    with pytest.raises(RecordsTooNew, match="install a newer FlashCore"):
        run.trials()
    run.environment_path.write_text(json.dumps({"schema_version": version}))
    with pytest.raises(RecordsTooNew, match="install a newer FlashCore"):
        run.environment()


# -------------------------------------------------------------------------------------------- what is no record

DEEP = "[" * 2000 + "]" * 2000
LONG = "9" * 5000


@pytest.mark.parametrize("value", [DEEP, '{"a":' * 2000 + "1" + "}" * 2000, LONG], ids=["lists", "objects", "digits"])
def test_nesting_and_digits_without_end_are_damage(run, value):
    line = f'{{"kind": "ceiling", "data": {{"value": {value}}}}}'
    write(run, raw(backend="a"), line)
    with pytest.raises(RecordsDamaged, match="line 2 "):
        read_trials(run.records_path, on_damage="raise")
    assert verdict.judge(run).verdict == "INCONCLUSIVE"
    assert superseding.set_aside(run, ["02_b"], planned=["01_a"]) == 0
    run.environment_path.write_text(line)
    with pytest.raises(RecordsError, match=r"environment\.json cannot be read"):
        run.environment()
    with pytest.raises(ValueError):
        parse_json(line)


@pytest.mark.parametrize("value", [DEEP, LONG], ids=["lists", "digits"])
def test_nesting_and_digits_without_end_in_a_toml_file_are_one_sentence(tmp_path, value):
    path = tmp_path / "gates.toml"
    path.write_text(f"# gates\nrank_options_by = {value}\n")
    with pytest.raises(GatesError, match=r"gates\.toml"):
        verdict.load_gates(path)
    if value == LONG:
        with pytest.raises(GatesError, match="line 2: a number here has too many digits"):
            verdict.load_gates(path)


def test_a_toml_file_may_begin_with_a_byte_order_mark(tmp_path):
    from flashcore.paths import data_dir

    path = tmp_path / "gates.toml"
    path.write_bytes(MARK + (data_dir("reports") / "gates.toml").read_bytes())
    assert len(verdict.load_gates(path)) == len(verdict.load_gates())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "holds a list and no JSON object"), ("null", "holds null"), ('"text"', "holds a text"),
        ("7", "holds a number"), ('{"before": []}', "'before' is a list and should be an object"),
        ('{"parameters": "all"}', "'parameters' is a text and should be an object"),
        ('{"id": 7}', "'id' is a number and should be a text"), ('{"gpu": {}}', "'gpu' is an object"),
    ],
)  # fmt: skip
def test_an_environment_that_is_none_is_one_sentence(run, text, says):
    run.environment_path.write_text(text)
    with pytest.raises(RecordsError, match=says):
        run.environment()
    for work in (verdict.judge, lambda run: run.append(Trial(kind="ceiling"))):
        with pytest.raises(FlashCoreError, match=says):
            work(run)


def test_a_reason_of_white_space_is_no_reason():
    from flashcore.decision import compare

    assert compare.first_line(" \n\n") == compare.first_line(None) == "no reason recorded"
    assert compare.first_line("\n  one\u2028still one\ntwo") == "one\u2028still one"


# ------------------------------------------------------------------------------------- read once, and made without


def test_a_trial_is_the_same_whether_it_was_validated_or_taken_as_it_is(run):
    odd = [
        raw(timing={"method": "host", "latency_us": 3, "samples_us": [1, 2.5, "NaN"], "clock": 7}),
        raw(correctness={"passed": 1, "checked": "4", "num_bad": 0, "max_abs_error": "Infinity", "bound": 0}),
        raw(problem={"batch": "1", "num_heads_q": 1, "num_heads_kv": 1, "seqlen_q": 8, "seqlen_k": 8, "head_dim": 64}),
        raw(colour="blue", schema_version=1),
    ]
    plain = [t.model_dump_json() for t in synthetic.gpu_trials()] + odd
    write(run, *plain)
    found = read_trials(run.records_path, on_damage="raise")
    assert len(found) == len(plain)
    for line, trial in zip(plain, found, strict=True):
        wanted = Trial.model_validate_json(line)
        wanted = wanted if '"id"' in line else wanted.model_copy(update={"id": None})
        assert trial.model_dump_json() == wanted.model_dump_json()
        assert (repr(trial), trial.model_extra) == (repr(wanted), wanted.model_extra)
        copies = [pickle.loads(pickle.dumps(trial)), trial.model_copy(deep=True)]
        assert {copy.model_dump_json() for copy in copies} == {wanted.model_dump_json()}
    first, second = found[0].model_copy(update={"shade": 1}), found[1]
    assert first.model_extra == {"shade": 1} and second.model_extra == {}, "trials share what one may change"


HUGE = {"batch": 10**200, "num_heads_q": 1, "num_heads_kv": 1, "seqlen_q": 10**200, "seqlen_k": 1, "head_dim": 64}


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "no such kind"}, {"status": "fine"}, {"data": [1]}, {"time": 7}, {"backend": 1}, {"id": 5},
        {"timing": {"method": "host"}}, {"timing": {"method": "host", "latency_us": None}}, {"timing": [1]},
        {"timing": {"method": "host", "latency_us": 1.0, "samples_us": ["x"]}}, {"correctness": {"passed": True}},
        {"problem": {"batch": 1}}, {"problem": "report"}, {"problem": {"batch": [1]}}, {"status": [[]]},
        {"problem": HUGE}, {"problem": {**HUGE, "seqlen_q": 1}},
        {"kind": ["ceiling"]}, {"kind": {"ceiling": 1}}, {"status": None},
    ],
    ids=lambda fields: str(fields)[:50],
)  # fmt: skip
def test_what_the_model_refuses_is_refused(run, fields):
    write(run, raw(**fields))
    with pytest.raises(RecordsDamaged, match="line 1 "):
        read_trials(run.records_path, on_damage="raise")


def test_a_file_is_read_once_until_it_changes(run, monkeypatch):
    write(run, raw(backend="a"))
    then = time.time_ns() - 20 * SETTLED_NS
    os.utime(run.records_path, ns=(then, then))
    [first] = run.trials()
    run.trials().clear()  # what one reader does with the list is nothing to another
    assert run.trials()[0] is first
    write(run, raw(backend="b"))
    assert [t.backend for t in run.trials()] == ["b"]
    write(run, raw(backend="c"))  # of the same size, in the same instant
    assert [t.backend for t in run.trials()] == ["c"]


def measured(arguments: list[str], **options) -> tuple[subprocess.CompletedProcess, float, float]:
    """A command of ours with its CPU seconds and the MB that its largest process held."""
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run([sys.executable, '-m', 'flashcore', *sys.argv[1:]])\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, done.returncode, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **options)
    seconds, megabytes, status = done.stderr.split()[-3:]
    done.returncode = int(status)
    return done, float(seconds), float(megabytes)


def slowness() -> float:
    """How many times longer simple work takes than on the machine of the bounds, at least 1: others work here too."""
    began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    for _ in range(3):
        sum(hash((i, str(i))) & 1 for i in range(300_000))
    return max(1.0, (resource.getrusage(resource.RUSAGE_SELF).ru_utime - began) / SIMPLE_WORK_S)


SIMPLE_WORK_S = 0.125


@pytest.mark.slow
def test_20_000_records_are_judged_in_seconds_and_little_memory(tmp_path):
    from support.large_runs import write_large_run

    write_large_run(tmp_path / "run", 20_000)
    before = slowness()
    done, seconds, megabytes = measured(["verdict", str(tmp_path / "run")], timeout=800)
    assert done.returncode == 3 and "Verdict: NO-GO" in done.stdout
    assert seconds < 1.6 * max(before, slowness()) and megabytes < 120


@pytest.mark.exhaustive
@pytest.mark.notebook
def test_200_000_records_are_judged_in_4_s_and_drawn_in_20(tmp_path):
    from support.large_runs import write_large_run

    run = write_large_run(tmp_path / "run", 200_000)
    done, seconds, megabytes = measured(["verdict", str(run.path)], timeout=800)
    assert done.returncode == 3 and seconds < 4.0 * slowness() and megabytes < 300
    done, seconds, _ = measured(["render", str(run.path), "--no-pdf"], timeout=800)
    assert done.returncode == 0 and seconds < 20.0 * slowness()
    page = (run.path / "report.html").read_text()
    assert len(page) < 2_000_000 and "records of this run are not in the page" in page
