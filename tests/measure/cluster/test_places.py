"""What a worker says of itself, and which workers may share a report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashcore import __version__
from flashcore.errors import ClusterError
from flashcore.measure.cluster.places import Place, identify, place_of, refuse_foreign, refuse_mixed, sources

H200 = Place("box", "GPU-1a2b3c4d-0000", "NVIDIA H200", "1.0", "aa", {"torch": "2.13.0"}, 141 << 30, "0", name="0")
OTHER = replace(H200, card="GPU-5e6f7a8b-0000", name="1")


def test_this_process_says_what_it_is():
    mine = place_of(identify(), "me")
    assert mine.version == __version__ and mine.sources == sources() and len(mine.sources) == 16
    assert mine.node and mine.software["torch"] and "pid" not in mine.as_dict()


def test_a_place_that_another_version_tells_otherwise_is_still_a_place():
    place = place_of({"node": "far", "future": 1}, "7")
    assert (place.node, place.version, place.key) == ("far", "?", "cpu-7")
    with pytest.raises(ClusterError, match=f"CPU worker 7 on far has FlashCore \\? and this process {__version__}"):
        refuse_foreign(place, place_of(identify(), "me"))


def test_other_sources_are_refused_by_their_hash():
    refuse_foreign(OTHER, H200)
    with pytest.raises(ClusterError, match="GPU-5e6f7a8b on box has other kernels or modules .*hash bb instead of aa"):
        refuse_foreign(replace(OTHER, sources="bb"), H200)


def test_cards_of_one_kind_may_share_a_report():
    refuse_mixed([H200, OTHER, replace(OTHER, node="box2", card="GPU-9")], H200)


def test_a_report_starts_on_a_node_that_has_such_a_card():
    login = replace(H200, gpu=None, card=None, memory_bytes=None)
    with pytest.raises(
        ClusterError, match="has NVIDIA H200 with 141 GiB and this process no GPU; .* start it on a node"
    ):
        refuse_mixed([OTHER], login)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": "NVIDIA H100"}, "has NVIDIA H100 with 141 GiB and this process NVIDIA H200 with 141 GiB; a report"),
        ({"memory_bytes": 80 << 30}, "has NVIDIA H200 with 80 GiB and"),
        ({"gpu": None, "card": None}, "has no GPU and this process"),
        (
            {"software": {"torch": "2.9.0"}},
            "has torch 2.9.0 and this process 2.13.0; a report states its software once",
        ),
        ({"card": H200.card}, "Two workers are on the card GPU-1a2b3c4d-0000"),
    ],
)
def test_what_cannot_share_a_report_is_refused_in_one_sentence(change, words):
    with pytest.raises(ClusterError, match=words) as caught:
        refuse_mixed([H200, replace(OTHER, **change)], H200)
    assert str(caught.value).count(". ") == 0
