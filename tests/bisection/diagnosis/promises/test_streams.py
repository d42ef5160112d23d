"""Pages that moved, a captured call, and a side stream of a GPU that is made up."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from flashcore.bisection.diagnosis.calling import Refusal, candidate_of
from flashcore.bisection.diagnosis.promises import streams
from flashcore.bisection.diagnosis.promises.asking import Asked
from flashcore.problem import Problem

SMALL = Problem(batch=2, num_heads_q=2, num_heads_kv=1, seqlen_q=5, seqlen_k=7, head_dim=8)


def test_pages_that_moved_are_seen_and_a_table_kept_from_before_is_found():
    from flashcore import backends

    reference = backends.get("reference")
    asked = Asked(SMALL.with_(causal=True, seqlen_k=17, page_size=16), SMALL)
    assert streams.stale_pages(candidate_of(reference, device="cpu"), asked) is None
    kept = {}

    def remembering(self, q, cache, problem, selection=None):
        table = kept.setdefault("table", cache.page_table.clone())
        cache.page_table.copy_(table)
        return reference.run_paged(q, cache, problem, selection)

    stale = backends.with_methods(reference, {"run_paged": remembering})
    assert "elements are wrong" in streams.stale_pages(candidate_of(stale, device="cpu"), asked)


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
    assert streams.graph_replay(gpu.function(two_pass), ASKED) is None and gpu.seen
    nothing = Gpu(monkeypatch, repeats=False)
    assert "at replay 1 of one captured call, out: 160 of 160 elements are wrong (160 NaN" in streams.graph_replay(
        nothing.function(two_pass), ASKED
    )
    remembered: list[torch.Tensor] = []

    def by_heart(q, k, v, causal):
        remembered.append(two_pass(q, k, v, causal))
        return remembered[0].clone()

    stale = Gpu(monkeypatch)
    assert streams.graph_replay(stale.function(by_heart), ASKED).startswith("at replay 1 of one captured call, out: ")


def test_what_cannot_be_captured_is_refused_in_a_sentence(monkeypatch):
    gpu = Gpu(monkeypatch)

    def asks_the_host(q, k, v, causal):
        if gpu.capturing:
            raise RuntimeError("operation not permitted\nwhile capturing")
        return two_pass(q, k, v, causal)

    with pytest.raises(
        Refusal, match="cannot be captured in a CUDA graph: RuntimeError: operation not permitted while"
    ):
        streams.graph_replay(gpu.function(asks_the_host), ASKED)


def test_a_side_stream_is_asked_with_inputs_that_come_late(monkeypatch):
    gpu = Gpu(monkeypatch)
    calls = []

    def elsewhere(q, k, v, causal):
        calls.append(bool(gpu.late))
        return two_pass(*(torch.full_like(t, math.nan) if gpu.late else t for t in (q, k, v)), causal)

    assert streams.side_stream(gpu.function(two_pass), ASKED) is None
    assert "160 NaN" in streams.side_stream(gpu.function(elsewhere), ASKED)
    assert calls == [False, True]  # what is compiled at a first call was compiled before
