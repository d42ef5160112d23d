"""Functions that break one promise each are found, right ones keep all, and no function ends the table."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.sampling import first

from flashcore.backends import get, with_methods
from flashcore.bisection.diagnosis import conforming
from flashcore.bisection.diagnosis.conforming import Finding, conform, conform_all, conform_apart
from flashcore.bisection.diagnosis.promises import memory, registry
from flashcore.errors import BackendUnavailable, InvalidProblem, UnknownName
from flashcore.gpu.isolation import Outcome
from flashcore.problem import Problem

HOME = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=20, seqlen_k=20, head_dim=16)
ON_A_GPU = {"P19", "P20"}
OF_PAGES = {"P21"}


def attend(q, k, v, causal, scale, *, change=lambda scores: scores, hidden=-math.inf, offset=None):
    """`out` in float32 and `lse`, right unless told otherwise."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1).float() for t in (k, v))
    scores = change(q.float() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale))
    if causal:
        row, key = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        scores = scores.masked_fill(key > row + (k.shape[2] - q.shape[2] if offset is None else offset), hidden)
    lse = scores.logsumexp(-1)
    probs = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    return probs @ v, lse


def right(q, k, v, causal=False, softmax_scale=None, return_lse=False):
    out, lse = attend(q, k, v, causal, softmax_scale)
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)


def results(function, **options):
    problem = options.pop("problem", HOME)
    found = conform(function, problem, device="cpu", **options)
    assert found.name and len(found.findings) == len(conforming.chosen(options.get("only")))
    return {one.id: one.result for one in found.findings}, found


# --- one broken promise each ---


def far_mask(q, k, v, causal=False, softmax_scale=None):
    return attend(q, k, v, causal, softmax_scale, hidden=-1e30)[0].to(q.dtype)


def top_left_for_more_keys(q, k, v, causal=False, softmax_scale=None):
    offset = 0 if q.shape[2] < k.shape[2] else None
    return attend(q, k, v, causal, softmax_scale, offset=offset)[0].to(q.dtype)


def one_key_past_a_tile(q, k, v, causal=False, softmax_scale=None):
    keys = k.shape[2] - (k.shape[2] > 64 and k.shape[2] % 64 == 1)
    offset = k.shape[2] - q.shape[2]
    return attend(q, k[:, :, :keys], v[:, :, :keys], causal, softmax_scale, offset=offset)[0].to(q.dtype)


def no_threes(q, k, v, causal=False, softmax_scale=None):
    if q.shape[1] == 3 * k.shape[1]:
        q = q.roll(1, 1)
    return right(q, k, v, causal, softmax_scale)


def _after(t):
    """The element behind the last one in memory, as far as memory goes."""
    last = t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    more = last + 1 < t.untyped_storage().nbytes() // t.element_size()
    return t.as_strided((1,), (1,), last + 1) if more else t.new_zeros(1)


def reads_on(q, k, v, causal=False, softmax_scale=None):
    return right(q, k, v, causal, softmax_scale) + 0 * _after(k)


def writes_on(q, k, v, causal=False, softmax_scale=None):
    _after(k).zero_()
    return right(q, k, v, causal, softmax_scale)


def clamps(q, k, v, causal=False, softmax_scale=None):
    return right(q, k.clamp(-1e4, 1e4), v, causal, softmax_scale)


def swallows_nan(q, k, v, causal=False, softmax_scale=None):
    return right(q, k, torch.where(v.isnan(), 0, v), causal, softmax_scale)


def spreads_nan(q, k, v, causal=False, softmax_scale=None):
    bad = q.isnan().any(-1, keepdim=True).any(-2, keepdim=True)
    return right(torch.where(bad, math.nan, q), k, v, causal, softmax_scale)


def rounds_addresses(q, k, v, causal=False, softmax_scale=None):
    k = k.as_strided(k.shape, k.stride(), k.storage_offset() // 8 * 8) if k.data_ptr() % 16 else k
    return right(q, k, v, causal, softmax_scale)


def rows_in_eights(q, k, v, causal=False, softmax_scale=None):
    if k.stride(2) % 8:
        k = k.as_strided(k.shape, (*k.stride()[:2], k.shape[3], 1), k.storage_offset())
    return right(q, k, v, causal, softmax_scale)


def strides_of_k_for_v(q, k, v, causal=False, softmax_scale=None):
    return right(q, k, v.as_strided(v.shape, k.stride(), v.storage_offset()), causal, softmax_scale)


def scale_or_default(q, k, v, causal=False, softmax_scale=None):
    return right(q, k, v, causal, softmax_scale or None)


def capped(q, k, v, causal=False, softmax_scale=None):
    def change(scores):
        return torch.where(scores.isinf(), scores, scores.clamp(-2000, 2000))

    return attend(q, k, v, causal, softmax_scale, change=change)[0].to(q.dtype)


def noisy(q, k, v, causal=False, softmax_scale=None):
    out = right(q, k, v, causal, softmax_scale)
    noisy.calls += 1
    return out * (1 + 2**-11 * (noisy.calls % 2))


noisy.calls = 0


def minds_its_neighbour(q, k, v, causal=False, softmax_scale=None):
    out = right(q, k, v, causal, softmax_scale)
    return out * (1 + 2**-10) if bool(k[-1].isnan().any()) else out


def spoils_q(q, k, v, causal=False, softmax_scale=None):
    out = right(q, k, v, causal, softmax_scale)
    q += 1
    return out


BREAKS = {
    "P2": far_mask, "P3": top_left_for_more_keys, "P4": one_key_past_a_tile, "P5": no_threes, "P6": reads_on,
    "P8": clamps, "P9": swallows_nan, "P10": rounds_addresses, "P11": rows_in_eights, "P12": strides_of_k_for_v,
    "P13": scale_or_default, "P14": capped, "P15": noisy, "P16": minds_its_neighbour, "P18": spoils_q,
}  # fmt: skip


@pytest.fixture
def short(monkeypatch):
    """Fewer long cases, and less time for the smallest: enough for functions that break at any length."""
    monkeypatch.setattr(registry, "TILE_LENGTHS", (63, 64, 65))
    monkeypatch.setattr(memory, "ROOM_ROWS", 32)
    monkeypatch.setattr(conforming, "SHRINK_S", 0.02)


@pytest.mark.parametrize("promise", BREAKS)
@pytest.mark.slow
def test_one_broken_promise_is_found_and_no_other_is_blamed(promise, short):
    asked = [one.id for one in registry.PROMISES if one.binding]
    found, whole = results(BREAKS[promise], only=asked)
    assert [name for name, result in found.items() if result == "broken"] == [promise], whole
    judged = set(found) - ON_A_GPU - OF_PAGES
    if promise == "P15":  # bits cannot be compared with those beside other neighbours where they change by themselves
        judged -= {"P16"}
    assert {found[name] for name in judged - {promise}} == {"kept"}, whole
    assert not whole.keeps and f"{promise}," in str(whole)


@pytest.mark.parametrize(
    ("function", "promise", "words"),
    [(writes_on, "P6", "writes into memory beside its input k"), (spreads_nan, "P9", "NaN"),
     (far_mask, "P2", "row 0 sees no key, and its output is"), (spoils_q, "P18", "it changes its input q")],
)  # fmt: skip
def test_a_break_says_what_happened_on_the_smallest_case(function, promise, words, monkeypatch):
    monkeypatch.setattr(conforming, "SHRINK_S", 600.0)  # of a busy machine; it ends where nothing smaller breaks
    _, whole = results(function, only=promise)
    (one,) = whole.findings
    assert one.result == "broken" and words in one.sentence
    small = one.problem
    assert (small.batch, small.num_heads_q) == (1, 1) and small.seqlen_q <= 4 and one.smallest.startswith(small.label())


def test_a_promise_that_does_not_bind_is_told_and_is_no_break():
    def other_alone(q, k, v):
        return right(q, k, v) * (1 + 2**-10 * (q.shape[0] == 1))

    found, whole = results(other_alone, only=["P17"])
    assert found == {"P17": "not promised"} and whole.keeps and "the first batch alone" in whole.findings[0].smallest
    assert whole.to_trials()[0].status == "unsupported"


def test_reading_another_head_is_no_matter_of_neighbours():
    def other_head(q, k, v):
        return right(q, k.roll(1, 1), v)

    assert results(other_head, only="P1,P16,P17")[0] == {"P1": "broken", "P16": "not judged", "P17": "not judged"}


def test_a_function_that_is_wrong_everywhere_is_blamed_for_that_alone(short):
    found, whole = results(lambda q, k, v: right(q, k, v, softmax_scale=1.0))
    assert [name for name, result in found.items() if result == "broken"] == ["P1"]
    assert found["P11"] == found["P4"] == "not judged" and found["P15"] == "kept"
    assert "plain twin" in whole.findings[3].sentence and found["P2"] == found["P13"] == "does not apply"
    assert not whole.keeps


# --- what is right, and what is refused ---


@pytest.mark.parametrize("backend", first(["cpu", "reference", "sdpa-math"], 1))
@pytest.mark.slow
def test_what_we_compare_with_keeps_all_that_applies(backend):
    found = conform(backend, device="cpu")
    assert found.keeps, found
    named = {one.id: one.result for one in found.findings}
    apart = {"P7", *ON_A_GPU, *(() if backend == "reference" else OF_PAGES)}
    # P17 is about bits of torch's products for other shapes, which torch promises nowhere.
    assert {named[name] for name in set(named) - apart - {"P17"}} == {"kept"}, found
    assert named["P7"] == "not promised"  # a product over all keys takes 0 times NaN


@pytest.mark.slow
def test_other_layouts_other_lse_and_fewer_options_are_asked_alike(short):
    def turned(q, k, v, causal=False, softmax_scale=None, return_lse=False):
        out, lse = attend(*(t.transpose(1, 2) for t in (q, k, v)), causal, softmax_scale)
        return out.to(q.dtype).transpose(1, 2), lse / math.log(2)

    found, whole = results(turned, layout="bshd", lse="log2")
    assert {found[name] for name in set(found) - ON_A_GPU - OF_PAGES - {"P7"}} == {"kept"}, whole
    found, whole = results(lambda q, k, v: right(q, k, v))
    assert found["P2"] == found["P7"] == found["P13"] == "does not apply" and whole.keeps
    assert found["P1"] == "kept" and whole.findings[0].cases == 1

    def lse_of_nothing(q, k, v, causal=False, return_lse=False):
        out, lse = attend(q, k, v, causal, None)
        return out.to(q.dtype), lse.masked_fill(lse == -math.inf, 0.0)

    found, whole = results(lse_of_nothing, lse="natural", only="p2,P1")
    assert found == {"P1": "kept", "P2": "broken"} and "its lse is 0 where -inf is meant" in str(whole)


@pytest.mark.slow
def test_what_is_refused_is_no_break(short):
    def contiguous(q, k, v, causal=False):
        if not all(t.is_contiguous() for t in (q, k, v)):
            raise ValueError("contiguous tensors\nonly")
        return right(q, k, v, causal)

    found, whole = results(contiguous)
    assert found["P11"] == found["P12"] == "refused" and found["P6"] == "kept" and whole.keeps
    assert "it refuses 4 more" in whole.findings[5].sentence and "ValueError: contiguous tensors only" in str(whole)

    def never(q, k, v):
        raise NotImplementedError("no kernel")

    found, whole = results(never, problem=None)
    assert set(found.values()) == {"refused", "does not apply"} and "takes none of the ordinary problems" in str(whole)


def test_no_answer_at_all_is_a_break_of_the_first_promise():
    found, whole = results(lambda q, k, v: None, only="P1,P3,P15")
    assert found == {"P1": "broken", "P3": "not judged", "P15": "broken"}
    assert "it returns NoneType where a tensor is meant" in str(whole)

    def hangs(q, k, v):
        while True:
            pass

    found, whole = results(hangs, problem=None, only="P1,P4", time_limit_s=0.02)
    assert found == {"P1": "broken", "P4": "not judged"} and "did not return within 0.02 s" in str(whole)


def test_a_promise_that_cannot_be_asked_ends_nothing(monkeypatch):
    def broken_down(*_):
        raise RuntimeError("the judge\nitself")

    monkeypatch.setattr(conforming, "_broken", broken_down)
    found, whole = results(right, only="P1,P18")
    assert set(found.values()) == {"not judged"} and "asking for it failed" in str(whole) and not whole.keeps


def test_a_backend_for_few_queries_is_asked_about_those():
    few = with_methods(get("cpu"), {
        "suits": lambda self, problem: problem.with_(seqlen_q=min(8, problem.seqlen_q)),
        "why_not": lambda self, problem: "too many queries" if problem.seqlen_q > 8 else None,
    })  # fmt: skip
    found = conform(few, only="P1,P2,P3,P4,P7", device="cpu")
    assert [one.result for one in found.findings] == [*["kept"] * 4, "does not apply"]
    assert all(one.refused == 0 for one in found.findings)


def test_threads_ask_one_after_the_other_since_functions_get_the_tensors_of_a_case(monkeypatch):
    inside, most = [], []

    def ask(candidate, promise, home):
        inside.append(1)
        time.sleep(0.05)
        most.append(len(inside))
        inside.pop()

    monkeypatch.setattr(conforming, "ask", ask)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: conform("cpu", HOME, only="P1"), range(2)))
    assert most == [1, 1]


def test_questions_without_sense_are_errors():
    with pytest.raises(UnknownName, match="There is no promise 'P99'"):
        conform("cpu", only="P1,P99")
    with pytest.raises(UnknownName):
        conform("nobody")
    with pytest.raises(InvalidProblem):
        conform("cpu", "B=0,H=1,S=1,D=64")
    with pytest.raises(UnknownName, match="promise"):
        conform_all(["cpu"], only="Q1")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable):
            conform_all(["wmma"])


# --- records, and other processes ---


def test_each_promise_is_a_record_that_no_proof_of_the_diagnosis_counts():
    from flashcore import tables
    from flashcore.bisection.faults import diagnosing

    _, whole = results(far_mask, only="P1,P2,P19")
    trials = whole.to_trials()
    assert {t.kind for t in trials} == {"diagnosis"}
    assert [(t.variant, t.status) for t in trials] == [
        ("conform:P1", "ok"), ("conform:P2", "failed"), ("conform:P19", "unsupported")]  # fmt: skip
    assert trials[0].reason is None and trials[1].reason.endswith(".") and trials[1].problem is not None
    assert tables.diagnosis_table(trials).empty and diagnosing.sentence(trials).startswith("0 of 0 planted")
    assert list(whole.table()["Result"]) == ["kept", "broken", "does not apply"]


class Dying:
    """A worker whose calls end as told; after those it answers."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)

    def call(self, function, *arguments, timeout_s):
        return self.outcomes.pop(0) if self.outcomes else Outcome(True, function(*arguments))


def test_a_promise_that_kills_its_process_is_broken_and_the_next_is_asked():
    gone = Outcome(False, None, "exit", "Its process ended with exit code 7.", seconds=1.0)
    lost = Outcome(False, None, "raised", "AcceleratorError: illegal memory access", context_lost=True)
    odd = Outcome(False, None, "raised", "ValueError: no reason")
    found = conform_apart("cpu", HOME, only="P1,P2,P3,P15", worker=Dying(gone, lost, odd), device="cpu")
    assert [one.result for one in found.findings] == ["broken", "broken", "not judged", "kept"]
    assert "took its process with it: Its process ended with exit code 7" in found.findings[0].sentence
    assert "CUDA context did not survive it" in found.findings[1].sentence and found.device == "cpu"
    assert [t.status for t in found.to_trials()] == ["error", "error", "error", "ok"]
    found = conform_apart("cpu", only="P1,P2,P3,P15", worker=Dying(*[gone] * 3), device="cpu")
    assert found.findings[3].result == "not judged" and "died at each of the 3" in found.findings[3].sentence


def test_promises_that_are_left_when_the_time_is_up_are_not_judged_and_not_called_broken():
    late = Outcome(False, None, "timeout", "It exceeded 5 s and was ended.", seconds=5.0)
    found = conform_apart("cpu", HOME, only="P1,P2", worker=Dying(late), device="cpu", within_s=5.0)
    assert [one.result for one in found.findings] == ["not judged", "kept"], "it had less than a promise is given"
    assert found.findings[0].sentence == "the 5 s for all promises were up" and found.findings[0].seconds == 5.0
    found = conform_apart("cpu", HOME, only="P1,P2", worker=Dying(), device="cpu", within_s=-1.0)
    assert [one.result for one in found.findings] == ["not judged"] * 2
    hung = conform_apart("cpu", HOME, only="P1", worker=Dying(late), device="cpu").findings[0]
    assert hung.result == "broken" and "exceeded 5 s" in hung.sentence


def test_a_report_gives_each_implementation_a_limit_and_begins_with_those_of_others():
    ours, theirs = conforming.conform_tasks(["cpu", "fa4"])
    assert theirs.cost_s > ours.cost_s and ours.limit_s > conforming.ALL_LIMIT_S
    assert [fields["backend"] for task in (ours, theirs) for fields in task.owed] == ["cpu", "fa4"]


def test_a_question_without_sense_is_the_same_error_from_another_process(tmp_path):
    with pytest.raises(UnknownName, match="function in"):
        file = tmp_path / "mine.py"
        file.write_text("x = 1\n")
        conform_apart(f"{file}:nothing", only="P1", worker=Dying(), device="cpu")


@pytest.mark.slow
def test_a_process_of_its_own_answers_and_may_die(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import os, torch\n\ndef dies(q, k, v):\n    os._exit(9) if k.shape[2] == 63 else None\n"
        "    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)\n"
    )
    (found,) = conform_all([f"{file}:dies"], only="P4,P18", device="cpu")
    assert [one.result for one in found.findings] == ["broken", "kept"] and "exit code 9" in str(found)
    assert isinstance(found.findings[0], Finding) and found.findings[0].crashed


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "wmma", "sdpa-flash"])
def test_streams_and_graphs_are_asked_for_on_a_gpu(backend):
    found = conform(backend, only="P1,P19,P20")
    assert [one.result for one in found.findings] == ["kept"] * 3, found


@pytest.mark.gpu
def test_work_on_another_stream_and_a_value_read_at_capture_are_found_on_a_gpu():
    def elsewhere(q, k, v, causal=False):
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        other.synchronize()  # so that only what it reads too early is wrong
        return out

    first = {}

    def remembered(q, k, v, causal=False):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        if not torch.cuda.is_current_stream_capturing():
            first[q.shape, causal] = out
            return out
        return first[q.shape, causal].clone()

    found = conform(elsewhere, only="P1,P19")
    assert found.findings[1].result == "broken", found
    found = conform(remembered, only="P1,P20")
    assert [one.result for one in found.findings] == ["kept", "broken"], found
