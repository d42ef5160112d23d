"""A model's keys and values in pages: one ledger and one page table for all layers, and pools of their own for each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from flashcore.errors import InvalidProblem, PageTableError
from flashcore.numerics import ambient
from flashcore.paging.arguments import check_new, check_rows, rows_given, whole
from flashcore.paging.cache import PagedKVCache, in_turn
from flashcore.paging.ledger import SequenceHandle
from flashcore.paging.tables import PagedKV
from flashcore.paging.writing import write_tokens


class _Books(PagedKVCache):
    """The first layer's pages, whose books are those of all layers: a page that is copied is copied in each."""

    def __init__(self, **options):
        super().__init__(**options)
        self.others: list[torch.Tensor] = []

    def pools(self) -> list[torch.Tensor]:
        return super().pools() + self.others


class LayeredKVCache:
    """Pages for the keys and values of every layer of a model.

    The layers hold the same tokens, so one ledger gives out pages for all of them: page 7 is page 7 of each layer's
    pools. Each layer counts its own `lengths` on the device, since it writes a token before the next layer does.

    A step is `reserve`, then for each layer `write` and attention over ``cache.layers[i]``, then `advance`. Under CUDA
    graphs, capture the middle part and call `reserve` and `advance` around each replay.

    Parameters
    ----------
    num_layers
        Layers of the model.
    **pages
        What `PagedKVCache` takes, but `key_bounds`; `num_pages` are those of one layer.

    Attributes
    ----------
    layers : list of PagedKV
        What attention reads, one of each layer. Key bounds are not kept, so `TopK` cannot select here.
    lengths : int32 ``[num_layers, batch]``
        Tokens that each layer holds, on the device. To take one step again, as a benchmark does, set them back.

    Raises
    ------
    InvalidProblem
        There is no layer, key bounds are asked for, or as `PagedKVCache`.
    """

    @ambient.judging
    def __init__(self, num_layers: int, **pages):
        num_layers = whole("num_layers", num_layers)
        if num_layers == 0:
            raise InvalidProblem("num_layers is 0; it has to be at least 1.")
        if "key_bounds" in pages:
            raise InvalidProblem("key_bounds is no option of a LayeredKVCache, which keeps none; leave it out.")
        first = _Books(**pages, key_bounds=False)
        # Zeros, as the first layer's own: the rest of a partial page is multiplied by probability 0.
        pools = [(first.k_pool, first.v_pool)]
        pools += [(torch.zeros_like(first.k_pool), torch.zeros_like(first.v_pool)) for _ in range(num_layers - 1)]
        first.others = [pool for pair in pools[1:] for pool in pair]
        self.lengths = torch.zeros(num_layers, first.batch, dtype=torch.int32, device=first.device)
        first.lengths = self.lengths[0]
        self._books = first
        self.layers = [
            PagedKV(k_pool, v_pool, first.page_table, lengths, lengths_fit=True)
            for (k_pool, v_pool), lengths in zip(pools, self.lengths, strict=True)
        ]
        self.batch, self.page_size, self.dtype, self.device = first.batch, first.page_size, first.dtype, first.device

    @property
    def _turn(self) -> AbstractContextManager:
        return self._books._turn  # threads that have their turn have it for all layers

    @property
    def sequences(self) -> list[SequenceHandle]:
        """All sequences alive, by row."""
        return self._books.sequences

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence, from the host's books."""
        return self._books.max_length

    def length(self, sequence: SequenceHandle) -> int:
        """Tokens of one sequence, from the host's books."""
        return self._books.length(sequence)

    def pages(self, sequence: SequenceHandle) -> list[int]:
        """Pool page of each logical page of one sequence, the same in every layer."""
        return self._books.pages(sequence)

    @property
    def bytes(self) -> int:
        """Bytes of all pools."""
        return sum(2 * layer.k_pool.numel() * layer.k_pool.element_size() for layer in self.layers)

    def add(self) -> SequenceHandle:
        """As `PagedKVCache.add`."""
        return self._books.add()

    @in_turn
    def fork(self, sequence: SequenceHandle, tokens: int | None = None) -> SequenceHandle:
        """As `PagedKVCache.fork`, in every layer."""
        child = self._books.fork(sequence, tokens)
        self.lengths[:, child.row].fill_(self._books.length(child))
        return child

    @in_turn
    def free(self, sequence: SequenceHandle) -> int:
        """As `PagedKVCache.free`, in every layer; counts the pages of one."""
        freed = self._books.free(sequence)
        self.lengths[:, sequence.row].zero_()
        return freed

    @in_turn
    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        """As `PagedKVCache.truncate`, in every layer."""
        self._books.truncate(sequence, length)
        self.lengths[:, sequence.row].fill_(length)

    def reserve(self, tokens: int | Sequence[int], sequences: Sequence[SequenceHandle] | None = None) -> None:
        """As `PagedKVCache.reserve`: pages for the next tokens, in every layer."""
        self._books.reserve(tokens, sequences)

    def write(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        rows: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ) -> None:
        """As `PagedKVCache.write`, into one layer's pages, and on to its lengths. Can be captured and compiled."""
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)) or not 0 <= layer < len(self.layers):
            raise InvalidProblem(f"layer is {layer!r}; it has to be a whole number from 0 to {len(self.layers) - 1}.")
        pages = self.layers[layer]
        num_rows = rows_given(rows, self.batch)
        check_new(k, v, pages, num_rows)
        check_rows(rows, counts, num_rows, self.device)
        write_tokens(k, v, pages.k_pool, pages.v_pool, pages.page_table, pages.lengths, rows=rows, counts=counts)

    def advance(self, tokens: int | Sequence[int], sequences: Sequence[SequenceHandle] | None = None) -> None:
        """As `PagedKVCache.advance`, after every layer wrote the tokens."""
        self._books.advance(tokens, sequences)

    @in_turn
    def check(self) -> None:
        """As `PagedKVCache.check`; and every layer has the same lengths. Waits for the device."""
        self._books.check()
        if not bool((self.lengths == self.lengths[0]).all()):
            raise PageTableError(
                f"The layers hold {self.lengths.tolist()} tokens; each step has to write() to every layer once."
            )
