"""Our attention under torch's own `context_parallel`, which cuts a model's buffers over ranks in the same zigzag."""

from __future__ import annotations

import importlib
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode

from flashcore import ops
from flashcore.errors import Unsupported
from flashcore.numerics import plain, transforms
from flashcore.parallel.attending import attention

_torchs = torch._C._nn.scaled_dot_product_attention
"""torch's function itself: `context_parallel` puts another in its place while it lasts."""
_OPTIONS = "torch.distributed.tensor.experimental._attention"


class in_context_parallel(TorchFunctionMode):  # noqa: N801  (it is used as a function is)
    """Within this context and torch's `context_parallel`, attention over ranks is computed by FlashCore.

    ::

        with context_parallel(mesh, buffers=[tokens, positions], buffer_seq_dims=[1, 0]):
            with flashcore.parallel.in_context_parallel() as calls:
                model(tokens, positions)
        print(calls)  # how many went to FlashCore, how many to torch, and why

    `context_parallel` gives ``scaled_dot_product_attention`` tensors that know how they are cut. This context is one of
    torch's function modes, sees such calls, and hands the parts to `flashcore.parallel.attention`. What that does not
    compute (masks, dropout) goes to torch as it came. Nothing of torch's is replaced.

    Parameters
    ----------
    backend
        As in `flashcore.attention`, of those that return lse.
    plan
        As in `flashcore.parallel.attention`.
    """

    def __init__(self, *, backend: str = "auto", plan: str = "gather"):
        super().__init__()
        self.backend, self.plan = plain.word("backend", backend), plain.word("plan", plan)
        self.ours = 0
        """Calls that FlashCore computed."""
        self.torchs: Counter[str] = Counter()
        """Calls over ranks that went on to torch, by the reason."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not _torchs or not any(map(transforms.is_distributed, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        reason = why_torch(*args, **kwargs, plan=self.plan)
        if reason is not None:
            ops.refuse_others("in_context_parallel", "torch", reason)
            self.torchs[reason] += 1
            return func(*args, **kwargs)
        self.ours += 1
        return self._ours(*args, **kwargs)

    def _ours(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        local = (tensor.to_local() for tensor in (query, key, value))
        # With lse, so that no backend is chosen that calls torch's function: torch would cut its tensors once more.
        out, _ = attention(
            *local, query.device_mesh, causal=is_causal, softmax_scale=scale, return_lse=True, backend=self.backend,
            plan=self.plan, seqlen_q=query.shape[2], seqlen_k=key.shape[2],
        )  # fmt: skip
        return type(query).from_local(out, query.device_mesh, query.placements, run_check=False)

    def __str__(self) -> str:
        total = sum(self.torchs.values())
        lines = [f"FlashCore computed {self.ours} of {self.ours + total} calls over ranks, and torch {total}."]
        return "\n".join([*lines, *(f"  torch {count}: {reason}" for reason, count in self.torchs.most_common())])


def why_torch(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
    plan: str = "gather",
) -> str | None:  # fmt: skip
    """None where `flashcore.parallel.attention` computes this call; otherwise why torch does, as a clause."""
    if not all(map(transforms.is_distributed, (query, key, value))):
        return "the arguments are not three distributed tensors"
    if attn_mask is not None:
        return "there is a mask"
    if dropout_p != 0:
        return "there is dropout"
    if plan != "gather" and transforms.want_gradients(query, key, value):
        return f"gradients are asked for, and plan '{plan}' has none"
    if any(tensor.dim() != 4 for tensor in (query, key, value)):
        return "the tensors are not of four dimensions"
    if any(tensor.device_mesh != query.device_mesh for tensor in (key, value)) or query.device_mesh.ndim != 1:
        return "the tensors are not cut over one mesh of one dimension"
    if any(not tensor.placements[0].is_shard(2) for tensor in (query, key, value)):
        return "the tensors are not cut along the sequence"
    if query.shape[1] != key.shape[1] and not (enable_gqa is True and query.shape[1] % key.shape[1] == 0):
        return "batch or heads would have to be broadcast"
    if is_causal and query.shape[2] != key.shape[2]:
        return "is_causal is aligned top left, and there are other numbers of queries than of keys"
    if is_causal and not in_zigzag():
        return "the sequence is not cut in zigzag, since torch's load balance is off"
    return None


def in_zigzag() -> bool:
    """Whether torch's `context_parallel` gives each rank an early chunk and a late one, as it does by default.

    Raises
    ------
    Unsupported
        This release of torch keeps that where no other did.
    """
    try:
        return bool(importlib.import_module(_OPTIONS)._cp_options.enable_load_balance)
    except (ImportError, AttributeError):
        raise Unsupported(
            "in_context_parallel", f"torch {torch.__version__} does not say how its context_parallel cuts a sequence; "
            "call flashcore.parallel.attention itself"
        ) from None  # fmt: skip
