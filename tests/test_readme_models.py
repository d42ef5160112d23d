"""The README's three ways to switch a model over, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.exact_attention import near, one_sequence

import flashcore

README = Path(flashcore.__file__).parent.parent / "README.md"
if not README.is_file():
    pytest.skip("these tests read the checkout, and FlashCore runs from an install here", allow_module_level=True)

SECTION = README.read_text().partition("### In a model\n")[2].partition("A sequence that is cut")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


def run(block: str, **names) -> dict:
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_there_are_three():
    assert len(BLOCKS) == 3


def test_the_context(capsys):
    class Model(torch.nn.Module):
        def forward(self, tokens, mask=None):
            q = torch.nn.functional.one_hot(tokens, 16).float().view(2, 5, 2, 8).transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, mask, is_causal=mask is None)

    mask = torch.rand(5, 5) < 0.5
    run(BLOCKS[0], flashcore=flashcore, model=Model(), tokens=torch.randint(0, 16, (2, 5)), mask=mask)
    assert capsys.readouterr().out == (
        "FlashCore computed 0 of 2 calls, and torch 2.\n"
        "  torch 1: the tensors lie on no GPU\n"
        "  torch 1: there is a mask\n"
    )


def test_the_import():
    q, k, v = torch.randn(3, 2, 200, 4, 16)
    names = run(BLOCKS[1], q=q, k=k, v=v)
    for nth in range(2):
        sequence = (tensor[nth].transpose(0, 1) for tensor in (q, k, v))
        expected, _ = one_sequence(*sequence, causal=True, window_left=127, softcap=30.0)
        near(names["out"][nth].transpose(0, 1), expected, torch.float32)
    assert {"flash_attn_varlen_func", "flash_attn_with_kvcache"} <= set(names)


@pytest.mark.slow
def test_the_implementation(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.MistralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=3, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.MistralForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    tokens, real = torch.randint(1, 32, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    real[1, :3] = 0
    names = run(BLOCKS[2], path=str(tmp_path), tokens=tokens, real=real)
    expected = theirs.eval()(tokens, attention_mask=real).logits
    torch.testing.assert_close(names["logits"][real.bool()], expected[real.bool()], rtol=1e-4, atol=1e-5)
    assert names["model"].config._attn_implementation == "fcore"
