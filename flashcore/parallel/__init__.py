"""Attention over several GPUs: a sequence cut over the ranks of a mesh, and the same numbers as on one card.

`attention` takes the shards of each rank; `shard` cuts a whole tensor into them, and `gather` puts it together again.
`plan` says who holds what, what travels and which calls are made, `computing` makes them, `joining` joins partial
results, and `under_torch` puts all this under torch's own `context_parallel`. The ranks speak through
`torch.distributed`: NCCL, or gloo on CPUs.
"""

from __future__ import annotations

from flashcore.parallel.attending import attention
from flashcore.parallel.ranks import gather, shard
from flashcore.parallel.under_torch import in_context_parallel

__all__ = ["attention", "gather", "in_context_parallel", "shard"]
