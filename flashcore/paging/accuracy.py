"""What leaving pages out costs: attention mass recalled and output error against dense, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashcore.numerics import ambient
from flashcore.paging.reference import paged_reference
from flashcore.paging.selection import PageSelection
from flashcore.paging.tables import PagedKV


@dataclass(frozen=True)
class SelectionAccuracy:
    """One selection against dense attention, over all sequences, query heads and query tokens that see a key."""

    mass_mean: float
    """Attention mass recalled: the share of the dense softmax that falls on keys selected."""
    mass_least: float
    """Of the query that lost most."""
    error_mean: float
    """Output error: ``|out - dense| / |dense|``, Euclidean over head_dim."""
    error_largest: float
    """Of the query that came out worst."""
    pages_share: float
    """Pages selected over pages present, over all sequences and KV heads."""


@ambient.judging
def recalled(
    q: torch.Tensor, cache: PagedKV, selection: PageSelection, *, causal: bool = True, softmax_scale=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass recalled and output error of each query, float64 ``[batch, num_heads_q, q_tokens]``, NaN if it sees no key.

    The mass needs no probabilities: both softmaxes have the same numerators, so their denominators' ratio
    ``exp(lse_selected - lse_dense)`` is it.
    """
    dense, dense_lse = paged_reference(q, cache, causal=causal, softmax_scale=softmax_scale)
    out, lse = paged_reference(q, cache, selection, causal=causal, softmax_scale=softmax_scale)
    error = (out - dense).norm(dim=-1) / dense.norm(dim=-1)
    return (lse - dense_lse).exp(), error.masked_fill(dense_lse.isinf(), torch.nan)


@ambient.judging
def selection_accuracy(
    q: torch.Tensor, cache: PagedKV, selection: PageSelection, *, causal: bool = True, softmax_scale=None
) -> SelectionAccuracy:
    """Sum `recalled` up. Waits for the device.

    Parameters are those of `flashcore.paging.paged_reference`.
    """
    mass, error = recalled(q, cache, selection, causal=causal, softmax_scale=softmax_scale)
    mass, error = mass[~mass.isnan()], error[~error.isnan()]
    resident = cache.resident_pages()[:, None]
    chosen = selection.mask(cache.max_pages) & resident
    return SelectionAccuracy(
        mass_mean=float(mass.mean()),
        mass_least=float(mass.min()),
        error_mean=float(error.mean()),
        error_largest=float(error.max()),
        pages_share=float(chosen.sum() / (resident.sum() * cache.num_heads_kv)),
    )
