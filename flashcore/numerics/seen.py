"""Which keys a query sees, and where the rows of a ragged batch lie: tensors of places, made without a look at lengths.

Nothing here reads a number back from a device, so that lengths may lie on a GPU, and a compiled graph serves them all.
"""

from __future__ import annotations

import torch


def hidden(
    row: torch.Tensor,
    column: torch.Tensor,
    seqlen_q: int,
    seqlen_k: int,
    *,
    left: int = -1,
    right: int = -1,
    lengths_q: torch.Tensor | None = None,
    lengths_k: torch.Tensor | None = None,
    at_end: bool = False,
) -> torch.Tensor | None:
    """True where a query does not see a key by lengths and window; None where all see all.

    Parameters
    ----------
    row, column
        Places of queries ``[rows, 1]`` and of keys ``[keys]`` in the padded tensors.
    seqlen_q, seqlen_k
        Rows that the padded tensors have.
    left, right
        Keys before and after its own position that a query sees; -1 for no limit.
    lengths_q, lengths_k
        Real rows of each sequence, in a shape that broadcasts before ``[rows, keys]``, such as ``[B, 1, 1]``.
    at_end
        The last rows are the real ones, not the first.

    Returns
    -------
    bool, broadcast over the lengths and ``[rows, keys]``
    """
    num_q, num_k = (
        size if lengths is None else lengths.long() for size, lengths in ((seqlen_q, lengths_q), (seqlen_k, lengths_k))
    )
    # With the padding in front, the last query stands beside the last key in the padded tensors as in the real ones.
    position = row + (seqlen_k - seqlen_q if at_end else num_k - num_q)
    parts = []
    for place, size, num, lengths in ((row, seqlen_q, num_q, lengths_q), (column, seqlen_k, num_k, lengths_k)):
        if lengths is not None:
            parts.append(place < size - num if at_end else place >= num)
    if right >= 0:
        parts.append(column > position + right)
    if left >= 0:
        parts.append(column < position - left)
    if not parts:
        return None
    found = parts[0]
    for part in parts[1:]:
        found = found | part
    return found


def unreal(lengths: torch.Tensor, size: int, at_end: bool = False) -> torch.Tensor:
    """bool ``[B, size]``: True where a row of a padded tensor is not real; `lengths` integers ``[B]``."""
    row = torch.arange(size, device=lengths.device)
    lengths = lengths.long()[:, None]
    return row < size - lengths if at_end else row >= lengths


def alternating(
    lengths: torch.Tensor | None, batch: int, size: int, device: torch.device, at_end: bool = False
) -> torch.Tensor:
    """A padded batch, its rows laid end to end, as a ragged one of twice as many sequences: real rows, then padding.

    What reads ragged batches alone then computes a padded one, without a look at its lengths: padding attends to
    padding, and its rows are cleared afterwards.

    Parameters
    ----------
    lengths
        Integers ``[batch]``, or None where all rows are real.
    at_end
        The padding comes before the real rows.

    Returns
    -------
    int32 ``[2 * batch + 1]``: sequence ``2 * b`` is the real one of b, with `at_end` ``2 * b + 1``.
    """
    first = torch.arange(0, batch * size, size, device=device)
    real = torch.full_like(first, size) if lengths is None else lengths.long()
    turn = first + (size - real if at_end else real)
    ends = torch.stack([turn, first + size], dim=1).flatten()
    return torch.cat([first[:1], ends]).int()


def places(starts: torch.Tensor, tokens: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence of each token of a ragged batch, and the token's row in it, int64 ``[tokens]`` both.

    Tokens past the last sequence get a place too, which means nothing.
    """
    token = torch.arange(tokens, device=starts.device)
    sequence = torch.searchsorted(starts[1:].contiguous().long(), token, right=True).clamp(max=starts.shape[0] - 2)
    return sequence, (token - starts.long()[sequence]).clamp(0, longest - 1)


def padded(tensor: torch.Tensor, starts: torch.Tensor, longest: int) -> torch.Tensor:
    """``[B, longest, ...]`` of a ragged ``[tokens, ...]``; 0 past the end of a sequence."""
    nth = torch.arange(longest, device=tensor.device)
    inside = nth < starts.diff()[:, None]
    if tensor.shape[0] == 0:
        return tensor.new_zeros(*inside.shape, *tensor.shape[1:])
    index = (starts[:-1, None].long() + nth).clamp(0, tensor.shape[0] - 1)
    # Not times 0: what stands there belongs to another sequence, and may be NaN.
    return tensor[index].masked_fill(~inside.view(*inside.shape, *(1,) * (tensor.dim() - 1)), 0.0)


def packed(tensor: torch.Tensor, starts: torch.Tensor, tokens: int, other: float = 0.0) -> torch.Tensor:
    """``[tokens, ...]`` of a padded ``[B, longest, ...]``; `other` in tokens past the last sequence."""
    sequence, row = places(starts, tokens, tensor.shape[1])
    outside = torch.arange(tokens, device=starts.device) >= starts[-1]
    return tensor[sequence, row].masked_fill(outside.view(-1, *(1,) * (tensor.dim() - 2)), other)
