"""Tensors of a setting: fixed by its seed, alike whatever stands beside, and such that references have to be raised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashcore.surveys.invariance import Setting
from flashcore.surveys.invariance.cases import PATTERNS
from flashcore.surveys.invariance.values import LATES, RISES, Values

THREE = Setting(seed=5, heads_kv=2, group=3, lengths=((4, 200), (2, 7), (9, 90)), patterns=("late", "normal", "huge"))


def scores(values: Values, index: int) -> torch.Tensor:
    one = values.of(index)
    k = one.k.float().repeat_interleave(values.setting.group, 0)
    return one.q.float() @ k.transpose(1, 2) * values.scale


def test_a_sequence_is_the_same_whatever_others_there_are():
    whole, part = Values(THREE, "cpu"), replace(THREE, lengths=THREE.lengths[1:], patterns=THREE.patterns[1:], first=1)
    for name in "qkv":
        assert torch.equal(getattr(whole.of(2), name), getattr(Values(part, "cpu").of(1), name))
    assert whole.of(1).q.shape == (6, 2, 64) and whole.of(1).k.shape == (2, 7, 64)
    assert not torch.equal(whole.of(0).k[:, :7], whole.of(1).k)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_pattern_is_finite_and_what_it_says(pattern):
    values = Values(Setting(seed=1, group=4, lengths=((40, 400),), patterns=(pattern,), first=11), "cpu")
    found = scores(values, 0)
    assert found.isfinite().all()
    rise = found[..., -40:].mean(-1) - found[..., :40].mean(-1)
    if pattern == "rising":
        assert (rise > RISES[2] / 2).all()
    elif pattern == "rows apart":
        assert (rise > RISES[2] / 4).any() and (rise < -RISES[2] / 4).any()
    elif pattern == "late":
        late = found[..., 250:].amax(-1)
        assert (late > LATES[1] / 2).any() and (late < LATES[1] / 4).any(), (
            "some rows of a head outgrow, and some do not"
        )
    elif pattern == "huge":
        assert found.std() > 8
    elif pattern == "equal":
        assert (found.amax(-1) - found.amin(-1)).max() == 0


def test_scores_may_rise_within_a_part_of_the_keys():
    teeth = Values(Setting(seed=1, lengths=((1, 700),) * 9, patterns=("rising",) * 9), "cpu")
    found = scores(teeth, 8)[0, 0]  # number 8 of 9: the steepest rise, along 320 keys
    assert all(found[at + 260 : at + 320].mean() > found[at : at + 60].mean() + RISES[2] / 2 for at in (0, 320))


def test_others_outgrow_and_the_kept_rows_are_the_sequences_own():
    values = Values(THREE, "cpu")
    mine, (changed, kept) = values.of(0), values.among_others(0)
    assert 0 < kept.sum() < kept.numel() and kept[:, -1].any()
    assert torch.equal(changed.q[kept], mine.q[kept]) and changed.k is mine.k
    k = mine.k.float().repeat_interleave(3, 0)
    reached = (changed.q.float() @ k.transpose(1, 2) * values.scale).amax(-1)
    assert (reached[~kept] > LATES[0] - 1).all()


def test_sinks_are_numbers_of_bfloat16():
    sink = Values(replace(THREE, sink=True), "cpu").sink
    assert sink.shape == (6,) and torch.equal(sink, sink.bfloat16().float()) and Values(THREE, "cpu").sink is None
