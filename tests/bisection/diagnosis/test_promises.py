"""The registry of promises, the cases of each, and views that lie in memory as a case says."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from flashcore.bisection.diagnosis import promises
from flashcore.bisection.diagnosis.calling import Answer, Refusal, candidate_of
from flashcore.bisection.diagnosis.promises import PROMISES, Asked, chosen
from flashcore.bisection.diagnosis.screening import HOME
from flashcore.errors import UnknownName
from flashcore.measure.check import expected
from flashcore.numerics.inputs import make_inputs
from flashcore.problem import Problem

SMALL = Problem(batch=2, num_heads_q=2, num_heads_kv=1, seqlen_q=5, seqlen_k=7, head_dim=8)


def a_function(q, k, v, causal=False, softmax_scale=None):
    return q


def test_every_promise_has_a_number_a_sentence_and_cases_of_its_own():
    assert [one.id for one in PROMISES] == [f"P{n}" for n in range(1, len(PROMISES) + 1)]
    candidate = candidate_of(a_function, device="cpu")
    for one in PROMISES:
        assert one.sentence.endswith(".") and one.how and not one.how.endswith(".")
        cases = list(one.all_cases(candidate, HOME))
        assert cases and len({case.label() for case in cases}) == len(cases), one.id
        assert all(one.suits(case) for case in cases)
    assert {one.id for one in PROMISES if not one.binding} == {"P7", "P17"}


def test_promises_are_chosen_by_id():
    assert chosen(None) == PROMISES
    assert [one.id for one in chosen("p6, P1")] == [one.id for one in chosen(["P1", "P6"])] == ["P1", "P6"]
    with pytest.raises(UnknownName, match="There is no promise 'P0'"):
        chosen("P0")


def test_a_function_without_a_mask_is_asked_nothing_causal():
    candidate = candidate_of(lambda q, k, v: q, device="cpu")
    for one in PROMISES:
        assert not any(case.problem.causal for case in one.all_cases(candidate, HOME))
    reasons = {one.id: one.why_not(candidate) for one in PROMISES if one.why_not(candidate)}
    assert set(reasons) == {"P2", "P7", "P13", "P19", "P20", "P21"} and "no causal option" in reasons["P2"]


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("key", ["around", "rows", "columns", "odd rows", "odd heads", "one element late"])
def test_a_view_holds_the_tensor_and_its_room_the_rest(layout, key):
    candidate = candidate_of(a_function, device="cpu", layout=layout)
    tensor = make_inputs(SMALL)[0]
    view, room = promises._laid_out(candidate, tensor, key, math.nan)
    assert torch.equal(view, tensor) and view.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
    assert int(room.isnan().sum()) == room.numel() - tensor.numel() > 0
    handed = view if layout == "bhsd" else view.transpose(1, 2)
    assert handed.stride(-1) == 1
    if key in ("around", "one element late"):
        assert handed.is_contiguous() and handed.storage_offset() == (1 if key[0] == "o" else promises.ROOM_ROWS * 8)
    elif key == "odd rows":
        assert handed.stride(2) == 8 + 3
    elif key == "odd heads":
        assert handed.stride(1) % 2 and handed.stride(2) == 8
    else:
        assert handed.storage_offset() > 0 and not handed.is_contiguous()
    room.fill_(1.0)
    assert bool((view == 1).all())


def test_an_answer_is_judged_on_the_rows_asked_and_may_not_hide_a_nan():
    q, k, v = make_inputs(SMALL)
    case = expected(q, k, v, SMALL, round_scores=False)
    good = Answer(case.out.to(q.dtype), case.lse)
    assert promises._wrong(good, case) is None
    bad = Answer(good.out.clone(), good.lse)
    bad.out[1, 0, 2] = math.nan
    assert "8 of 160 elements are wrong" in promises._wrong(bad, case)
    assert promises._wrong(bad, case, rows=torch.tensor([True, True, False, True, True])) is None
    truth = (case.out.clone(), case.lse)
    truth[0][1, 0, 2] = math.nan
    assert promises._wrong(bad, case, truth=truth) is None
    assert "8 elements are finite where float64 gives NaN; first at batch 1, head 0, row 2" in promises._wrong(
        good, case, truth=truth
    )
    shifted = Answer(good.out, good.lse + 1)
    assert promises._wrong(shifted, case).startswith("lse: 20 of 20 elements are wrong")


def test_rows_without_a_key_are_left_to_their_own_promise():
    problem = SMALL.with_(causal=True, seqlen_q=9)
    assert promises._rows_that_see(problem, "cpu").tolist() == [False] * 2 + [True] * 7
    assert bool(promises._rows_that_see(SMALL, "cpu").all())


def test_pages_that_moved_are_seen_and_a_table_kept_from_before_is_found():
    from flashcore import backends

    reference = backends.get("reference")
    asked = Asked(SMALL.with_(causal=True, seqlen_k=17, page_size=16), SMALL)
    assert promises.stale_pages(candidate_of(reference, device="cpu"), asked) is None
    kept = {}

    def remembering(self, q, cache, problem, selection=None):
        table = kept.setdefault("table", cache.page_table.clone())
        cache.page_table.copy_(table)
        return reference.run_paged(q, cache, problem, selection)

    stale = backends.with_methods(reference, {"run_paged": remembering})
    assert "elements are wrong" in promises.stale_pages(candidate_of(stale, device="cpu"), asked)


# --- the promises of a GPU, on a GPU that is made up ---


class Gpu:
    """Streams that do nothing, copies that arrive when the stream is through, and a graph that repeats what it saw."""

    def __init__(self, monkeypatch, *, repeats: bool = True):
        self.capturing, self.late, self.seen = False, [], []
        nothing = contextlib.nullcontext
        waits = type("Stream", (), {"wait_stream": lambda self, other: None})
        for name, made_up in {
            "Stream": waits, "stream": lambda stream: nothing(), "current_stream": waits, "_sleep": self.sleep,
            "synchronize": self.arrive, "CUDAGraph": lambda: self, "graph": lambda graph: self.capture(),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, made_up)
        self.repeats = repeats

    def sleep(self, cycles: int) -> None:
        self.late.append(cycles)

    def arrive(self) -> None:
        self.late.clear()

    @contextlib.contextmanager
    def capture(self):
        self.capturing = True
        yield
        self.capturing = False

    def function(self, compute):
        """`compute` as a function whose captured calls are repeated by the graph, into the same outputs."""

        def call(q, k, v, causal=False):
            out = compute(q, k, v, causal)
            if self.capturing:
                self.seen.append((out, (q, k, v, causal)))
            return out

        self.compute = compute
        return candidate_of(call, device="cpu")

    def replay(self) -> None:
        for out, given in self.seen if self.repeats else ():
            out.copy_(self.compute(*given))


def two_pass(q, k, v, causal):
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1).float() for t in (k, v))
    scores = q.float() @ k.mT / q.shape[-1] ** 0.5
    return (torch.softmax(scores, -1) @ v).to(q.dtype)


ASKED = Asked(SMALL, SMALL)


def test_a_captured_call_has_to_follow_its_inputs(monkeypatch):
    gpu = Gpu(monkeypatch)
    assert promises.graph_replay(gpu.function(two_pass), ASKED) is None and gpu.seen
    nothing = Gpu(monkeypatch, repeats=False)
    assert "at replay 1 of one captured call, out: 160 of 160 elements are wrong (160 NaN" in promises.graph_replay(
        nothing.function(two_pass), ASKED
    )
    remembered: list[torch.Tensor] = []

    def by_heart(q, k, v, causal):
        remembered.append(two_pass(q, k, v, causal))
        return remembered[0].clone()

    stale = Gpu(monkeypatch)
    assert promises.graph_replay(stale.function(by_heart), ASKED).startswith("at replay 1 of one captured call, out: ")


def test_what_cannot_be_captured_is_refused_in_a_sentence(monkeypatch):
    gpu = Gpu(monkeypatch)

    def asks_the_host(q, k, v, causal):
        if gpu.capturing:
            raise RuntimeError("operation not permitted\nwhile capturing")
        return two_pass(q, k, v, causal)

    with pytest.raises(
        Refusal, match="cannot be captured in a CUDA graph: RuntimeError: operation not permitted while"
    ):
        promises.graph_replay(gpu.function(asks_the_host), ASKED)


def test_a_side_stream_is_asked_with_inputs_that_come_late(monkeypatch):
    gpu = Gpu(monkeypatch)
    calls = []

    def elsewhere(q, k, v, causal):
        calls.append(bool(gpu.late))
        return two_pass(*(torch.full_like(t, math.nan) if gpu.late else t for t in (q, k, v)), causal)

    assert promises.side_stream(gpu.function(two_pass), ASKED) is None
    assert "160 NaN" in promises.side_stream(gpu.function(elsewhere), ASKED)
    assert calls == [False, True]  # what is compiled at a first call was compiled before
