"""Wrong arguments of the host: each changes what it says, by as much as it says, and nothing else."""

from __future__ import annotations

import pytest
import torch

from flashcore import backends
from flashcore.faults.planting import PLAIN, Source
from flashcore.faults.plants import host

Q, K = torch.empty(2, 4, 100, 64), torch.empty(2, 2, 200, 64)


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (host.BATCH_STRIDE_IN_BYTES, [2 * 2 * 200 * 64, 200 * 64, 64]),
        (host.ONE_K_HEAD, [2 * 200 * 64, 0, 64]),
        (host.k_strides(lambda s: [s[0], s[1], s[2] + 8]), [2 * 200 * 64, 200 * 64, 72]),
    ],
    ids=["batch in bytes", "one head", "longer rows"],
)
def test_the_strides_of_k_alone_are_wrong(plant, expected):
    planted = plant.apply(backends.get("scalar"))
    assert list(planted.strides("k", K)) == expected
    assert list(planted.strides("q", Q)) == list(Q.stride()[:3]) and list(planted.strides("v", K)) == [25600, 12800, 64]
    assert list(backends.get("scalar").strides("k", K)) == [25600, 12800, 64], "the backend itself stays right"


def test_the_scale_is_applied_twice():
    planted = host.SCALE_TWICE.apply(backends.get("wmma"))
    assert planted.scale(PLAIN) == PLAIN.scale**2 != backends.get("wmma").scale(PLAIN) == PLAIN.scale


def test_a_patch_is_written_as_pairs():
    assert host.source(("a", "b"), ("c", "d")) == Source((("a", "b"), ("c", "d")))
