"""Elements of a tensor that are taken for others: at other places, turned, wrapped round, or in fewer bits."""

from __future__ import annotations

import torch

from flashcore.problem import Problem

Scrambled = tuple[str, str]
"""One of ``q``, ``k``, ``v`` or ``out``, and how its elements are taken for others (`scrambled`)."""
WRAPS = (65536, 32768, 16384)
"""Elements after which an offset begins anew: 16 bits, 16 bits with a sign or of bytes, 16 bits of bytes of float32."""
FEWER_BITS = (
    "float8_e4m3fn", "float8_e5m2", "bfloat16", "tfloat32", "tfloat32 cut off", "int8 a row", "int8 a head", "int8",
)  # fmt: skip
"""What the elements of a tensor may be rounded to; whole numbers of 8 bits by one scale a row, a head or in all."""


def scrambled(t: torch.Tensor, how: str, problem: Problem) -> torch.Tensor:
    """A tensor ``[B, H, S, D]`` whose elements were taken for others, as `how` says.

    ``wrapped at N`` and ``written round N`` count the elements of the whole tensor, ``wrapped in a head at N`` those of
    each head; ``in X`` is one of `FEWER_BITS`. The others are named by what is confused.
    """
    batch, heads, rows, width = t.shape
    t = t.contiguous()
    kind, _, number = how.rpartition(" at ")
    match kind:
        case "wrapped":
            return t.flatten()[torch.arange(t.numel(), device=t.device) % int(number)].view(t.shape)
        case "wrapped in a head":
            flat = t.flatten(2)
            return flat[..., torch.arange(flat.shape[-1], device=t.device) % int(number)].view(t.shape)
        case "written round":
            return _written_round(t, int(number))
    if how.startswith("in "):
        return in_fewer_bits(t, how.removeprefix("in "))
    match how:
        case "tile transposed":
            t = t.clone()
            for first in range(0, rows - width + 1, width):
                t[:, :, first : first + width] = t[:, :, first : first + width].mT.clone()
            return t
        case "reshaped":
            return t.view(batch, heads, width, rows).mT.contiguous()
        case "heads and rows confused":
            return t.view(batch, rows, heads, width).transpose(1, 2).contiguous()
        case "group packed" | "group unpacked":
            group = problem.num_heads_q // problem.num_heads_kv
            apart = (group, rows) if how == "group packed" else (rows, group)
            return t.view(batch, -1, *apart, width).transpose(2, 3).reshape(t.shape)
        case "rows and heads confused":
            return t.transpose(1, 2).contiguous().view(t.shape)
        case "normed" | "normed with 1e-06" | "normed with 1e-05":
            more = float(how.rpartition(" ")[2]) if " " in how else 1e-24
            return t.double() / (t.double().square().mean(dim=-1, keepdim=True) + more).sqrt()
        case "rotated in pairs":
            order = torch.arange(width, device=t.device).view(-1, 2).mT.flatten()  # a half of each pair first
            return _rotated(t[..., order])
        case "rotated":
            return _rotated(t)
    raise ValueError(f"no such way to take elements for others: {how}")


def _rotated(t: torch.Tensor) -> torch.Tensor:
    """A rotary embedding of base 10,000 over two halves of the head, from position 0."""
    half = t.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half, device=t.device, dtype=torch.float64) / half)
    angle = torch.arange(t.shape[2], device=t.device, dtype=torch.float64)[:, None] * speed
    a, b = t[..., :half].double(), t[..., half : 2 * half].double()
    turned = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
    return torch.cat([*turned, t[..., 2 * half :].double()], dim=-1)


def _written_round(t: torch.Tensor, count: int) -> torch.Tensor:
    """Every element is written to its place modulo `count`, the last one stays, and 0 is where nothing is written."""
    out, flat = torch.zeros_like(t).flatten(), t.flatten()
    for first in range(0, flat.numel(), count):
        part = flat[first : first + count]
        out[: part.numel()] = part
    return out.view(t.shape)


def in_fewer_bits(t: torch.Tensor, what: str) -> torch.Tensor:
    """float64 of the same shape: the elements of ``[..., S, D]`` rounded to one of `FEWER_BITS`."""
    if what.startswith("tfloat32"):  # 13 bits of float32's 23 are left out: rounded to the nearest, or cut off
        bits = t.float().contiguous().view(torch.int32)
        bits = bits if what.endswith("cut off") else bits + 0x1000
        return (bits & ~0x1FFF).view(torch.float32).double()
    if not what.startswith("int8"):
        return t.to(getattr(torch, what)).double()
    over = {"int8 a row": (-1,), "int8 a head": (-2, -1), "int8": tuple(range(t.dim()))}[what]
    step = t.double().abs().amax(dim=over, keepdim=True).clamp_min(1e-30) / 127
    return (t.double() / step).round() * step


def as_contiguous(t: torch.Tensor) -> torch.Tensor:
    """What lies in the first elements of the tensor's memory, taken as a contiguous tensor of its shape."""
    return torch.as_strided(t, t.shape, torch.empty(t.shape, device="meta").stride(), t.storage_offset())
