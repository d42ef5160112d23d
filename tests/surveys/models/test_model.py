"""The decoder: its parts as their papers have them, in float64; causal; the same for the same seed."""

from __future__ import annotations

import torch
from support.tiny_models import MIXED, made

from flashcore.surveys.models.attending import EXACT, Attention
from flashcore.surveys.models.model import RMSNorm, SwiGLU, rotary, rotated


def test_norm_and_mlp_are_what_their_papers_say():
    x = torch.randn(3, 8, dtype=torch.float64)
    norm = RMSNorm(8).double()
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight)
    mlp = SwiGLU(8, 5).double()
    gate, up = mlp.gate_up.weight[:5], mlp.gate_up.weight[5:]
    torch.testing.assert_close(mlp(x), (x @ gate.T * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.T)


def test_scores_of_rotated_vectors_depend_on_the_distance_alone():
    cos, sin = rotary(40, 16)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 1, 40, 2, 16)
    scores = torch.einsum("bihd,bjhd->bhij", rotated(q, cos, sin), rotated(k, cos, sin))[0, 0]
    torch.testing.assert_close(scores[7, 3], scores[31, 27], rtol=1e-4, atol=1e-4)
    assert float(scores[7].max() - scores[7].min()) > 0.1
    assert torch.equal(rotated(q, cos, sin)[:, 0], q[:, 0]), "position 0 is not turned"
    torch.testing.assert_close(rotated(q, cos, sin).norm(dim=-1), q.norm(dim=-1))


@torch.no_grad()
def test_a_model_is_causal_and_made_by_its_seed(shape, tokens):
    model, again = made(shape, torch.float32), made(shape, torch.float32)
    attention = Attention(EXACT, shape, model.sinks)
    logits = model(tokens, 0, attention)
    assert logits.shape == (2, 13, 97) and torch.equal(logits, again(tokens, 0, attention))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    other = model(changed, 0, attention)
    assert torch.equal(logits[:, :9], other[:, :9]) and not torch.isclose(logits[:, 9:], other[:, 9:]).all(-1).any()
    assert (model.sinks is None) == (not shape.sink)


@torch.no_grad()
def test_a_window_and_a_sink_change_what_a_model_says(tokens):
    model = made(MIXED, torch.float32)
    logits = model(tokens, 0, Attention(EXACT, MIXED, model.sinks))
    without = model(tokens, 0, Attention(EXACT, MIXED, None))
    assert not torch.isclose(logits, without, rtol=1e-3, atol=1e-4).all(-1).any()
