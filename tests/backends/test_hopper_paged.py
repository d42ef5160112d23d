"""Backend `hopper-paged`: the Hopper kernel compiled for pages, which takes what its tiles and pages allow."""

from __future__ import annotations

from flashcore import backends
from flashcore.gpu import build
from flashcore.problem import square


def test_it_runs_the_hopper_kernel_compiled_for_pages():
    paged, hopper = backends.get("hopper-paged"), backends.get("hopper")
    assert paged.kernel == hopper.kernel and paged.paged and not paged.dense
    assert dict(paged.defines(square(1, 2, 256, 64), 0)).get("FLASHCORE_PAGED") == 1
    assert "FLASHCORE_PAGED" in build.kernel_source(paged.kernel)
    assert paged.source_hash() == hopper.source_hash()


def test_it_refuses_a_selection_of_pages_and_other_head_dims_with_a_reason():
    paged = backends.get("hopper-paged")
    assert paged.why_not_paged(square(1, 2, 256, 64)) is None
    assert "96" in paged.why_not(square(1, 2, 256, 96))
    assert paged.why_not_paged(square(1, 2, 256, 64), selected=True)
