"""Attention made to order: inputs whose attention is known to be peaked, diffuse, drifting, or to hang on one key.

Each is built from logits. A query is a direction u over the softmax scale, plus a little of its own; a key is noise
plus a gain times u, and its logit is the gain plus noise of deviation 1. So a gain says what share of attention a key
gets, for any scale, head_dim and length.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from flashcore.errors import InvalidProblem, UnknownName
from flashcore.numerics import ambient
from flashcore.problem import Problem

AttentionPattern = Literal["peaked", "diffuse", "drifting", "needle"]
ATTENTION_PATTERNS: tuple[str, ...] = get_args(AttentionPattern)

MASS = 0.9
"""Share of attention on the keys that stand out, under `peaked` and `needle`."""
PEAKS = 16
"""Keys that stand out under `peaked`, for each KV head."""
REACH = 0.1
"""Under `drifting` the logit falls by 1 over this share of the context, going back from its end."""
QUERY_NOISE = 0.2
"""Length of what each query has of its own beside the direction u, of length 1, that its group shares."""


@ambient.judging
def make_attention(
    problem: Problem,
    pattern: AttentionPattern,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    channels: int = 4,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V whose attention has a known shape, for judging a policy that leaves pages out.

    Parameters
    ----------
    problem
        Shapes, dtype and scale; `seqlen_q` queries at the end of `seqlen_k` keys.
    pattern
        ``peaked``: 16 keys at random places hold 0.9 of the attention. ``diffuse``: every key counts about alike.
        ``drifting``: what the queries look for drifted along the context, so that recent keys count most and the rest
        less and less. ``needle``: one key between an eighth and half of the context holds 0.9.
    seed
        Of the generator on `device`.
    channels
        Entries of head_dim that u lies in. A page's key bounds tell pages apart by entries that stand out, as the few
        strong channels of real models' keys do; with ``channels=head_dim`` the same attention is spread so thin that
        bounds cannot see it, which is their weakness and not a fault.

    Returns
    -------
    q, k, v
        ``[batch, num_heads_q, seqlen_q, head_dim]`` and twice ``[batch, num_heads_kv, seqlen_k, head_dim]``. V is
        noise around a mean of its own for each head, so that an error relative to the output means something even
        where attention averages over everything. The values of keys that stand out are three times as long.

    Raises
    ------
    UnknownName, InvalidProblem
        No such pattern; `channels` is not from 1 to head_dim; a softmax scale of 0.
    """
    if pattern not in ATTENTION_PATTERNS:
        raise UnknownName("attention pattern", pattern, list(ATTENTION_PATTERNS))
    if not 1 <= channels <= problem.head_dim:
        raise InvalidProblem(f"channels is {channels}; it has to be from 1 to head_dim ({problem.head_dim}).")
    if problem.scale == 0:
        raise InvalidProblem("softmax_scale is 0, so that all keys count alike; a pattern needs another scale.")
    device = torch.device(device)
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    batch, heads, keys, dim = problem.batch, problem.num_heads_kv, problem.seqlen_k, problem.head_dim
    u = torch.zeros(batch, heads, dim, device=device)
    picked = torch.rand(batch, heads, dim, generator=generator, device=device).argsort(dim=-1)[..., :channels]
    u.scatter_(-1, picked, normal(batch, heads, channels).sign() / math.sqrt(channels))

    gain = torch.zeros(batch, heads, keys, device=device)
    stands_out = torch.zeros_like(gain, dtype=torch.bool)
    # exp(noise) has mean exp(1/2), so the other keys' weights add up to about keys * exp(1/2).
    others = math.log(keys) + 0.5
    if pattern == "drifting":
        from_end = 1.0 - torch.arange(1, keys + 1, device=device) / keys
        gain -= from_end / REACH
    elif pattern in ("peaked", "needle"):
        many = min(PEAKS, keys) if pattern == "peaked" else 1
        places = torch.rand(batch, heads, keys, generator=generator, device=device)
        if pattern == "needle":  # past any first pages, and outside a window over the last half
            places[..., : keys // 8] = 2.0
            places[..., keys // 2 :] = 2.0
        where = places.argsort(dim=-1)[..., :many]
        stands_out.scatter_(-1, where, True)
        gain[stands_out] = others + math.log(MASS / (1 - MASS) / many)

    k = normal(batch, heads, keys, dim)
    # A key that stands out has no noise along u, so that it holds the share that its gain says.
    along = (k @ u[..., None]).masked_fill(~stands_out[..., None], 0.0)
    k = k + (gain[..., None] - along) * u[..., None, :]
    group = problem.num_heads_q // heads
    own = normal(batch, problem.num_heads_q, problem.seqlen_q, dim) * (QUERY_NOISE / math.sqrt(dim))
    q = (u.repeat_interleave(group, dim=1)[:, :, None] + own) / problem.scale
    v = normal(batch, heads, keys, dim) + normal(batch, heads, 1, dim)
    v = torch.where(stands_out[..., None], 3.0 * v, v)
    dtype = getattr(torch, problem.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)
