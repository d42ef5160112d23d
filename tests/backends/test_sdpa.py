"""The peers in torch: right where they run, and one sentence for what each does not take."""

from __future__ import annotations

import pytest
import torch

from flashcore import backends
from flashcore.errors import BackendUnavailable, Unsupported
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs
from flashcore.problem import Problem, square

UNEQUAL = Problem(batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=50, head_dim=24, causal=True)


@pytest.mark.parametrize("problem", [UNEQUAL, UNEQUAL.with_(seqlen_q=20), UNEQUAL.with_(causal=False),
                                     square(2, 2, 33, 16, causal=True)], ids=lambda p: p.label())  # fmt: skip
def test_sdpa_math_is_bottom_right_aligned_and_gives_empty_rows_zero(problem):
    inputs = make_inputs(problem)
    out, lse = backends.get("sdpa-math").run(*inputs, problem)
    assert lse is None
    torch.testing.assert_close(out.double(), reference.attention(*inputs, problem)[0], rtol=2e-3, atol=2e-3)


def test_fused_peers_say_what_they_do_not_take():
    for name in ("sdpa-flash", "sdpa-cudnn"):
        backend = backends.get(name)
        assert "top left" in backend.why_not(UNEQUAL)
        assert backend.why_not(UNEQUAL.with_(causal=False)) is None
        assert "dtype float32" in backend.why_not(square(1, 1, 8, 64, dtype="float32"))
        if not torch.cuda.is_available():
            with pytest.raises(BackendUnavailable, match="no CUDA device"):
                backend.require(square(1, 1, 8, 64))
    assert "up to 256" in backends.get("sdpa-flash").why_not(square(1, 1, 8, 512))
    assert "multiple of 8" in backends.get("sdpa-cudnn").why_not(square(1, 1, 8, 20))


def test_torch_having_no_kernel_is_unsupported_not_a_crash(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    problem = square(1, 1, 8, 8)
    with pytest.raises(Unsupported, match="no such kernel"):
        backends.get("sdpa-math").run(*make_inputs(problem), problem)
