"""Ways: which a backend has, how a sequence is cut into calls, and that each is Python again."""

from __future__ import annotations

import random

import pytest
from support.steady_attention import Steady

from flashcore import backends
from flashcore.errors import UnknownName
from flashcore.surveys.invariance import Setting, Way, ways
from flashcore.surveys.invariance.cases import SIZES
from flashcore.surveys.invariance.ways import KINDS, Piece, pieces_of

EVEN = Setting(lengths=((40, 100),) * 4, patterns=("normal",) * 4)
MIXED = Setting(lengths=((40, 100), (1, 9)), patterns=("normal",) * 2)


def some(backend, setting: Setting, count: int = 40) -> set[Way]:
    one = ways.implementation(backend)
    return {way for n in range(count) for way in ways.draw(random.Random(n), one, setting, SIZES["cuda"])}


def test_a_backend_that_takes_everything_has_every_way():
    found = some(Steady(), EVEN)
    assert {way.kind for way in found} == set(KINDS)
    assert {way.carrier for way in found} == {"alone", "batch", "padded", "ragged", "paged"}
    assert {way.page_size for way in found} == {0, 16, 32, 64, 128, 256} and {way.layout for way in found} >= {"bshd"}
    assert {way.step for way in found} == {0, 1, 2, 4} and any(way.shared for way in found)
    assert {way.others for way in found if way.carrier == "paged" and way.step} == {True, False}
    for way in found:
        assert eval(way.line(), {"Way": Way}) == way


def test_a_way_that_is_not_there_is_not_drawn():
    assert {way.carrier for way in some("sdpa-math", EVEN)} == {"alone", "batch"}
    assert {way.carrier for way in some("sdpa-math", MIXED)} == {"alone"}
    assert "batch" not in {way.carrier for way in some(Steady(), MIXED)}
    decode = some("decode", EVEN)
    assert {way.carrier for way in decode} == {"paged"} and {way.by for way in decode} == {"decode"}
    over_pages = [way for way in some("hopper", EVEN) if way.carrier == "paged"]
    assert {way.by for way in over_pages if way.step} == {"hopper-paged", "decode"}
    assert {way.by for way in over_pages if not way.step} == {"hopper-paged"}, "decode takes no 40 query tokens"


def test_every_draw_begins_with_the_plain_way_and_has_none_twice():
    drawn = ways.draw(random.Random(3), ways.implementation("cpu"), EVEN, SIZES["cpu"])
    assert drawn[0] == Way() and len(drawn) == len(set(drawn)) == SIZES["cpu"].ways


def test_what_promises_is_asked_and_the_rest_is_left_out(monkeypatch):
    one = ways.implementation("hopper")
    assert [b.id for b in one.all] == ["hopper", "hopper-paged", "decode"]
    monkeypatch.setattr(type(backends.get("hopper")), "batch_invariant", False)
    assert one.promising is None
    monkeypatch.setattr(type(backends.get("hopper")), "batch_invariant", True)
    monkeypatch.setattr(type(backends.get("decode")), "batch_invariant", False)
    monkeypatch.setattr(type(backends.get("hopper-paged")), "batch_invariant", True)
    assert [b.id for b in one.promising.all] == ["hopper", "hopper-paged"]
    with pytest.raises(UnknownName, match="Did you mean 'hopper'"):
        ways.implementation("hoper")


@pytest.mark.parametrize(
    ("way", "setting", "pieces"),
    [
        (Way(), MIXED, [(0, 40, 100)]),
        (Way(cuts=(250, 500)), MIXED, [(0, 10, 70), (10, 10, 80), (20, 20, 100)]),
        (Way(step=4), MIXED, [(28, 4, 92), (32, 4, 96), (36, 4, 100)]),
        (Way(step=30), MIXED, [(10, 30, 100)]),
        (Way(cuts=(250,)), Setting(causal=False, lengths=((40, 100),)), [(0, 10, 100), (10, 30, 100)]),
        (Way(cuts=(250,)), Setting(causal=False, window_left=9, lengths=((40, 100),)), []),
        (Way(step=1), Setting(causal=False, window_left=9, lengths=((40, 100),)), [(39, 1, 100)]),
        (Way(cuts=(250,)), Setting(causal=True, window_left=9, lengths=((40, 100),)), [(0, 10, 70), (10, 30, 100)]),
        (Way(cuts=(1,)), MIXED, []),
        (Way(step=50), MIXED, []),
        (Way(cuts=(500, 750)), Setting(lengths=((8, 3),)), [(4, 2, 1), (6, 2, 3)]),
    ],
)
def test_a_sequence_is_cut_so_that_its_rows_see_the_same_keys(way, setting, pieces):
    assert pieces_of(setting, way, 0) == [Piece(*piece) for piece in pieces]


def test_kinds_name_what_a_call_holds():
    assert [Way().kind, Way("ragged").kind, Way("ragged", step=1).kind, Way("paged", step=1).kind] == list(KINDS)
