"""The README's three ways to switch a model over, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import flashcore

README = Path(flashcore.__file__).parent.parent / "README.md"
if not README.is_file():
    pytest.skip("these tests read the checkout, and FlashCore runs from an install here", allow_module_level=True)

SECTION = README.read_text().partition("### In a model\n")[2].partition("To check a kernel")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


def run(block: str, **names) -> dict:
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_there_are_three():
    assert len(BLOCKS) == 3


def test_the_context(capsys):
    class Model(torch.nn.Module):
        def forward(self, tokens):
            q = torch.nn.functional.one_hot(tokens, 16).float().view(2, 5, 2, 8).transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    run(BLOCKS[0], flashcore=flashcore, model=Model(), tokens=torch.randint(0, 16, (2, 5)))
    assert capsys.readouterr().out == (
        "FlashCore computed 0 of 1 calls, and torch 1.\n  torch 1: the tensors lie on no GPU\n"
    )


def test_the_import():
    names = run(BLOCKS[1])
    q = torch.randn(2, 5, 4, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3, is_causal=True)
    got = names["flash_attn_func"](q, q, q, causal=True)
    torch.testing.assert_close(got.transpose(1, 2), expected)
    assert {"flash_attn_varlen_func", "flash_attn_with_kvcache"} <= set(names)


@pytest.mark.slow
def test_the_implementation(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    model = run(BLOCKS[2], path=str(tmp_path))["model"]
    tokens = torch.randint(0, 32, (2, 7))
    torch.testing.assert_close(model(tokens).logits, theirs.eval()(tokens).logits, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "fcore"
