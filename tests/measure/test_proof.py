"""Turned inputs have turned answers, every result is compared, and what is wrong in one call is found."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore import backends
from flashcore.errors import WrongWhenTimed
from flashcore.measure import proof as module
from flashcore.measure.proof import Proof, Turn
from flashcore.measure.timing import Candidate, time_on_cpu
from flashcore.numerics import masking, reference
from flashcore.numerics.inputs import make_inputs, make_masks
from flashcore.problem import Problem, square

SMALL = square(2, 2, 40, 16)
GROUPED = Problem(batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=24, seqlen_k=40, head_dim=8, causal=True)
CPU = backends.get("cpu")


def proof_of(problem=SMALL) -> Proof:
    return Proof(problem, [make_inputs(problem)])


@pytest.mark.parametrize("problem", [SMALL, GROUPED], ids=lambda p: p.label())
def test_a_turn_of_the_inputs_is_the_same_turn_of_the_answer(problem):
    turn = Turn(3, 5, -1)
    values = tuple(t.double() for t in make_inputs(problem))
    out, lse = reference.attention(*values, problem)
    turned, turned_lse = reference.attention(*turn.of(values), problem)
    assert torch.allclose(turned, turn.of_out(out), atol=1e-12) and torch.allclose(turned_lse, lse, atol=1e-12)
    assert not torch.allclose(turned, out)


def test_no_two_calls_get_the_same_inputs_and_addresses_stay():
    one = proof_of()
    addresses, seen = [t.data_ptr() for t in one.buffers[0]], [t.clone() for t in one.buffers[0]]
    turns = [one.next_turn() for _ in range(30)]
    assert len(set(turns)) == 30
    one.lay(turns[0])
    assert [t.data_ptr() for t in one.buffers[0]] == addresses
    assert not any(torch.equal(a, b) for a, b in zip(seen, one.buffers[0], strict=True))


def test_two_proofs_have_different_values():
    assert proof_of().seed != proof_of().seed


@pytest.mark.parametrize("name", ["cpu", "sdpa-math"])
@pytest.mark.parametrize("problem", [SMALL, GROUPED, SMALL.with_(dtype="bfloat16")], ids=lambda p: p.label())
def test_right_results_have_no_fault(name, problem):
    one = proof_of(problem)
    for _ in range(3):
        turn = one.next_turn()
        one.lay(turn)
        one.take("x", turn, backends.get(name).run(*one.buffers[0], problem))
    assert one.fault("x") is None


MASKED = GROUPED.with_(batch=3, window_left=9, softcap=4.0, sink=True, lengths="ragged")


def test_masked_calls_are_proved_with_the_lengths_that_all_are_given():
    masks = make_masks(MASKED, seed=4)
    one = Proof(MASKED, [make_inputs(MASKED, seed=seed, masks=masks) for seed in (4, 5)], masks)
    for number in (0, 1):
        turn = one.next_turn()
        one.lay(turn, number)
        one.take("x", turn, CPU.run(*one.buffers[number], MASKED, masks=masks), number)
        changed = masking.changed(masks, lambda t: t + 1 if t.is_floating_point() else t)
        one.take(f"sinks {number}", turn, CPU.run(*one.buffers[number], MASKED, masks=changed), number)
    assert one.fault("x") is None
    assert "on values it had not seen" in one.fault("sinks 1")[0]


def spoilt(out, lse, value=1.0):
    out = out.clone()
    out[1, 1, 7, 3] += value
    return out, lse


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (spoilt, "in timed call 3 of 4 on values it had not seen, out: 1 of"),
        (lambda out, lse: spoilt(out, lse, math.nan), "out: 1 of"),
        (lambda out, lse: (out, lse + 1), "lse: 160 of"),
        (lambda out, lse: out, "in timed call 3 of 4 it returned Tensor"),
        (lambda out, lse: (out.float(), lse), "out is torch.float32"),
        (lambda out, lse: (torch.nn.Parameter(out, requires_grad=False), lse), "of class Parameter"),
    ],
)
def test_one_wrong_call_of_several_is_found(change, said):
    one = proof_of()
    for call in range(4):
        turn = one.next_turn()
        one.lay(turn)
        results = CPU.run(*one.buffers[0], SMALL)
        one.take("x", turn, change(*results) if call == 2 else results)
    reason, found = one.fault("x")
    assert said in reason
    assert found is None or not found.passed


def test_results_are_copied_when_they_are_taken():
    one, turn = proof_of(), Turn(0, 0, 1)
    one.lay(turn)
    out, lse = CPU.run(*one.buffers[0], SMALL)
    one.take("x", turn, (out, lse))
    out.zero_()
    assert one.fault("x") is None


def test_changed_inputs_are_a_fault():
    one, turn = proof_of(), Turn(1, 1, 1)
    one.lay(turn)
    results = CPU.run(*one.buffers[0], SMALL)
    one.buffers[0][1][0, 0, 0, 0] += 1
    one.take("x", turn, results)
    assert one.fault("x") == ("in a timed call it changed its inputs (k)", None)


def test_the_reference_is_computed_when_all_calls_are_over(monkeypatch):
    made = []
    true = module.expected
    monkeypatch.setattr(module, "expected", lambda *a, **more: made.append(1) or true(*a, **more))
    one = proof_of()
    for name in ("x", "y"):
        turn = one.next_turn()
        one.lay(turn)
        one.take(name, turn, CPU.run(*one.buffers[0], SMALL))
    assert made == []
    assert one.fault("x") is None and one.fault("y") is None and made == [1]


def test_a_timing_that_was_proved_says_so_and_a_wrong_one_is_an_error():
    tensors = make_inputs(SMALL)
    late = []

    def sometimes(_):
        out, lse = CPU.run(*tensors, SMALL)
        late.append(1)
        return (out * 1.05, lse) if len(late) == 4 else (out, lse)

    found = time_on_cpu([Candidate("right", lambda _: CPU.run(*tensors, SMALL)), Candidate("late", sometimes)], SMALL,
                        rounds=4, proof=Proof(SMALL, [tensors]))  # fmt: skip
    assert found["right"].proved and len(found["right"].samples_us) == 4
    assert isinstance(found["late"], WrongWhenTimed) and "in timed call 3 of 4" in str(found["late"])
    assert found["late"].timing.latency_us > 0 and not found["late"].found.passed
