"""Count what paging saves and costs in memory: three batches, in the books of real caches."""

from __future__ import annotations

import torch

from flashcore.paging.memory import MEMORY_CASES, KVShape, MemoryCase
from flashcore.surveys.paging.plan import Plan
from flashcore.surveys.paging.trials import Book

WHAT = "memory"
HEADROOM = 2.0
"""Free memory that a real pool has to find, over its own size: prompts are made beside it."""


def measure_memory(book: Book, plan: Plan) -> None:
    """One record a case: bytes of resident pages against dense (or padded) caches of the same tokens, for one layer.

    On a GPU with room for it the pool is real; elsewhere its tensors are on `meta`, and the books are the same.
    """
    shape = KVShape()
    for name, make in MEMORY_CASES.items():
        try:
            case, where = make(shape, "meta"), "meta"
            if plan.gpu and torch.cuda.mem_get_info()[0] > HEADROOM * case.stats.pool_bytes:
                case, where = make(shape, "cuda"), "cuda"
                torch.cuda.empty_cache()
            _write(book, case, shape, where)
        except Exception as error:  # out of memory, most likely
            book.failed(WHAT, error, data={"case": name})


def _write(book: Book, case: MemoryCase, shape: KVShape, where: str) -> None:
    stats = case.stats
    padded = case.name == "mixed_lengths"
    baseline = stats.padded_bytes if padded else stats.dense_bytes
    data = {
        "case": case.name, "saved_percent": 100 * case.saved,
        "definition": f"bytes of resident K and V pages of {shape.page_size} tokens, one layer: {case.words}",
        "resident_bytes": stats.resident_bytes, "baseline_bytes": baseline,
        "baseline": "padded" if padded else "dense", "overhead_bytes": stats.overhead_bytes,
        "pages_used": stats.pages_used, "pages_shared": stats.pages_shared, "fragmentation": stats.fragmentation,
        "sequences": stats.sequences, "tokens": stats.tokens, "pool": where,
        "kv": f"{shape.num_heads_kv} KV heads, head_dim {shape.head_dim}, fp16",
    }  # fmt: skip
    book.write(WHAT, data=data)
    book.say(f"{case.words}: {data['saved_percent']:.1f} % saved")
