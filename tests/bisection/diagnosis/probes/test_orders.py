"""Rows of Q, and rows of K or V, at other places than their own."""

from __future__ import annotations

import torch

from flashcore.bisection.diagnosis.probes import orders
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=40, seqlen_k=100, head_dim=64)


def test_rows_of_q():
    place = torch.arange(40)
    assert orders.of_rows(place) is None
    assert orders.of_rows(place.roll(1)).sentence == "rows 0 to 39 are computed from the row of Q 1 before them"
    assert orders.of_rows(torch.zeros(40).long()).sentence == "every row has the result of row 0"
    assert "the first from row 39" in orders.of_rows(place.flip(0)).sentence


def test_orders_of_keys():
    place = torch.arange(100)
    swapped = torch.cat([place[16:32], place[:16], place[32:]])
    assert orders.of_order(swapped, PROBLEM, "K").name == "pages swapped"
    stale = torch.cat([place[:16], place[:16], place[32:]])
    assert orders.of_order(stale, PROBLEM, "V").name == "V of another page"
    assert orders.of_order(torch.where(place < 90, place, -1), PROBLEM, "V").name == "V of a page missing"
    assert orders.of_order(place.flip(0), PROBLEM, "K").name == "keys in another order"
