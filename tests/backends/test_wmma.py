"""Backend `wmma`: its kernel's file, entry and launch shape fit what the backend says."""

from __future__ import annotations

import re

from support import launch_structs

from flashcore import backends
from flashcore.backends._cuda import PARAMS
from flashcore.backends.wmma import Wmma
from flashcore.gpu import build
from flashcore.problem import square

WMMA = backends.get("wmma")


def test_the_file_has_the_entry_and_the_shape_that_are_loaded():
    source = build.kernel_source("attention_wmma")
    assert type(WMMA) is Wmma and WMMA.entry(square(1, 1, 8, 64), 0) == "attention_wmma"
    assert re.search(r'extern "C" __global__ [^{;]*attention_wmma\(const AttentionParams params TRACE_PARAM', source)
    shape = "LaunchShape attention_wmma_shape = {TILE_M, TILE_N, WARPS * WARP, sizeof(SharedMemory)};"
    assert shape in source, "one chain of pages, so that a trace has no other"
    assert launch_structs.declared("attention_wmma", "AttentionParams") == launch_structs.packed(PARAMS)
    assert WMMA.source_hash() == build.source_hash("attention_wmma")


def test_every_variant_that_is_built_is_taken_and_no_other():
    assert build.variants("attention_wmma") == [(d, t) for d in WMMA.head_dims for t in WMMA.dtypes]
    for head_dim, dtype in build.variants("attention_wmma"):
        assert WMMA.why_not(square(1, 1, 8, head_dim, dtype=dtype)) is None
    assert WMMA.why_not(square(1, 1, 8, 256)) == "head_dim 256 is not among 64, 128"
    assert WMMA.why_not(square(1, 1, 8, 64, dtype="float32")) == "dtype float32 is not among float16, bfloat16"


def test_it_is_swept_and_works_on_fragments():
    assert WMMA.swept and WMMA.traceable and not WMMA.paged
    source = build.kernel_source("attention_wmma")
    assert "wmma::mma_sync" in source and "wgmma" not in source
