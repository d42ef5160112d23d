"""The namespace of our ops: which there are, what torch is told of each, and when a call counts as traced."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flashcore.ops
import flashcore.paged_ops  # noqa: F401  (both say what computes the ops)
from flashcore.library import _namespace, traced

OPS = (
    "attention", "attention_backward", "paged_attention", "masked_paged_attention", "append_tokens", "select_top_k",
    "select_window",
)  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_torch_knows_shapes_tags_and_implementations_of_each(name):
    op = getattr(torch.ops.flashcore, name).default
    assert torch.Tag.pt2_compliant_tag in op.tags and _namespace.AS_TRACED in op.tags
    for key in (*_namespace.DEVICES, "Meta"):
        assert op.has_kernel_for_dispatch_key(getattr(torch._C.DispatchKey, key)), key
    assert op._schema.is_mutable == (name == "append_tokens")


def test_only_what_is_written_is_said_to_be():
    written = [a.name for a in torch.ops.flashcore.append_tokens.default._schema.arguments if a.alias_info]
    assert written == ["k_pool", "v_pool", "lengths", "key_bounds"]


@pytest.mark.slow
def test_traced():
    assert not traced()
    with FakeTensorMode():
        assert traced()
    assert torch.compile(lambda x: x + int(traced()), backend="eager", fullgraph=True)(torch.zeros(1)) == 1
