"""Probe which heads of Q, K and V are read, and at which head results stand."""

from __future__ import annotations

import torch

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.hypotheses import Hypothesis, head_of
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.problem import Problem


def marks(inquiry: Inquiry) -> str | None:
    problem = inquiry.problem
    if problem.batch * problem.num_heads_q == 1:
        return None
    found = reading.read_marks(inquiry.candidate, problem)
    said = []
    marks = {"Q": found.q, "K": found.k, "V": found.v}
    written = of_output(marks, problem)
    if written:
        return inquiry.add(written)
    for what, table in marks.items():
        hypothesis = None if table is None else of_heads(what, table, problem)
        if hypothesis:
            said.append(inquiry.add(hypothesis))
    return "; ".join(said) or None


def of_heads(what: str, table: torch.Tensor, problem: Problem) -> Hypothesis | None:
    """A name for the heads of Q, K or V that are read, from ``int64 [B*Hq]``; None where they are the right ones."""
    per_batch = problem.num_heads_q if what == "Q" else problem.num_heads_kv
    read = table.tolist()
    wanted = right_heads(what, problem)
    wrong = [n for n, (a, b) in enumerate(zip(read, wanted, strict=True)) if a != b]
    if not wrong:
        return None
    field_name = {"Q": "q_heads", "K": "k_heads", "V": "v_heads"}[what]
    stages = ("accum",) if what == "V" else ("scores",)
    first = wrong[0]
    at = head_of(first, problem)
    got = f"{what} of batch {read[first] // per_batch}, head {read[first] % per_batch}"
    meant = f"batch {wanted[first] // per_batch}, head {wanted[first] % per_batch}"
    rule = _rule(read, per_batch, problem, what)
    name = rule[0] if rule else f"{what} of another head"
    why = f": {rule[1]}" if rule else ""
    return Hypothesis(
        name, f"query head {at['head']} of batch {at['batch']} reads {got} where {meant} is meant{why}",
        stages, {field_name: table}, at,
    )  # fmt: skip


def right_heads(what: str, problem: Problem) -> list[int]:
    """The flat head of Q, K or V that belongs to each flat query head."""
    group = problem.num_heads_q // problem.num_heads_kv
    if what == "Q":
        return list(range(problem.batch * problem.num_heads_q))
    return [b * problem.num_heads_kv + h // group for b in range(problem.batch) for h in range(problem.num_heads_q)]


def _rule(read: list[int], per_batch: int, problem: Problem, what: str) -> tuple[str, str] | None:
    group = 1 if what == "Q" else problem.num_heads_q // problem.num_heads_kv
    batches, heads_q = problem.batch, problem.num_heads_q
    heads = {
        "": lambda h: h // group,
        "heads are mapped by remainder (h % num_heads_kv) instead of by group": lambda h: h % per_batch,
        "head 0 is taken for all heads": lambda h: 0,
        "heads are counted backwards": lambda h: per_batch - 1 - h // group,
    }
    for shift in range(1, per_batch):
        heads[f"heads are shifted by {shift}"] = lambda h, s=shift: (h // group + s) % per_batch
        heads[f"heads are shifted by {shift} and end at the last one"] = lambda h, s=shift: min(
            h // group + s, per_batch - 1
        )
    of_batch = {
        "": lambda b: b,
        "batch 0 is taken for all batches": lambda b: 0,
        "batches are counted backwards": lambda b: batches - 1 - b,
        "the batch is doubled": lambda b: 2 * b % batches,
    }
    for shift in range(1, batches):
        of_batch[f"batches are shifted by {shift}"] = lambda b, s=shift: (b + s) % batches
    for head_words, of_head in heads.items():
        for batch_words, b_of in of_batch.items():
            made = [b_of(b) * per_batch + of_head(h) for b in range(batches) for h in range(heads_q)]
            if made == read:
                words = " and ".join(w for w in (head_words, batch_words) if w)
                kind = "another head" if head_words else "another batch"
                return f"{what} of {kind}", words
    return None


def of_output(marks: dict[str, torch.Tensor | None], problem: Problem) -> Hypothesis | None:
    """A name for results that stand at another head than their own: Q, K and V all come from the same other head."""
    if any(table is None for table in marks.values()):
        return None
    to = marks["Q"].tolist()
    own = right_heads("K", problem)
    if to == list(range(len(to))) or any(marks[what].tolist() != [own[h] for h in to] for what in "KV"):
        return None
    first = next(n for n, h in enumerate(to) if n != h)
    per_batch = problem.num_heads_q
    rule = _rule(to, per_batch, problem, "Q")
    why = f": {rule[1]}" if rule else ""
    at = head_of(first, problem)
    return Hypothesis(
        "result of another head", f"the result of batch {to[first] // per_batch}, head {to[first] % per_batch} stands "
        f"at batch {at['batch']}, head {at['head']}{why}", ("out",),
        {"q_heads": marks["Q"], "k_heads": marks["K"], "v_heads": marks["V"]}, at,
    )  # fmt: skip
