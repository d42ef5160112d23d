"""`reference`: attention in float64 on whatever device the tensors lie on. The truth, and never fast."""

from __future__ import annotations

from flashcore.backends._contract import Backend
from flashcore.backends._registry import register
from flashcore.numerics import masking, reference
from flashcore.paging import paged_reference


@register
class ReferenceBackend(Backend):
    """Exact attention; its results are rounded to the dtype of the inputs, its trace stays float64."""

    id = "reference"
    title = "float64, stage by stage"
    role = "reference"
    device = "any"
    dtypes = ("float16", "bfloat16", "float32")
    masks = ("window", "softcap", "sink", "lengths", "ragged")
    traceable = True
    paged = True
    paged_masks = ("window", "softcap", "sink")

    def run(self, q, k, v, problem, masks=None):
        masking.check_call(masks, problem, q, k)
        out, lse = reference.attention(q, k, v, problem, masks)
        return out.to(q.dtype), lse.float()

    def trace(self, q, k, v, problem, masks=None):
        masking.check_call(masks, problem, q, k)
        return reference.trace(q, k, v, problem, masks=masks)

    def run_paged(self, q, cache, problem, selection=None, masks=None):
        masking.check(masks, problem, q.device)
        out, lse = paged_reference(
            q, cache, selection, causal=problem.causal, softmax_scale=problem.softmax_scale,
            window_left=problem.window_left, window_right=problem.window_right, softcap=problem.softcap,
            sink=masks.sink if problem.sink else None,
        )  # fmt: skip
        return out.to(q.dtype), lse.float()
