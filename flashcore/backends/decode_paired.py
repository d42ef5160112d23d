"""Backend `decode-paired`: decoding by two blocks a multiprocessor."""

from __future__ import annotations

import struct

import torch

from flashcore.backends._registry import register
from flashcore.backends.decode import Decode
from flashcore.gpu.launching import device_name
from flashcore.gpu.rooms import Room
from flashcore.problem import Problem

DECODE = struct.Struct("2Q 2i")
"""`DecodeParams` of kernels/attention_decode_paired.cu."""


@register
class DecodePaired(Decode):
    """`kernels/attention_decode_paired.cu`."""

    id = "decode-paired"
    title = "Our decode kernel by pairs: paged, two blocks a multiprocessor"
    kernel = "attention_decode_paired"
    variant_of = "decode"
    batch_invariant = False
    most_heads = 3072
    blocks_a_multiprocessor = 2
    besides_o = 4
    """Two that nothing uses come after the reference and the sum (`PartRow`)."""

    def pays(self, problem: Problem) -> bool:
        if problem.softcap is not None and problem.head_dim == 128:
            return False  # one warp of a block works out all of its scores, and caps take it longer than the copies
        return torch.cuda.is_available() and "H200" in device_name(torch.cuda.current_device())

    def decode_params(self, room: Room, rows_of_parts: int, problem: Problem, heads_a_tile: int, tiles: int) -> bytes:
        return DECODE.pack(room.address, room.counters, heads_a_tile, tiles)
