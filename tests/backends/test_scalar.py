"""Backend `scalar`: its kernel's file, entry and launch shape fit what the backend says."""

from __future__ import annotations

import re

from support import launch_structs

from flashcore import backends
from flashcore.backends._cuda import PARAMS
from flashcore.backends.scalar import Scalar
from flashcore.gpu import build
from flashcore.problem import square

SCALAR = backends.get("scalar")


def test_the_file_has_the_entry_and_the_shape_that_are_loaded():
    source = build.kernel_source("attention_scalar")
    assert type(SCALAR) is Scalar and SCALAR.entry(square(1, 1, 8, 64), 0) == "attention_scalar"
    assert re.search(r'extern "C" __global__ [^{;]*attention_scalar\(const AttentionParams params TRACE_PARAM', source)
    assert "LaunchShape attention_scalar_shape = {TILE_M, TILE_N, TILE_M * WARP, 0};" in source
    assert launch_structs.declared("attention_scalar", "AttentionParams") == launch_structs.packed(PARAMS)
    assert SCALAR.source_hash() == build.source_hash("attention_scalar")


def test_every_variant_that_is_built_is_taken_and_no_other():
    assert build.variants("attention_scalar") == [(d, t) for d in SCALAR.head_dims for t in SCALAR.dtypes]
    for head_dim, dtype in build.variants("attention_scalar"):
        assert SCALAR.why_not(square(1, 1, 8, head_dim, dtype=dtype)) is None
    assert SCALAR.why_not(square(1, 1, 8, 32)) == "head_dim 32 is not among 64, 128"
    assert SCALAR.why_not(square(1, 1, 8, 64, dtype="float32")) == "dtype float32 is not among float16, bfloat16"


def test_it_is_too_slow_to_sweep_and_uses_no_tensor_cores():
    assert not SCALAR.swept and SCALAR.traceable and not SCALAR.paged
    source = build.kernel_source("attention_scalar")
    assert "wmma" not in source and "wgmma" not in source and "mma.sync" not in source
