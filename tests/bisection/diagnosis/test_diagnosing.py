"""Any attention function is told where it goes wrong: a zoo of bugs, right functions, and some without an answer."""

from __future__ import annotations

import functools
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import wrong_attention as zoo
from support.sampling import first

import flashcore
from flashcore.bisection.diagnosis import diagnose, diagnosing, shrinking
from flashcore.bisection.diagnosis.probes import memory
from flashcore.errors import InvalidProblem, UnknownName
from flashcore.problem import Problem

SMALL = "B=2,H=4,Hkv=2,S=200,D=64"
TINY = "B=1,H=2,S=40,D=16"
"""Where the question is what is said of a finding, and how."""


SHOWN_BY = {"top_left": "B=2,H=4,Hkv=2,Sq=90,Sk=200,D=64,causal", "scale_not_taken": SMALL + ",scale=0.3",
            "products_of_ten_bits": SMALL + ",float32"}  # fmt: skip
"""Problems that show what square ones do not."""


def asked(name: str) -> str:
    masks = ("one_key_too_many", "itself_hidden", "mask_forgotten", "mask_that_multiplies", "mask_of_tiles",
             "a_tile_too_few", "places_within_tiles", "masked_after_the_softmax",
             "masked_by_a_small_number", "ten_thousand_subtracted", "a_hundred_subtracted", "masked_before_the_scale",
             "capped_after_the_mask")  # fmt: skip
    return SHOWN_BY.get(name, SMALL + ",causal" if name in masks else SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", first(list(zoo.ZOO), 2))
def test_each_bug_of_the_zoo_is_named(name):
    wrong = zoo.ZOO[name]
    found = diagnose(wrong.function, asked(name), device="cpu")
    assert not found.right
    assert wrong.stage in found.stages, str(found)
    if wrong.named:
        assert wrong.named in [h.name for h in found.hypotheses], str(found)
    else:
        assert "no hypothesis explains it" in str(found)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", zoo.ZOO)
def test_each_bug_of_the_zoo_is_named_by_ordinary_problems(name):
    wrong = zoo.ZOO[name]
    found = diagnose(wrong.function, device="cpu")
    assert not found.right and wrong.stage in found.stages, str(found)
    assert not wrong.named or wrong.named in [h.name for h in found.hypotheses], str(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", first(list(zoo.RIGHT), 2))
def test_right_functions_are_right(name):
    found = diagnose(zoo.RIGHT[name], device="cpu")
    assert found.right and "is right" in str(found), str(found)
    assert found.stage is None and found.smallest is None


@pytest.mark.slow
def test_progress_says_what_is_done_and_never_more_than_there_is():
    told = []
    diagnose(zoo.one_key_too_many, TINY + ",causal", device="cpu", progress=lambda *said: told.append(said))
    assert all(0 <= done < total for _, done, total in told)
    phases = [what.split(" ")[0] for what, _, _ in told]
    assert list(dict.fromkeys(phases)) == ["comparing", "probe", "making"]


@pytest.mark.slow
def test_a_backend_is_diagnosed_by_its_id():
    assert flashcore.diagnose("cpu", TINY).right


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (zoo.keeps_k, "inputs of an earlier call"), (zoo.adds_to_the_last, "result of an earlier call"),
        (zoo.first_call_halved, "first call differs"),
    ],
)  # fmt: skip
def test_what_is_kept_between_calls_is_told_from_a_race(function, name):
    found = diagnose(lambda q, k, v: function(q, k, v), SMALL, device="cpu")
    assert [h.name for h in found.hypotheses] == [name], str(found)
    assert "depends on the calls before" in str(found) and "no hypothesis" not in str(found)


@pytest.mark.slow
def test_three_bugs_at_once_are_all_named():
    problem = "B=2,H=4,Hkv=2,Sq=90,Sk=150,D=32,causal"
    names = {h.name for h in diagnose(zoo.two_bugs, problem, device="cpu").hypotheses}
    assert {"K of another head", "V of another head", "scale twice", "top-left mask"} <= names


@pytest.mark.slow
def test_the_finding_says_how_much_it_explains_and_how_to_see_it_again(monkeypatch):
    # On a busy machine too: it ends where nothing smaller fails.
    monkeypatch.setattr(shrinking, "shrink", functools.partial(shrinking.shrink, budget_s=600.0))
    found = diagnose(zoo.top_left, device="cpu")
    text = str(found)
    assert "aligned top left" in text and "This explains all " in text and "Stage: scores." in text
    line = next(line for line in text.splitlines() if "flashcore.diagnose(fn" in line)
    again = eval(line.strip(), {"flashcore": flashcore, "fn": functools.partial(zoo.top_left)})
    assert not again.right
    problem = found.smallest.inputs.problem
    assert problem.batch == problem.num_heads_q == 1 and problem.seqlen_k <= 3


@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [
        (zoo.changes_q, "inputs", "changes its input q"),
        (zoo.wrong_shape, "shape", "shape (2, 200, 4, 64) where (2, 4, 200, 64) is meant"),
        (zoo.wrong_dtype, "dtype", "dtype float32 where float16 is meant"),
        (zoo.nothing, "type", "returns NoneType"),
    ],
)
def test_no_answer_is_a_finding_in_one_sentence(function, kind, words):
    found = diagnose(function, device="cpu")
    assert not found.right and words in found.headline() and found.stage is None
    assert [s.broken.kind for s in found.screened if s.broken] == [kind]


@pytest.mark.slow
def test_a_function_that_raises_says_what_it_raised():
    found = diagnose(zoo.raises, device="cpu")
    assert not found.right and "RuntimeError: no kernel image is available" in found.headline()


def test_a_function_that_hangs_is_ended():
    found = diagnose(zoo.hangs, device="cpu", time_limit_s=0.2)
    assert not found.right and "did not return within 0.2 s" in found.headline() and found.calls == 1


@pytest.mark.slow
def test_what_a_function_refuses_is_said_and_is_no_fault():
    found = diagnose(zoo.contiguous_only, device="cpu")
    assert found.right and "strided inputs: ValueError: tensors must be contiguous" in str(found)


@pytest.mark.slow
def test_lse_of_another_base_is_named_and_allowed_for():
    in_base_2 = functools.partial(zoo.with_lse, base=2.0)
    assert diagnose(zoo.with_lse, TINY, device="cpu", lse="natural").right
    assert diagnose(in_base_2, TINY, device="cpu", lse="log2").right
    found = diagnose(in_base_2, TINY, device="cpu", lse="natural")
    assert found.stages == ("lse",) and "base 2" in found.headline()


@pytest.mark.slow
def test_layout_says_how_tensors_lie():
    def bshd(q, k, v, causal=False):
        return zoo.two_pass(*(t.transpose(1, 2) for t in (q, k, v)), causal).transpose(1, 2)

    assert diagnose(bshd, "B=2,H=2,S=30,D=16", device="cpu", layout="bshd").right
    assert not diagnose(bshd, "B=2,H=2,S=30,D=16", device="cpu").right


@pytest.mark.slow
def test_a_problem_says_what_is_meant_where_the_function_takes_no_option():
    def causal_by_nature(q, k, v):
        return zoo.two_pass(q, k, v, causal=True)

    assert diagnose(causal_by_nature, TINY + ",causal", device="cpu").right
    found = diagnose(causal_by_nature, TINY, device="cpu")
    assert [h.name for h in found.hypotheses] == ["causal mask not asked for"]


@pytest.mark.slow
def test_the_default_scale_of_a_function_is_asked_about_too():
    def other_default(q, k, v, softmax_scale=0.1):
        return zoo.two_pass(q, k, v, softmax_scale=softmax_scale)

    found = diagnose(other_default, "B=1,H=1,S=40,D=16", device="cpu")
    assert not found.right and "its own default scale" in str(found)


@pytest.mark.slow
def test_torch_is_left_as_it_was():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    diagnose(zoo.last_rows_not_written, TINY, device="cpu")
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_diagnoses_in_several_threads_run_one_after_the_other_and_leave_torch_as_it_was(monkeypatch):
    """Each sets one thread for torch, memory full of NaN, and warnings to be ignored; all three are the process's."""
    inside, most = [], []

    def asks(*_):
        with memory.full_of_nan():
            inside.append(1)
            time.sleep(0.1)  # the second one begins, and ends after the first
            most.append(len(inside))
            inside.pop()

    monkeypatch.setattr(diagnosing, "_diagnose", asks)
    before, filters = torch.get_num_threads(), list(warnings.filters)
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda wait: (time.sleep(wait), diagnose(zoo.no_scale, TINY, device="cpu")), (0, 0.05)))
        with ThreadPoolExecutor(1) as pool:  # a thread that has not computed yet has what was set last
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
    assert most == [1, 1] and torch.get_deterministic_debug_mode() == 0 and warnings.filters == filters


@pytest.mark.slow
def test_a_diagnosis_is_a_record():
    trial = diagnose(zoo.no_scale, TINY, device="cpu").to_trial()
    assert trial.kind == "diagnosis" and trial.status == "failed"
    assert trial.data["hypotheses"][0]["name"] == "scale missing" and trial.data["explained"] > 1000
    assert type(trial).model_validate_json(trial.model_dump_json()) == trial


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"problem": "B=1"}, InvalidProblem, "required"),
        ({"problem": SMALL, "pattern": "no such"}, UnknownName, "input pattern"),
        ({"pattern": "large"}, InvalidProblem, "name the problem too"),
        ({"layout": "sbhd"}, UnknownName, "layout"),
        ({"lse": "ln"}, UnknownName, "lse"),
        ({"seed": 0.5}, InvalidProblem, "seed"),
        ({"time_limit_s": 0}, InvalidProblem, "time_limit_s"),
        ({"problem": 7}, InvalidProblem, "problem"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        diagnose(zoo.two_pass, **{"device": "cpu", **arguments})


@pytest.mark.gpu
@pytest.mark.parametrize("name", zoo.ZOO)
def test_each_bug_of_the_zoo_is_named_on_a_gpu(name):
    wrong = zoo.ZOO[name]
    found = diagnose(wrong.function)
    assert not found.right and wrong.stage in found.stages, str(found)
    assert not wrong.named or wrong.named in [h.name for h in found.hypotheses], str(found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", zoo.RIGHT)
def test_right_functions_are_right_on_a_gpu(name):
    found = diagnose(zoo.RIGHT[name], SMALL)  # torch's own gives NaN for a scale below zero on some GPUs
    assert found.right, str(found)


def test_a_problem_given_as_such_is_the_one_that_is_asked_about():
    problem = Problem(batch=1, num_heads_q=2, num_heads_kv=1, seqlen_q=70, seqlen_k=90, head_dim=32, dtype="float32")
    found = diagnose(zoo.two_pass, problem, device="cpu")
    assert found.right and {s.inputs.problem for s in found.screened} == {problem}
