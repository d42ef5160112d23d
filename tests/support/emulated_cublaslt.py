"""cuBLASLt's products and page_softmax.cu on the CPU, for the host side of the cuBLASLt backends.

The emulation reads and writes memory at the addresses that cuBLASLt and the kernel would get.
"""

from __future__ import annotations

import ctypes
import math
from types import SimpleNamespace

import numpy as np

from flashcore.backends import AVAILABLE
from flashcore.backends import cublaslt as module
from flashcore.backends._cuda import PARAMS
from flashcore.backends._traces import TRACE

NUMPY = {"float16": np.float16, "float32": np.float32}


def memory(address: int, shape, strides, dtype) -> np.ndarray:
    """An array over memory at an address; strides in elements."""
    dtype = np.dtype(dtype)
    count = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(int(address))
    flat = np.frombuffer(raw, dtype)
    return np.lib.stride_tricks.as_strided(flat, shape, [s * dtype.itemsize for s in strides], writeable=True)


def packed(address: int, *shape: int, dtype=np.float32) -> np.ndarray:
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return memory(address, shape, strides, dtype)


class Plan:
    """A product on the CPU, in float32, under its alpha and beta."""

    algorithm = SimpleNamespace(workspace_bytes=0)

    def __init__(self, product, alpha, beta):
        self.product, self.alpha, self.beta = product, alpha, beta

    def run(self, a, b, d, *, stream, workspace, workspace_bytes):
        first, second, out = (
            memory(at, (self.product.batch, m.rows, m.columns), (m.next_matrix, m.row, 1), NUMPY[m.dtype])
            for at, m in zip((a, b, d), self.product.matrices(), strict=True)
        )
        second = second.swapaxes(1, 2) if self.product.transpose_b else second
        with np.errstate(over="ignore"):
            result = self.alpha * (first.astype(np.float32) @ second.astype(np.float32))
            out[...] = result + self.beta * out if self.beta else result


def launch(name, blocks, threads, arguments, *, stream, shared=0):
    """page_softmax.cu, on the CPU."""
    params, page = PARAMS.unpack(arguments[0].tobytes()), module._PAGE.unpack(arguments[1].tobytes())
    _, heads_q, _, rows, _, causal = params[17:23]
    keys_in_all, out_at, lse_at, out_strides = params[21], params[3], params[4], params[14:17]
    scores_at, probs_at, max_at, sum_at, accum_at, stride, first_head, first_row, number, first_key, keys, heads = page
    row_max, row_sum = packed(max_at, heads, rows), packed(sum_at, heads, rows)
    accum = packed(accum_at, heads, rows, 64)
    if name == "page_finish":
        assert blocks == -(-heads * rows // 8)
        total = np.where(row_sum == 0, 1, row_sum)
        with np.errstate(divide="ignore", invalid="ignore"):
            lse = np.where(row_sum == 0, -np.inf, row_max + np.log(row_sum))
        for head in range(heads):
            batch, own = divmod(first_head + head, heads_q)
            at = out_at + 2 * (batch * out_strides[0] + own * out_strides[1])
            memory(at, (rows, 64), (out_strides[2], 1), np.float16)[...] = accum[head] / total[head][:, None]
            packed(lse_at + 4 * (first_head + head) * rows, rows)[...] = lse[head]
        return
    assert blocks == -(-(rows - first_row) // 8) * heads and name.startswith("page_softmax_")
    dtype = np.float16 if "_16_" in name else np.float32
    here = slice(first_row, rows)
    s = packed(scores_at, heads, rows, stride, dtype=dtype)[:, here, :keys].astype(np.float32)
    sees = np.arange(rows)[here] + 1 + keys_in_all - rows if causal else np.full(rows - first_row, keys_in_all)
    s = np.where(np.arange(keys)[None, :] < (sees - first_key)[:, None], s, -np.inf)
    old_max = row_max[:, here].copy() if number else np.full_like(row_max[:, here], -np.inf)
    new_max = np.maximum(old_max, s.max(axis=2))
    safe = np.where(new_max == -np.inf, 0, new_max)
    rescale = np.exp(old_max - safe)
    p = np.exp(s - safe[..., None])
    packed(probs_at, heads, rows, stride, dtype=np.float16)[:, here, :keys] = p
    row_sum[:, here] = rescale * (row_sum[:, here] if number else 0) + p.sum(axis=2)
    row_max[:, here] = new_max
    if number:
        accum[:, here] *= rescale[..., None]
    if len(arguments) > 2:
        *stages, pages, _ = TRACE.unpack(arguments[2].tobytes())
        all_heads = params[17] * heads_q
        mine = slice(first_head, first_head + heads)
        for at, values in ((stages[0], s), (stages[3], p.astype(np.float16))):
            square = packed(at, all_heads, rows, keys_in_all)
            square[mine, here, first_key : first_key + keys] = values
        for at, values in ((stages[1], new_max), (stages[2], rescale), (stages[4], row_sum[:, here])):
            packed(at, all_heads, pages, rows)[mine, number, here] = values


class Emulated:
    """Mixed into a backend: no GPU is asked for anything."""

    device = "cpu"
    heads_at_once = 4
    rounds_scores = True

    def availability(self):
        return AVAILABLE

    def load(self, problem, device, *, trace):
        return SimpleNamespace(tile_m=8, threads=256)

    def plan(self, product, alpha, beta, device, room):
        return Plan(product, alpha, beta)
