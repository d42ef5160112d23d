"""Say what one attention problem is, and count its work: FLOPs and bytes."""

from __future__ import annotations

import functools
import math
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flashcore.errors import InvalidProblem, UnknownName, did_you_mean

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class Problem(BaseModel):
    """One attention forward problem, ``out = softmax(scale * Q K^T + mask) V``.

    Tensors are ``[batch, num_heads, seqlen, head_dim]``. ``causal`` is aligned bottom right: query row i sees key
    columns ``j <= i + seqlen_k - seqlen_q`` (torch's ``is_causal`` aligns top left; the two agree when the lengths do).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int = Field(gt=0)
    num_heads_q: int = Field(gt=0)
    num_heads_kv: int = Field(gt=0)
    seqlen_q: int = Field(gt=0)
    seqlen_k: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    causal: bool = False
    softmax_scale: float | None = None
    """Multiplies Q K^T; None means ``1 / sqrt(head_dim)``."""
    page_size: int = Field(default=128, gt=0)
    """Keys in a page, for backends that loop over pages of a chosen size."""

    def __init__(self, **fields):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "problem"
            raise InvalidProblem(f"{name}: {first['msg']} (got {first.get('input')!r}).") from None

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, name) for name in type(self).model_fields))

    @functools.cached_property
    def mathematics(self) -> tuple:
        """What says which numbers come out, apart from the scale; ``page_size`` only says how to walk through them."""
        fields = type(self).model_fields
        return tuple(getattr(self, name) for name in fields if name not in ("page_size", "softmax_scale"))

    def __hash__(self) -> int:
        # A problem is part of the key of every cached plan and launch; hashing its fields takes longer than a launch.
        return self._hash

    @field_validator("softmax_scale")
    @classmethod
    def _scale_is_finite(cls, value):
        if value is not None and not math.isfinite(value):
            raise ValueError("softmax_scale must be a finite number; leave it out for 1/sqrt(head_dim)")
        return value

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.num_heads_q % self.num_heads_kv:
            raise ValueError(
                f"num_heads_q ({self.num_heads_q}) must be a multiple of num_heads_kv ({self.num_heads_kv})"
            )
        return self

    @property
    def scale(self) -> float:
        """The softmax scale in force."""
        return 1.0 / math.sqrt(self.head_dim) if self.softmax_scale is None else self.softmax_scale

    def flops(self) -> int:
        """Floating-point operations by the field's convention: ``4·B·H·Sq·Sk·D``, halved when causal.

        Two products of two operations a multiply-add each; the softmax is not counted (Dao et al., FlashAttention-2).
        """
        dense = 4 * self.batch * self.num_heads_q * self.seqlen_q * self.seqlen_k * self.head_dim
        return dense // 2 if self.causal else dense

    def bytes(self) -> int:
        """The fewest bytes of device memory traffic: Q, K and V read once, out written once."""
        rows = 2 * self.num_heads_q * self.seqlen_q + 2 * self.num_heads_kv * self.seqlen_k
        return self.batch * rows * self.head_dim * DTYPE_BYTES[self.dtype]

    def num_pages(self) -> int:
        """Pages of ``page_size`` keys that cover ``seqlen_k``; the last one may be partial."""
        return -(-self.seqlen_k // self.page_size)

    def with_(self, **changes) -> Problem:
        """The same problem with some fields changed, validated again."""
        return Problem(**{**self.model_dump(), **changes})

    def label(self) -> str:
        """A short name that `parse_problem` reads back, as in ``B=16,H=16,S=2048,D=64``."""
        heads = f"H={self.num_heads_q}"
        if self.num_heads_kv != self.num_heads_q:
            heads += f",Hkv={self.num_heads_kv}"
        lengths = f"S={self.seqlen_q}"
        if self.seqlen_k != self.seqlen_q:
            lengths = f"Sq={self.seqlen_q},Sk={self.seqlen_k}"
        parts = [f"B={self.batch}", heads, lengths, f"D={self.head_dim}"]
        if self.dtype != "float16":
            parts.append(self.dtype)
        if self.causal:
            parts.append("causal")
        if self.softmax_scale is not None:
            parts.append(f"scale={self.softmax_scale!r}")
        if self.page_size != 128:
            parts.append(f"page={self.page_size}")
        return ",".join(parts)


def square(batch: int, heads: int, seqlen: int, head_dim: int, **fields) -> Problem:
    """The usual benchmark problem: as many keys as queries, as many K/V heads as query heads."""
    return Problem(
        batch=batch,
        num_heads_q=heads,
        num_heads_kv=heads,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        head_dim=head_dim,
        **fields,
    )


PRESETS: dict[str, Problem] = {
    "report": square(16, 16, 2048, 64),
    "report-causal": square(16, 16, 2048, 64, causal=True),
    "latency": square(1, 8, 512, 64),
    "tiny": square(1, 2, 256, 64),
}
"""Problems with a name: `report` is the original status report's workload, `latency` the shape of its 5 µs goal."""

_SHORT = {
    "B": ("batch",),
    "H": ("num_heads_q", "num_heads_kv"),
    "Hq": ("num_heads_q",),
    "Hkv": ("num_heads_kv",),
    "S": ("seqlen_q", "seqlen_k"),
    "Sq": ("seqlen_q",),
    "Sk": ("seqlen_k",),
    "D": ("head_dim",),
    "page": ("page_size",),
    "scale": ("softmax_scale",),
}
_DTYPE_WORDS = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}


def parse_problem(text: str) -> Problem:
    """Read a preset's name, or a label such as ``B=1,H=8,Hkv=2,Sq=1,Sk=512,D=64,bf16,causal``.

    Raises
    ------
    UnknownName
        A single word that is no preset.
    InvalidProblem
        A key that does not exist, a value that is no number, or a field that is missing.
    """
    text = text.strip()
    if text in PRESETS:
        return PRESETS[text]
    if "=" not in text:
        raise UnknownName("problem", text, [*PRESETS, "a label such as B=1,H=8,S=512,D=64,causal"])
    fields: dict[str, object] = {}
    for part in filter(None, re.split(r"[,\s]+", text)):
        key, equals, value = part.partition("=")
        if not equals:
            word = _DTYPE_WORDS.get(key, key)
            if word == "causal":
                fields["causal"] = True
            elif word in DTYPE_BYTES:
                fields["dtype"] = word
            else:
                hint = did_you_mean(part, ["causal", *DTYPE_BYTES, *_DTYPE_WORDS])
                told = f"'{part}' in '{text}' is neither a dtype, nor 'causal', nor a key=value pair."
                raise InvalidProblem(f"{told} {hint}".rstrip())
            continue
        if key not in _SHORT:
            told = f"'{key}' in '{text}' is no key of a problem; use one of {', '.join(_SHORT)}."
            raise InvalidProblem(f"{told} {did_you_mean(key, _SHORT)}".rstrip())
        try:
            number = float(value) if key == "scale" else int(value)
        except ValueError:
            raise InvalidProblem(f"'{value}' in '{part}' is not a number.") from None
        for name in _SHORT[key]:
            fields[name] = number
    return Problem(**fields)
