"""The text of compute-sanitizer becomes findings with kernel, file and line; nothing is lost and nothing invented."""

from __future__ import annotations

from support.sanitizer_logs import CLEAN, CLEAN_RACE, HAZARDS, INITCHECK, MEMCHECK, RACECHECK, SYNCCHECK

from flashcore.bisection.faults.sanitizer.log import Finding, ours, parse


def test_memcheck():
    log = parse(MEMCHECK)
    assert (log.errors, log.summary) == (4, "ERROR SUMMARY: 4 errors")
    read, write, api = log.findings
    assert (read.kind, read.space, read.size, read.count) == ("invalid read", "global", 2, 2)
    assert (read.kernel, read.file, read.line) == ("attention_scalar", "attention_scalar.cu", 63)
    assert (read.thread, read.block, read.address) == ((37, 0, 0), (4, 0, 0), "0x7f10c0a00200")
    assert (write.kind, write.space, write.kernel) == ("invalid write", "shared", "attention_wmma")
    assert write.functions == ("cp_async_16", "copy_rows", "attention_wmma")
    assert (write.file, write.line, write.block) == ("ptx.cuh", 14, (0, 2, 0))
    assert api.kind == "api error" and api.kernel is None and "illegal memory access" in api.text
    kept, others = ours(log, ["attention_scalar"])
    assert [f.kind for f in kept] == ["invalid read", "api error"] and others == 1
    assert read.where() == "attention_scalar, attention_scalar.cu:63"


def test_racecheck_in_both_reports():
    race, other = parse(RACECHECK).findings
    assert (race.kind, race.space, race.count, race.file, race.line) == ("race", "shared", 256, "ptx.cuh", 14)
    assert race.other == "read at attention_wmma.cu:152 and read at attention_wmma.cu:207"
    assert other.kernel == "Kernel" and other.count == 4 and other.file is None
    [hazard] = parse(HAZARDS).findings
    assert (hazard.kernel, hazard.line, hazard.other) == ("attention_scalar", 70, "write at attention_scalar.cu:62")
    assert (hazard.thread, hazard.block, hazard.address) == ((127, 0, 0), (11, 0, 0), "0x410")
    assert parse(CLEAN_RACE).findings == () and parse(CLEAN_RACE).errors == 0


def test_a_race_in_an_inlined_function_counts_when_the_other_side_is_ours():
    kept, others = ours(parse(RACECHECK), ["attention_wmma"])
    assert [f.kind for f in kept] == ["race"] and others == 4


def test_initcheck_keeps_our_kernels_and_counts_the_rest():
    log = parse(INITCHECK)
    kept, others = ours(log, ["attention_scalar", "attention_wmma"])
    assert [(f.kind, f.kernel, f.line) for f in kept] == [("uninitialized read", "attention_scalar", 52)]
    assert others == 1 and log.findings[1].kernel == "vectorized_elementwise_kernel"


def test_synccheck_in_the_newer_and_the_older_form():
    [barrier] = parse(SYNCCHECK).findings
    assert (barrier.kind, barrier.kernel, barrier.file, barrier.line) == (
        "barrier error", "attention_wmma", "attention_wmma.cu", 134,
    )  # fmt: skip
    assert barrier.count == 2


def test_nothing_is_lost_and_nothing_is_invented():
    unknown = "========= Something new happened\n=========     at attention_wmma+0x10 in attention_wmma.cu:9\n"
    [finding] = parse(unknown + CLEAN).findings
    assert (finding.kind, finding.text, finding.line) == ("other", "Something new happened", 9)
    for text in ("", "no tool at all\n", "========= COMPUTE-SANITIZER\n"):
        assert parse(text).findings == () and parse(text).summary is None
    assert Finding("race", "x").to_dict() == {"kind": "race", "text": "x", "count": 1}
