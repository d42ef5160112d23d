"""`parallel.ranks`: what is cut comes together again, and what does not fit is refused on every rank in a sentence."""

from __future__ import annotations

import pytest
import torch

from flashcore import parallel
from flashcore.errors import InvalidProblem
from flashcore.parallel.plan import chunks, owned

SHAPES = {(2, 3, 17, 4): 2, (6,): 0, (2, 23): 1, (3, 2, 7): 2}
"""Shapes of whole tensors, and the dimension along which three ranks cut them."""


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rank_gets_an_early_chunk_and_a_late_one_and_all_get_the_whole_again(ranks, shape):
    dim = SHAPES[shape]
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for rank, got in enumerate(ranks):
        part, again = got["cut"][shape]
        expected = [whole.narrow(dim, start, stop - start) for start, stop in chunks(shape[dim], 3)]
        assert torch.equal(part, torch.cat([expected[chunk] for chunk in owned(rank, 3)], dim)) and again


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("too short", "The length of the tensor along dim 2 is 5, which gives no 6 chunks, two for each of 3 ranks"),
        ("no such dimension", "dim is 4, and the tensor has 4 dimensions."),
        ("no tensor", "tensor is [1, 2, 3]; it has to be a torch tensor."),
        ("lengths", "The ranks hold 4, 3, 2 rows of the tensor, and 9 rows cut for 3 ranks are 3, 3, 3; cut the whole"),
        ("dtypes", "The ranks hold parts of different shapes or dtypes"),
        ("gradients", "part requires gradients, and gather has none"),
    ],
)
def test_what_cannot_be_cut_or_put_together_is_refused_on_every_rank(ranks, what, said):
    for got in ranks:
        kind, words = got["cut"][what]
        assert kind == "InvalidProblem" and said in words


@pytest.mark.slow
def test_where_one_rank_refuses_the_others_do_not_wait_for_it(ranks):
    words = [got["cut"]["elsewhere"] for got in ranks]
    assert words[1] == (
        "InvalidProblem",
        "part lies on 'meta', and the mesh is one of cpu devices; move it there first.",
    )
    assert all(one == ("InvalidProblem", "Rank 1 refused what it was called with, and says why; so no rank goes on.")
               for one in (words[0], words[2]))  # fmt: skip


@pytest.mark.slow
def test_meshes_that_are_none_of_ours_are_refused(ranks):
    assert "which mesh [0, 1] does not hold" in ranks[2]["not in the mesh"][1]
    assert all(
        "mesh has 2 dimensions; pass the one along which the sequence is cut" in g["two dimensions"][1] for g in ranks
    )
    assert all("There is no process group; start the processes with torchrun" in got["no group"][1] for got in ranks)


def test_what_is_no_mesh_is_refused_without_any_rank():
    with pytest.raises(InvalidProblem, match="mesh is 'cp'; pass a DeviceMesh of one dimension"):
        parallel.shard(torch.zeros(4), "cp", dim=0)
