"""What a decoding model keeps: the same tokens in dense tensors, in a ring and in pages."""

from __future__ import annotations

import torch
from support.tiny_models import MIXED, PLAIN

from flashcore.paging import gather
from flashcore.surveys.models.caches import Dense, Pages

KIND = {"dtype": torch.bfloat16, "device": "cpu"}


def test_a_prompt_and_tokens_after_it_are_kept():
    k, v = torch.randn(2, 2, 2, 20, 16).bfloat16()
    dense = Dense(MIXED, 2, 24, **KIND)
    for layer in range(2):
        dense.write(layer, k[:, :, :13], v[:, :, :13], 0)
        for position in range(13, 20):
            one = slice(position, position + 1)
            dense.write(layer, k[:, :, one], v[:, :, one], position)
    assert torch.equal(dense.read(1, 20)[0], k) and torch.equal(dense.read(1, 20)[1], v)
    ring = dense.read(0, 20)[0]
    assert ring.shape[2] == 5 == MIXED.window
    places = torch.arange(15, 20) % 5
    assert torch.equal(ring[:, :, places], k[:, :, 15:]), "the last five, wherever they stand"


def test_a_short_prompt_leaves_room_in_the_ring():
    k, v = torch.randn(2, 2, 2, 3, 16).bfloat16()
    dense = Dense(MIXED, 2, 24, **KIND)
    dense.write(0, k, v, 0)
    assert torch.equal(dense.read(0, 3)[0], k) and torch.equal(dense.read(0, 3)[1], v)


def test_pages_hold_what_the_dense_tensors_hold():
    dense = Dense(MIXED, 2, 40, **KIND)
    dense.fill(37, seed=1)
    pages = Pages(MIXED, 2, 40, page_size=16, **KIND)
    pages.fill(dense, 37)
    assert pages.place == {1: 0} and len(pages.cache.layers) == 1
    for row in range(2):
        k, v, present = gather(pages.cache.layers[0], row)
        assert torch.equal(k, dense.k[1][row, :, :37]) and torch.equal(v, dense.v[1][row, :, :37]) and present.all()
    pages.cache.check()
    assert Pages(PLAIN, 2, 40, page_size=16, **KIND).place == {0: 0, 1: 1}
    assert not torch.equal(dense.k[1], dense.v[1]) and (dense.k[1][:, :, 37:] == 0).all()
