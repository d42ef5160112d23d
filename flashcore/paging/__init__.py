"""Keys and values in pages: a cache that shares and reclaims them, policies that choose which to read.

`PagedKVCache` owns its pages, `LayeredKVCache` those of all layers of a model, and `PagedKV` reads pages that somebody
else owns. A policy turns queries and such pages into a `PageSelection`; `paged_reference` is attention over what was
selected, in float64.
"""

from flashcore.paging.accuracy import SelectionAccuracy, recalled, selection_accuracy
from flashcore.paging.arguments import PAGE_SIZES
from flashcore.paging.bounds import bounds_of_pool
from flashcore.paging.cache import PagedKVCache
from flashcore.paging.layered import LayeredKVCache
from flashcore.paging.ledger import DROPPED, SequenceHandle
from flashcore.paging.memory import KVShape, MemoryCase, memory_cases
from flashcore.paging.paginate import among_others, paginate
from flashcore.paging.patterns import ATTENTION_PATTERNS, make_attention
from flashcore.paging.reference import gather, paged_reference
from flashcore.paging.selection import AllPages, PageSelection, Policy
from flashcore.paging.sink_window import SinkWindow
from flashcore.paging.stats import CacheStats
from flashcore.paging.tables import PagedKV
from flashcore.paging.top_k import TopK, page_scores
from flashcore.paging.writing import append_tokens, copy_pages

__all__ = [
    "ATTENTION_PATTERNS", "DROPPED", "PAGE_SIZES", "AllPages", "CacheStats", "KVShape", "LayeredKVCache", "MemoryCase",
    "PageSelection", "PagedKV", "PagedKVCache", "Policy", "SelectionAccuracy", "SequenceHandle", "SinkWindow", "TopK",
    "append_tokens", "among_others", "bounds_of_pool", "copy_pages", "gather", "make_attention", "memory_cases",
    "page_scores", "paged_reference", "paginate", "recalled", "selection_accuracy",
    "bounds", "checks", "ledger", "memory", "reference", "stability",
]  # fmt: skip
