"""Join what attention gave for two sets of keys into what it gives for both."""

from __future__ import annotations

import math

import torch


def join(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Bring a partial result into another, in place.

    With ``lse = log(exp(lse_1) + exp(lse_2))`` the result is ``exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2``: both
    were divided by denominators of their own, and are now by that of all keys (Dao et al., FlashAttention, section 3).

    Parameters
    ----------
    out, lse
        float32 ``[..., rows, head_dim]`` and ``[..., rows]``; 0 and -inf for rows that saw no key so far.
    part, part_lse
        Of other keys, in any floating dtype; a row that sees none of them leaves `out` and `lse` as they are, bit by
        bit.
    """
    total = torch.logaddexp(lse, part_lse)
    # What no key of either part is seen by has -inf less -inf, which is NaN.
    share = torch.exp(part_lse - total).masked_fill_(total == -math.inf, 0.0)
    out.lerp_(part.float(), share.unsqueeze(-1))
    lse.copy_(total)
