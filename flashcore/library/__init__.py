"""What torch knows of FlashCore: ops under ``torch.ops.flashcore``, with shapes, derivatives and batching rules.

`dense`, `masked` and `paged` define the ops, and `gradients` is the backward pass of attention. An op defined here
computes nothing yet: `ops`, `varlen_ops`, `paged_ops` and `paging`, which lie above, say what does by `implement`. So
torch can trace a call, compile it or map it without a look at a kernel, and nothing here knows a backend.
"""

from flashcore.library._namespace import traced

__all__ = ["dense", "gradients", "masked", "paged", "traced"]
