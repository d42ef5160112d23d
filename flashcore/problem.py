"""Say what one attention problem is, and count its work: FLOPs and bytes."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flashcore.errors import InvalidProblem, UnknownName, did_you_mean

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
SELDOM = (
    "softmax_scale", "page_size", "window_left", "window_right", "softcap", "sink", "lengths", "batch_invariant",
)  # fmt: skip
"""Fields of a problem that most leave as they are; a record leaves them out then."""
FARTHEST = 1 << 30
"""Positions are 32 bits: a window that reaches farther sees as much."""
LARGEST = float.fromhex("0x1.fffffep+127")
"""The largest float32, in which kernels hold scales and caps: a larger one would be infinite there, and results NaN."""


class Problem(BaseModel):
    """One attention forward problem, ``out = softmax(scale * Q K^T + mask) V``.

    Tensors are ``[batch, num_heads, seqlen, head_dim]``. ``causal`` is aligned bottom right: query row i sees key
    columns ``j <= i + seqlen_k - seqlen_q`` (torch's ``is_causal`` aligns top left; the two agree when the lengths do).
    The window is aligned alike: with ``position = i + seqlen_k - seqlen_q`` a query sees keys from
    ``position - window_left`` to ``position + window_right``.

    With `lengths` both count real rows, each sequence by itself: `seqlen_q` and `seqlen_k` of the formulas are then its
    own, and those of the problem are the shape of the padded tensors. Under ``ragged`` they are bounds that the host
    knows, `batch` is the number of sequences, and tensors are ``[1, num_heads, total, head_dim]``. Rows that are not
    real give 0, and -inf in `lse`. The numbers that a mask needs, such as the lengths, come as tensors beside Q, K and
    V (`flashcore.numerics.masking`).
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
    window_left: int = -1
    """Keys before its own position that a query sees; -1 for no limit."""
    window_right: int = -1
    """Keys after its own position that a query sees; -1 for no limit, and always -1 under `causal`, which allows none.
    """
    softcap: float | None = None
    """Above 0: a score s becomes ``softcap * tanh(s / softcap)`` before any mask; None leaves scores as they are."""
    sink: bool = False
    """One more key of each query head, whose value is 0: its score is a float32 number that no scale multiplies."""
    lengths: Literal["", "right", "left", "ragged"] = ""
    """Which rows of a sequence are real: all (the empty word), the first (`right` padding), the last (`left`), or those
    of its own part of tensors in which sequences lie end to end (`ragged`)."""
    batch_invariant: bool = False
    """The bits of a row may depend on its own query, its keys, its mask and these options alone: not on the batch, the
    other rows of the call, or the pages. Backends that promise it say so (`Backend.batch_invariant`); forward only."""

    def __init__(self, **fields):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            told = first["msg"].removeprefix("Value error, ")
            if not first["loc"]:  # a rule about several fields, which names them and their values
                raise InvalidProblem(f"{told}.") from None
            name = ".".join(str(part) for part in first["loc"])
            raise InvalidProblem(f"{name}: {told} (got {first.get('input')!r}).") from None

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, name) for name in type(self).model_fields))

    @functools.cached_property
    def mathematics(self) -> tuple:
        """What says which numbers come out, apart from the scale; ``page_size`` only says how to walk through them.

        `batch_invariant` is part of it: other bits come out then, at another cost.
        """
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

    @field_validator("window_left", "window_right")
    @classmethod
    def _window_is_a_limit(cls, value, info):
        if value < -1:
            raise ValueError(f"{info.field_name} must be at least 0, or -1 for no limit")
        return value

    @field_validator("softcap")
    @classmethod
    def _softcap_is_above_zero(cls, value):
        if value is not None and not 0 < value < math.inf:
            raise ValueError("softcap must be a finite number above 0; leave it out for no cap")
        return value

    @model_validator(mode="after")
    def _causal_ends_the_window(self):
        if self.causal and self.window_right > 0:
            raise ValueError(
                f"window_right ({self.window_right}) lets a query see keys after its own position, and causal does "
                "not; leave one of them out"
            )
        if self.causal and self.window_right == 0:
            self.__dict__["window_right"] = -1  # one way to write it, so that equal problems are equal
        return self

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

    @property
    def window(self) -> tuple[int, int]:
        """`window_left` and `window_right` that are in force, -1 for no limit; under `causal` the right one is 0."""
        return self.window_left, 0 if self.causal else self.window_right

    @functools.cached_property
    def masks(self) -> tuple[str, ...]:
        """What a backend has to take besides `causal`: some of ``window, softcap, sink, lengths, ragged``."""
        in_force = {
            "window": self.window_left >= 0 or self.window_right >= 0,
            "softcap": self.softcap is not None,
            "sink": self.sink,
            "lengths": self.lengths in ("right", "left"),
            "ragged": self.lengths == "ragged",
        }
        return tuple(name for name, is_in_force in in_force.items() if is_in_force)

    def visible_pairs(self) -> int:
        """Pairs of a query and a key that it sees, in one head of one sequence of `seqlen_q` and `seqlen_k` rows.

        With ``p = i + seqlen_k - seqlen_q`` query i sees ``min(p + right + 1, seqlen_k) - max(p - left, 0)`` keys, each
        of the two bounds cut to 0 to `seqlen_k`; the sum over i has a closed form, since both grow by 1 a row.
        """
        left, right = self.window
        first, last = self.seqlen_k - self.seqlen_q, self.seqlen_k - 1
        seen = self.seqlen_q * self.seqlen_k
        if right >= 0:
            seen = _sum_within(first + right + 1, last + right + 1, self.seqlen_k)
        return seen - (_sum_within(first - left, last - left, self.seqlen_k) if left >= 0 else 0)

    def flops(self) -> int:
        """Floating-point operations by the field's convention: ``4·B·H·Sq·Sk·D``, halved when causal.

        Two products of two operations a multiply-add each; the softmax is not counted (Dao et al., FlashAttention-2).
        With a window it is ``4·B·H·D`` times the pairs of a query and a key that it sees (`visible_pairs`). Sequences
        count as whole: how long each really is, a problem does not know (`flops_of` counts those).
        """
        if "window" in self.masks:
            return 4 * self.batch * self.num_heads_q * self.visible_pairs() * self.head_dim
        dense = 4 * self.batch * self.num_heads_q * self.seqlen_q * self.seqlen_k * self.head_dim
        return dense // 2 if self.causal else dense

    def flops_of(self, lengths_q: Iterable[int], lengths_k: Iterable[int]) -> int:
        """`flops` of sequences that really have so many queries and keys, each by the same convention."""
        one = self.with_(batch=1, lengths="")
        pairs = [(rows, keys) for rows, keys in zip(lengths_q, lengths_k, strict=True) if rows and keys]
        return sum(one.with_(seqlen_q=rows, seqlen_k=keys).flops() for rows, keys in pairs)

    def bytes(self) -> int:
        """The fewest bytes of device memory traffic: Q, K and V read once, out written once.

        With a window only the rows of K and V count that some query sees: the windows of two queries in a row touch, so
        these are the keys from that of the first query on its left to that of the last one on its right.
        """
        seen_k = self.seqlen_k
        if "window" in self.masks:
            left = self.window_left
            # The last query stands on the last key, so only the keys before the first query's window are hidden to all.
            seen_k -= max(self.seqlen_k - self.seqlen_q - left, 0) if left >= 0 else 0
        rows = 2 * self.num_heads_q * self.seqlen_q + 2 * self.num_heads_kv * seen_k
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
        if "window" in self.masks:
            parts.append("window={}:{}".format(*self.window))
        if self.softcap is not None:
            parts.append(f"softcap={self.softcap!r}")
        if self.sink:
            parts.append("sink")
        if self.lengths:
            parts.append(f"lengths={self.lengths}")
        if self.batch_invariant:
            parts.append("batch_invariant")
        return ",".join(parts)


def _sum_within(first: int, last: int, most: int) -> int:
    """The sum of the whole numbers from `first` to `last`, each cut to 0 to `most`."""
    low, high = max(first, 1), min(last, most)
    rising = (low + high) * (high - low + 1) // 2 if high >= low else 0
    return rising + most * max(0, last - max(first, most + 1) + 1)


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
    "window": ("window_left", "window_right"),
    "softcap": ("softcap",),
    "lengths": ("lengths",),
}
_FLAGS = ("causal", "sink", "batch_invariant")
_DTYPE_WORDS = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}


PROFILES = ("quick", "full")
"""How much is measured, by a report and by each survey."""


def check_profile(profile: str) -> None:
    """Raise `UnknownName` unless it is one of `PROFILES`."""
    if profile not in PROFILES:
        raise UnknownName("profile", profile, list(PROFILES))


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
            if word in _FLAGS:
                fields[word] = True
            elif word in DTYPE_BYTES:
                fields["dtype"] = word
            else:
                hint = did_you_mean(part, [*_FLAGS, *DTYPE_BYTES, *_DTYPE_WORDS])
                told = f"'{part}' in '{text}' is neither a dtype, nor one of {', '.join(_FLAGS)}, nor a key=value pair."
                raise InvalidProblem(f"{told} {hint}".rstrip())
            continue
        if key not in _SHORT:
            told = f"'{key}' in '{text}' is no key of a problem; use one of {', '.join(_SHORT)}."
            raise InvalidProblem(f"{told} {did_you_mean(key, _SHORT)}".rstrip())
        try:
            values = _values(key, value)
        except ValueError:
            raise InvalidProblem(f"'{value}' in '{part}' is not {_WANTED.get(key, 'a number')}.") from None
        fields.update(zip(_SHORT[key], values, strict=True))
    return Problem(**fields)


_WANTED = {"window": "a window, such as 1024:0 (keys to the left and to the right; -1 for no limit)"}
"""What stands behind a key, where that is not one number."""


def _values(key: str, value: str) -> list[object]:
    """What the fields of a key hold, from its text; `ValueError` for a text that says nothing of the kind."""
    if key == "window":
        left, right = value.split(":")
        return [int(left), int(right)]
    if key == "lengths":
        return [value]
    return [float(value) if key in ("scale", "softcap") else int(value)] * len(_SHORT[key])
