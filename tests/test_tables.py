"""Tables come from records, also from records read back from disk, and say their verdicts in words."""

import subprocess
import sys

from flashcore import tables
from flashcore.bisection import bisect
from flashcore.check import check_attention, named_problems
from flashcore.problem import PRESETS, square
from flashcore.records import RunFolder, Trial

SMALL = square(1, 2, 40, 16, page_size=16)


def test_correctness_and_grid(tmp_path):
    run = RunFolder.create(tmp_path)
    run.append(check_attention("cpu", SMALL))
    run.append(Trial(kind="correctness", backend="fa3", problem=SMALL, status="unavailable", reason="not installed"))
    run.append(Trial(kind="correctness", backend="wmma", problem=SMALL, status="failed", reason="out: NaN"))
    trials = run.trials(kind="correctness")
    table = tables.correctness_table(trials).set_index("backend")
    assert list(table["verdict"]) == ["PASS", "unavailable", "FAIL"]
    assert table.loc["fa3", "reason"] == "not installed" and table.loc["cpu", "values compared"] == 2 * 40 * 17
    grid = tables.verdict_grid(trials)
    assert list(grid.loc[0]) == [SMALL.label(), "PASS", "unavailable", "FAIL"]


def test_stage_table_from_the_record_equals_the_one_made_live():
    found = bisect("cpu", SMALL)
    read = Trial.model_validate_json(found.to_trial().model_dump_json())
    assert tables.stage_table(read).equals(found.table())


def test_styled_is_an_html_table_with_a_caption_and_no_glyphs():
    html = tables.styled(tables.stage_table(bisect("cpu", SMALL).to_trial()), "Stages of cpu").to_html()
    assert "<caption>Stages of cpu</caption>" in html and "PASS" in html and "row_max" in html
    assert not set("✅❌✓✗") & set(html) and "http" not in html


def test_an_empty_run_makes_empty_tables():
    assert tables.correctness_table([]).empty and tables.verdict_grid([]).empty


def test_named_problems_join_the_matrix_and_large_ones_need_a_gpu():
    usual, left_out = named_problems("default", "quick", gpu=False)
    assert left_out == [] and len(usual) >= 6
    more, left_out = named_problems("report; B=1,H=1,S=64,D=64", "quick", gpu=False)
    assert left_out == [PRESETS["report"]] and len(more) == len(usual) + 1
    assert PRESETS["report"] in named_problems("report", "quick", gpu=True)[0]


def test_tables_need_no_torch():
    code = "import sys, flashcore.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
