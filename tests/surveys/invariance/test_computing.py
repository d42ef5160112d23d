"""Every way computes attention of the sequence that it is asked about, and of the rows that it says."""

from __future__ import annotations

import pytest
import torch
from support.steady_attention import Steady

from flashcore.errors import Unsupported
from flashcore.numerics import reference
from flashcore.numerics.masking import MaskTensors
from flashcore.surveys.invariance import Setting, Way
from flashcore.surveys.invariance.computing import Computer
from flashcore.surveys.invariance.values import Values
from flashcore.surveys.invariance.ways import implementation

SETTING = Setting(
    seed=2, group=2, sink=True, window_left=30, lengths=((9, 70), (3, 5), (6, 40), (9, 9)),
    patterns=("rows apart", "late", "normal", "normal"),
)  # fmt: skip
EVEN = Setting(seed=3, causal=False, lengths=((5, 33),) * 3, patterns=("rising", "normal", "late"))
WAYS = [
    Way(), Way(layout="bshd"), Way(layout="spare", others=True), Way(cuts=(300, 700)), Way(step=1),
    Way("ragged", together=4), Way("ragged", together=3, cuts=(500,)), Way("ragged", together=4, step=2, others=True),
    Way("padded", together=4), Way("padded", together=4, left=True, step=1),
    Way("paged", page_size=16, by="steady"), Way("paged", page_size=32, together=4, by="steady", others=True),
    Way("paged", page_size=16, together=4, step=2, by="steady"),
    Way("paged", page_size=16, together=4, shared=True, by="steady"),
]  # fmt: skip


def truth(setting: Setting, values: Values, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    one = values.of(index)
    problem = setting.problem(1, *setting.lengths[index], invariant=False)
    masks = MaskTensors(sink=values.sink) if setting.sink else None
    out, lse = reference.attention(one.q[None], one.k[None], one.v[None], problem, masks)
    return out[0], lse[0]


@pytest.mark.parametrize("way", WAYS, ids=Way.line)
def test_a_way_gives_attention_of_its_sequence(way):
    values = Values(SETTING, "cpu")
    answers = Computer(implementation(Steady()), SETTING, values, invariant=True).answers(way, [0, 2, 3])
    assert answers
    for index, answer in answers.items():
        out, lse = truth(SETTING, values, index)
        kept = torch.ones_like(answer.lse, dtype=torch.bool) if answer.kept is None else answer.kept
        assert answer.first + answer.out.shape[1] == SETTING.lengths[index][0] and kept[:, -1].any()
        assert (answer.kept is not None) == way.others
        torch.testing.assert_close(answer.out.double()[kept], out[:, answer.first :][kept], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(answer.lse.double()[kept], lse[:, answer.first :][kept], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("way", [Way("batch", together=3), Way("batch", together=2, cuts=(500,)), Way(step=2)])
def test_a_dense_batch_gives_it_too(way):
    values = Values(EVEN, "cpu")
    answers = Computer(implementation("sdpa-math"), EVEN, values, invariant=False).answers(way, range(3))
    assert set(answers) == {0, 1, 2}
    for index, answer in answers.items():
        assert answer.lse is None
        out = truth(EVEN, values, index)[0][:, answer.first :]
        torch.testing.assert_close(answer.out.double(), out, atol=4e-3, rtol=4e-3)


def test_who_borrows_pages_of_another_is_not_compared():
    way = Way("paged", page_size=16, together=4, shared=True, by="steady")
    answers = Computer(implementation(Steady()), SETTING, Values(SETTING, "cpu"), invariant=True).answers(way, range(4))
    assert len(answers) == 2


def test_a_single_row_has_no_others_beside_it():
    lone = Setting(lengths=((1, 8),))
    computer = Computer(implementation("cpu"), lone, Values(lone, "cpu"), invariant=False)
    assert computer.answers(Way(others=True), [0]) == {} and computer.answers(Way(), [0])


def test_a_call_that_is_not_taken_is_said():
    computer = Computer(implementation("sdpa-math"), SETTING, Values(SETTING, "cpu"), invariant=False)
    with pytest.raises(Unsupported, match="a sink"):
        computer.answers(Way(), [0])
