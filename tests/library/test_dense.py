"""The op of attention: what torch asks of an op, no break and no second compilation, and a rule for `torch.vmap`."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import pytest
import torch
from support import compiling
from support.sampling import sampled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import flashcore
from flashcore import ops
from flashcore.errors import InvalidProblem, UnknownName, Unsupported
from flashcore.library import dense
from flashcore.numerics import reference
from flashcore.paths import data_dir
from flashcore.problem import Problem

OP = dense.attention


def qkv(
    seqlen_q=9, seqlen_k=13, *, heads=(4, 2), head_dim=8, bshd=False, device="cpu", dtype=torch.float32, grad=False
):
    """Inputs in either order of heads and rows."""

    def one(num_heads, rows):
        shape = (2, rows, num_heads, head_dim) if bshd else (2, num_heads, rows, head_dim)
        tensor = torch.randn(shape, device=device, dtype=dtype)
        return (tensor.transpose(1, 2) if bshd else tensor).requires_grad_(grad)

    return one(heads[0], seqlen_q), one(heads[1], seqlen_k), one(heads[1], seqlen_k)


def block(q, k, v):
    """A piece of a model around the call."""
    return flashcore.attention(q * 2, k, v, causal=True) + 1


@pytest.fixture(autouse=True)
def _compiled_anew():
    compiling.forget()
    yield
    compiling.forget()


@pytest.mark.slow
@pytest.mark.parametrize(("bshd", "with_lse", "grad"), sampled(itertools.product([False, True], repeat=3)))
def test_opcheck(bshd, with_lse, grad):
    """Schema, fake tensors (strides too), autograd's registration, and tracing with symbolic sizes."""
    torch.library.opcheck(OP, (*qkv(bshd=bshd, grad=grad), True, None, with_lse, "auto", bshd))


def test_the_op_is_told_who_has_to_promise_the_bits_of_every_batch():
    given = qkv(grad=True)
    expected = flashcore.attention(*given, causal=True, batch_invariant=True)
    out, lse = OP(*given, True, None, False, "auto", True)
    assert torch.equal(out, expected) and lse.shape == (0,)
    grads = (torch.autograd.grad(one.sum(), given) for one in (out, expected))  # the first computes lse once more
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    with pytest.raises(Unsupported, match="'sdpa-math' .* same in every batch"):
        OP(*given, True, None, False, "sdpa-math", True)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("bshd", [False, True])
def test_a_model_compiles_whole_and_not_again_for_each_length(dynamic, bshd):
    counter = compiling.counter()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=counter)
    for length in (5, 9, 17, 33, 64):
        given = qkv(length, length + 4, bshd=bshd)
        torch.testing.assert_close(compiled(*given), block(*given))
    # Left to itself, the compiler takes the first lengths for constants and the second ones as proof that they vary.
    assert counter.frame_count == (1 if dynamic else 2)


@pytest.mark.slow
def test_compiled_results_gradients_and_strides_are_those_of_the_call():
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for bshd in (False, True):
        for length in (5, 12):
            given = qkv(length, length + 4, bshd=bshd, grad=True)
            out, expected = compiled(*given), block(*given)
            assert out.stride() == expected.stride()
            torch.testing.assert_close(out, expected)
            for grads in zip(*(torch.autograd.grad(t.square().sum(), given) for t in (out, expected)), strict=True):
                torch.testing.assert_close(*grads)


@pytest.mark.slow
def test_a_scale_that_a_layer_keeps_is_compiled_in():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = 8**-0.5 / 2

        def forward(self, q, k, v):
            return flashcore.attention(q, k, v, softmax_scale=self.scale)

    layer, counter = Layer(), compiling.counter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for length in (5, 9):
        given = qkv(length)
        torch.testing.assert_close(compiled(*given), layer(*given))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_options_compile_too_and_bad_input_keeps_its_sentence():
    def call(q, k, v):
        return flashcore.attention(q, k, v, softmax_scale=0.5, return_lse=True, backend="reference")

    given = qkv()
    for got, expected in zip(torch.compile(call, fullgraph=True, backend="eager")(*given), call(*given), strict=True):
        torch.testing.assert_close(got, expected)
    with pytest.raises(Exception, match="q has head_dim 4, and k and v have 8; they have to be the same"):
        torch.compile(block, fullgraph=True, backend="eager")(given[0][..., :4], *given[1:])


@pytest.mark.slow
def test_export_keeps_the_op_and_free_lengths():
    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return block(q, k, v)

    rows, keys = torch.export.Dim("rows", min=2, max=512), torch.export.Dim("keys", min=2, max=512)
    exported = torch.export.export(Block(), qkv(), dynamic_shapes=({2: rows}, {2: keys}, {2: keys}))
    assert [str(n.target) for n in exported.graph.nodes].count("flashcore.attention.default") == 1
    given = qkv(20, 31)
    torch.testing.assert_close(exported.module()(*given), block(*given))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_an_exported_program_runs_in_a_process_that_imports_what_the_readme_says(tmp_path):
    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return flashcore.attention(q, k, v, causal=True), flashcore.attention(q, k, v, window_left=2)

    given = qkv()
    torch.export.save(torch.export.export(Block(), given), tmp_path / "block.pt2")
    torch.save((given, Block()(*given)), tmp_path / "expected.pt")
    readme = (data_dir("kernels").parent / "README.md").read_text()
    modules = re.search(r"imports the modules whose ops are in it\s+first: ([^:]*?)\.\n", readme)[1].replace("`", "")
    code = (
        f"import {modules}\nimport torch\n"
        "given, expected = torch.load('expected.pt')\n"
        "torch.testing.assert_close(torch.export.load('block.pt2').module()(*given), expected)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_fake_tensors_inside_and_outside_their_mode():
    real = qkv(bshd=True)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in real]
        inside = flashcore.attention(*fake, return_lse=True)
    outside = flashcore.attention(*fake, return_lse=True)
    for out, lse in (inside, outside):
        expected, expected_lse = flashcore.attention(*real, return_lse=True)
        assert type(out) is type(fake[0])
        assert (out.shape, out.stride(), out.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert (lse.shape, lse.stride(), lse.dtype) == (expected_lse.shape, expected_lse.stride(), expected_lse.dtype)
    with pytest.raises(InvalidProblem, match=r"^The last dimension of k is not contiguous .* pass k\.contiguous\(\)"):
        flashcore.attention(fake[0], torch.empty_like(fake[1]).mT.contiguous().mT, fake[2])


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("dims", [(0, 0, 0), (1, None, None), (3, 0, 2), (None, 1, 1)], ids=str)
def test_vmap_folds_the_mapped_axis_into_the_batch(dims, with_lse):
    stacks = []
    for tensor, dim in zip(qkv(), dims, strict=True):
        many = torch.stack([tensor, tensor * 0.5, -tensor])
        stacks.append(tensor if dim is None else many.movedim(0, dim))

    def one(q, k, v):
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        return flashcore.attention(q, k, v, causal=True, return_lse=with_lse)

    got = torch.vmap(one, in_dims=dims)(*stacks)
    for nth in range(3):
        each = [t if dim is None else t.select(dim, nth) for t, dim in zip(stacks, dims, strict=True)]
        expected = one(*each)
        for a, b in zip(got, expected, strict=True) if with_lse else [(got, expected)]:
            torch.testing.assert_close(a[nth], b)


def test_vmap_over_gradients_is_refused_and_gradients_flow_through_vmap():
    q, k, v = qkv()
    many = torch.stack([q, q + 1]).requires_grad_()
    torch.vmap(lambda q: flashcore.attention(q, k, v))(many).square().sum().backward()
    alone = many.detach().clone().requires_grad_()
    sum(flashcore.attention(one, k, v).square().sum() for one in alone).backward()
    torch.testing.assert_close(many.grad, alone.grad)

    def summed(q):
        return torch.vmap(lambda one: flashcore.attention(one, k, v))(q).sum()

    with pytest.raises(InvalidProblem, match="^q, k or v is transformed by torch.func"):
        torch.func.grad(summed)(many.detach())


@pytest.mark.slow
def test_torch_counts_its_operations_as_those_of_its_own_attention():
    given = qkv(9, 13, heads=(4, 4), grad=True)
    shapes = [tuple(t.shape) for t in given]
    with FlopCounterMode(display=False) as counter:
        out = flashcore.attention(*given)
        assert counter.get_total_flops() == flop_counter.sdpa_flop_count(*shapes) > 0
        out.sum().backward()
    backward = flop_counter.sdpa_backward_flop_count(shapes[0], *shapes)
    assert counter.get_total_flops() == flop_counter.sdpa_flop_count(*shapes) + backward


def test_the_direct_call_does_not_pay_for_the_op(monkeypatch):
    """Tensors that lie in memory, and want nothing but a forward pass, are computed without torch's dispatcher."""
    seen = []

    class Op:
        def __call__(self, *arguments):
            seen.append(arguments)
            return OP(*arguments)

    monkeypatch.setattr(dense, "attention", Op())
    plain, wanted = qkv(), qkv(grad=True)
    flashcore.attention(*plain)
    with torch.no_grad():
        flashcore.attention(*wanted)
    assert seen == []
    flashcore.attention(*wanted)
    assert len(seen) == 1 and seen[0][5] is True, "gradients need lse"


def test_the_op_says_what_the_call_says():
    q, k, v = qkv()
    out, lse = OP(q, k, v)
    assert lse.shape == (0,) and torch.equal(out, flashcore.attention(q, k, v))
    with pytest.raises(UnknownName, match="no backend 'fastest'"):
        OP(q, k, v, False, None, False, "fastest")
    with pytest.raises(InvalidProblem, match="q has 3 dimensions"):
        OP(q[0], k, v)
    assert ops.DTYPES is dense.DTYPES


@pytest.mark.gpu
@pytest.mark.parametrize("bshd", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_opcheck_and_a_compiled_call_on_the_gpu(bshd, causal, head_dim):
    shape = {"heads": (8, 2), "head_dim": head_dim, "bshd": bshd, "device": "cuda", "dtype": torch.bfloat16}
    torch.library.opcheck(OP, (*qkv(100, 300, **shape), causal, None, True, "auto"))
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for length in (64, 100, 200):
        q, k, v = qkv(length, length + 60, **shape)
        out = compiled(q, k, v)
        problem = Problem(
            batch=2, num_heads_q=8, num_heads_kv=2, seqlen_q=length, seqlen_k=length + 60, head_dim=head_dim,
            dtype="bfloat16", causal=True,
        )  # fmt: skip
        expected = reference.attention(q * 2, k, v, problem)[0] + 1
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
        assert out.stride() == torch.empty_like(q).stride()


@pytest.mark.gpu
def test_a_compiled_call_in_a_cuda_graph():
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        given = qkv(128, 128, heads=(8, 8), head_dim=64, device="cuda", dtype=torch.float16)
        torch.testing.assert_close(compiled(*given).clone(), block(*given), rtol=1e-2, atol=1e-2)
