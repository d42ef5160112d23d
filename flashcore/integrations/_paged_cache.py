"""A cache of transformers over pages, with one ledger for all layers; `caching.paged_cache` makes it."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from flashcore.errors import InvalidProblem, PagingError, SequenceTooLong
from flashcore.integrations.pages import InPages
from flashcore.library import traced
from flashcore.numerics import plain
from flashcore.paging import LayeredKVCache


def _refuse(what: str) -> PagingError:
    return PagingError(f"The paged cache does not {what}; generate with transformers' DynamicCache for that.")


class PagedLayer(CacheLayerMixin):
    """One layer: it writes into its pages and gives what the model's attention then reads."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, books: LayeredKVCache, index: int):
        super().__init__()
        self.books, self.index = books, index
        self.length = 0
        self.batch_size = books.batch
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the pages were there from the beginning."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write the new tokens of every sequence, and return all keys and values.

        A prompt that nothing stands in front of is all there is, and comes back as it came; else `InPages`.
        """
        if traced():
            raise PagingError(
                "The paged cache keeps its books on the host, which torch.compile would not repeat; call the model "
                "without torch.compile, or capture LayeredKVCache.write() in a loop of your own."
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise PagingError("The paged cache keeps no gradients; call the model under torch.no_grad().")
        tokens = key_states.shape[2]
        if key_states.shape[0] != self.batch_size:
            raise InvalidProblem(
                f"The paged cache was made for a batch of {self.batch_size}, and the model was called with "
                f"{key_states.shape[0]} sequences; make it with batch={key_states.shape[0]}, and count "
                "num_return_sequences into it. It takes no beams."
            )
        if self.index == 0:
            if (needed := self.length + tokens) > (room := self.get_max_length()):
                raise SequenceTooLong(0, needed, room, "make the paged cache with a larger max_length")
            self.books.reserve(tokens)
        self.books.write(self.index, key_states, value_states)
        before, self.length = self.length, self.length + tokens
        pages = self.books.layers[self.index]
        if pages is self.books.layers[-1]:
            self.books.advance(tokens)
        if before == 0:
            return key_states, value_states
        return InPages(pages, pages.k_pool, self.length), InPages(pages, pages.v_pool, self.length)

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        """Length and offset of all keys; older releases give the positions of the queries instead of their number."""
        return self.length + (query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.books.layers[0].max_length

    get_max_cache_shape = get_max_length
    """What older releases call it."""

    def offload(self):
        raise _refuse("move to the CPU and back")

    prefetch = offload

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        raise PagingError("One layer alone cannot be cropped, since all share their pages; call crop() of the cache.")

    def reorder_cache(self, beam_idx) -> None:
        raise _refuse("reorder its sequences, as beam search asks for")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise _refuse("repeat its sequences")

    def batch_select_indices(self, indices) -> None:
        raise _refuse("select some of its sequences")


class PagedCache(Cache):
    """What ``model.generate(..., cache=cache)`` takes: `LayeredKVCache` under the interface of a `Cache`."""

    def __init__(self, books: LayeredKVCache):
        self.books = books
        for _ in range(books.batch):
            books.add()
        super().__init__(layers=[PagedLayer(books, index) for index in range(len(books.layers))])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every sequence, in every layer: -3 for three. A positive number is what stays,
        as older releases mean it."""
        number, held = plain.integer("tokens_to_remove", tokens_to_remove), self.get_seq_length()
        self._keep(max(0, held + number) if number <= 0 else min(number, held))

    def reset(self) -> None:
        """Begin anew, with every page free."""
        self._keep(0)

    def _keep(self, tokens: int) -> None:
        for sequence in self.books.sequences:
            self.books.truncate(sequence, tokens)
        for layer in self.layers:
            layer.length = tokens
