"""Wrong arguments of the host: each changes what it says, by as much as it says, and nothing else."""

from __future__ import annotations

import pytest
import torch

from flashcore import backends
from flashcore.backends._cuda import PARAMS
from flashcore.backends._paged import PAGED
from flashcore.bisection.faults.catalogue import get
from flashcore.bisection.faults.planting import PLAIN, Source
from flashcore.bisection.faults.plants import host
from flashcore.numerics.inputs import make_inputs
from flashcore.paging import among_others

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


@pytest.mark.parametrize("name", ["scalar", "wmma", "hopper", "hopper-paged", "decode", "decode-paired"])
def test_v_is_addressed_by_the_strides_of_k_in_what_a_kernel_is_told(name):
    q, k, v = make_inputs(PLAIN, layout="apart")
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    right, planted = (b.params(q, k, v, out, lse, PLAIN) for b in (backends.get(name), get("G50").plant(name)))
    right, planted = PARAMS.unpack(right), PARAMS.unpack(planted)
    assert right[8:11] == planted[8:11] == planted[11:14] == k.stride()[:3] != right[11:14] == v.stride()[:3]
    assert right[:11] + right[14:] == planted[:11] + planted[14:]


@pytest.mark.parametrize("name", ["hopper-paged", "decode", "decode-paired"])
def test_rows_of_the_table_are_as_far_apart_as_they_are_wide(name):
    _, cache, _ = among_others(*make_inputs(PLAIN), PLAIN)
    right, planted = (b.paged_params(cache, None) for b in (backends.get(name), get("G52").plant(name)))
    right, planted = PAGED.unpack(right), PAGED.unpack(planted)
    assert (right[4], planted[4]) == (cache.page_table.stride(0), cache.max_pages) and right[4] > planted[4]
    assert right[:4] + right[5:] == planted[:4] + planted[5:]


def test_the_scale_is_applied_twice():
    planted = host.SCALE_TWICE.apply(backends.get("wmma"))
    assert planted.scale(PLAIN) == PLAIN.scale**2 != backends.get("wmma").scale(PLAIN) == PLAIN.scale


def test_a_patch_is_written_as_pairs():
    assert host.source(("a", "b"), ("c", "d")) == Source((("a", "b"), ("c", "d")))
