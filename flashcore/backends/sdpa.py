"""`sdpa-math`, `sdpa-flash`, `sdpa-cudnn`: the peers in torch itself, each pinned to one of its implementations."""

from __future__ import annotations

from typing import ClassVar

from flashcore.backends._contract import AVAILABLE, Availability, Backend
from flashcore.backends._peers import readable, with_empty_rows, with_scale_above_zero
from flashcore.backends._registry import register
from flashcore.errors import Unsupported
from flashcore.numerics import ambient, reference
from flashcore.problem import Problem


def cudnn_version(number: int) -> str:
    """cuDNN's version as people write it: 91900 is 9.19.0, and before cuDNN 9 8907 was 8.9.7.

    Source: cudnn_version.h, where CUDNN_VERSION is ``major * 10000 + minor * 100 + patch``, and 1000 for 10000 up to 8.
    """
    step = 10_000 if number >= 10_000 else 1_000
    return f"{number // step}.{number % step // 100}.{number % 100}"


class _Sdpa(Backend):
    """``torch.nn.functional.scaled_dot_product_attention`` held to one implementation; it returns no `lse`."""

    role = "peer"
    device = "cuda"
    choice: ClassVar[str]
    """Name of the member of ``torch.nn.attention.SDPBackend``."""
    min_capability: ClassVar[tuple[int, int]] = (8, 0)
    fused: ClassVar[bool] = True
    """Whether one kernel does it all, and takes only tensors and scales that it can (`flashcore.backends._peers`)."""

    def availability(self) -> Availability:
        import torch

        if not torch.cuda.is_available():
            return Availability(False, "no CUDA device is visible to torch", "run on a machine with an NVIDIA GPU and "
                                "a CUDA build of torch ('flashcore doctor' checks both)")  # fmt: skip
        if torch.cuda.get_device_capability() < self.min_capability:
            return Availability(False, "the GPU is older than torch's fused attention takes",
                                f"use a GPU of compute capability {self.min_capability[0]}.0 or newer")  # fmt: skip
        return AVAILABLE

    def software(self) -> str | None:
        import torch

        return f"torch {torch.__version__}"

    def why_not(self, problem: Problem) -> str | None:
        reason = super().why_not(problem)
        if reason is None and problem.causal and problem.seqlen_q != problem.seqlen_k:
            reason = "with unequal lengths torch aligns its causal mask top left, and FlashCore bottom right"
        return reason

    def run(self, q, k, v, problem):
        return self._call(q, k, v, problem, None, problem.causal), None

    def _call(self, q, k, v, problem: Problem, mask, is_causal: bool):
        from torch.nn.attention import SDPBackend
        from torch.nn.functional import scaled_dot_product_attention

        scale = problem.scale
        if self.fused:
            q, scale = with_scale_above_zero(q, scale)
            q, k, v = readable(q), readable(k), readable(v)
        try:
            with ambient.torchs_kernel(getattr(SDPBackend, self.choice)):
                return scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale,
                    enable_gqa=problem.num_heads_q != problem.num_heads_kv,
                )  # fmt: skip
        except RuntimeError as error:
            # What torch's implementations take differs by release; torch says so only when it is asked to run.
            if "No available kernel" in str(error):
                reason = "this torch has no such kernel for the shape, dtype or grouped heads"
                raise Unsupported(self.id, reason) from error
            raise


@register
class SdpaMath(_Sdpa):
    """The unfused path: scores and probabilities go through memory. Runs on the CPU too."""

    id = "sdpa-math"
    title = "torch SDPA, unfused"
    device = "any"
    dtypes = ("float16", "bfloat16", "float32")
    masks = ("window",)
    choice = "MATH"
    fused = False
    max_scores = 2**31
    """8 GiB in float32; torch holds a few copies, and a GPU of 80 GiB has to hold them beside everything else."""

    def availability(self) -> Availability:
        return AVAILABLE

    def why_not(self, problem: Problem) -> str | None:
        scores = problem.batch * problem.num_heads_q * problem.seqlen_q * problem.seqlen_k
        if scores > self.max_scores:
            return f"it stores every score, {4 * scores / 2**30:.0f} GiB of them in float32 and several times over"
        return Backend.why_not(self, problem)

    def run(self, q, k, v, problem):
        if "window" not in problem.masks and (not problem.causal or problem.seqlen_q == problem.seqlen_k):
            return super().run(q, k, v, problem)
        rows, columns = slice(0, problem.seqlen_q), slice(0, problem.seqlen_k)
        out = self._call(q, k, v, problem, reference.visible(problem, rows, columns, q.device), False)
        # The first rows may see no key. Torch's releases differ on the softmax of nothing (NaN or 0); here it is 0.
        return with_empty_rows(out, None, problem)


@register
class SdpaFlash(_Sdpa):
    """FlashAttention-2 as torch ships it."""

    id = "sdpa-flash"
    title = "torch SDPA, FlashAttention-2"
    choice = "FLASH_ATTENTION"
    step: ClassVar[int] = 8
    """What a head_dim has to be a multiple of; zeros make up what is missing, and change no product."""

    def why_not(self, problem: Problem) -> str | None:
        if problem.head_dim > 256:
            return "FlashAttention-2 takes a head_dim up to 256"
        return Backend.why_not(self, problem)

    def run(self, q, k, v, problem):
        if problem.causal and problem.seqlen_q != problem.seqlen_k:
            return self.run_with_lse(q, k, v, problem)
        return super().run(q, k, v, problem)

    def run_with_lse(self, q, k, v, problem):
        """By the op beneath torch's function: it returns `lse`, and aligns its causal mask bottom right."""
        import torch

        q, scale = with_scale_above_zero(q, problem.scale)
        missing = -problem.head_dim % self.step
        q, k, v = (readable(torch.nn.functional.pad(t, (0, missing)) if missing else t) for t in (q, k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = flash(q, k, v, 0.0, problem.causal, False, scale=scale)[:2]
        # Rows that see no key: there the kernel has lse +inf.
        out, lse = with_empty_rows(out, lse, problem)
        return out[..., : problem.head_dim] if missing else out, lse


@register
class SdpaCudnn(_Sdpa):
    """cuDNN's fused attention through torch."""

    id = "sdpa-cudnn"
    title = "torch SDPA, cuDNN"
    choice = "CUDNN_ATTENTION"

    def software(self) -> str | None:
        import torch

        found = torch.backends.cudnn.version()
        return None if found is None else f"cuDNN {cudnn_version(found)}"

    def why_not(self, problem: Problem) -> str | None:
        if problem.head_dim % 8:
            return "cuDNN takes a head_dim that is a multiple of 8"
        return super().why_not(problem)
