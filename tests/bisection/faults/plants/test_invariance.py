"""Bugs that break bits and nothing else: each patch fits and compiles, and is what its title says."""

from __future__ import annotations

import pytest
import torch
from support.hopper_tiles import MULTIPROCESSORS
from support.planted_bugs import instructions_apart

from flashcore import backends
from flashcore.backends._chunks import CHUNK_TILES
from flashcore.bisection.faults.planting import Source
from flashcore.bisection.faults.plants.invariance import BREAKS
from flashcore.gpu import build, launching, options
from flashcore.measure.check import check_attention
from flashcore.problem import Problem

BY_ID = {one.id: one for one in BREAKS}
SOURCES = [(one.id, host) for one in BREAKS for host, plant in one.plants.items() if isinstance(plant, Source)]
SMALL = Problem(
    batch=3, num_heads_q=4, num_heads_kv=2, seqlen_q=30, seqlen_k=150, head_dim=32, causal=True, batch_invariant=True
)


def planted(name: str, host: str):
    return BY_ID[name].plants[host].apply(backends.get(host))


def test_each_is_planted_in_a_backend_that_promises_the_bits_and_still_does():
    assert len(BY_ID) == len(BREAKS) == 3
    for one in BREAKS:
        for host in one.plants:
            honest, broken = backends.get(host), planted(one.id, host)
            assert honest.batch_invariant and broken.batch_invariant and broken is not honest
            assert honest.source is None if host != "cpu" else True
    assert set(BY_ID["votes"].plants) == {"hopper", "decode", "cpu"}


@pytest.mark.parametrize(("name", "host"), SOURCES)
def test_a_patch_changes_one_instruction_of_the_kernel_with_the_mode(name, host):
    kernel, plant = backends.get(host).kernel, BY_ID[name].plants[host]
    assert plant.invariant and not plant.masks
    out, *into = instructions_apart(kernel, plant)
    assert out.startswith("-") and into and all(line.startswith("+") for line in into)


@pytest.mark.compiler
@pytest.mark.parametrize(("name", "host"), SOURCES)
def test_a_kernel_with_a_patch_compiles_to_another_one(name, host):
    kernel, plant = backends.get(host).kernel, BY_ID[name].plants[host]
    variant = {"head_dim": 64, "dtype": "float16", "defines": {options.INVARIANT: 1}}
    honest = build.compile_kernel(kernel, **variant, source=plant.unpatched(kernel))
    broken = build.compile_kernel(kernel, **variant, source=plant.text(kernel))
    assert broken.warnings == [] and broken.path.read_bytes() != honest.path.read_bytes()


@pytest.mark.parametrize("name", [one.id for one in BREAKS if "cpu" in one.plants])
def test_in_the_cpu_backend_each_result_is_right_by_itself_and_its_bits_hang_on_others(name):
    broken = planted(name, "cpu")
    for pattern in ("normal", "rising"):
        trial = check_attention(broken, SMALL, device="cpu", pattern=pattern)
        assert trial.status == "ok", trial.reason
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, heads, rows, 32, generator=generator) for heads, rows in ((4, 30), (2, 150), (2, 150)))
    k *= 6 * torch.rand(3, 2, 150, 1, generator=generator)  # references lie apart
    q, k, v = (tensor.half() for tensor in (q, k, v))
    differ = []
    for one in (broken, backends.get("cpu")):
        together = one.run(q, k, v, SMALL)[0]
        alone = [one.run(q[:1, :, rows], k[:1], v[:1], SMALL.with_(batch=1, seqlen_q=5))[0] for rows in [slice(25, 30)]]
        differ.append(not torch.equal(together[:1, :, 25:], alone[0]))
    assert differ == [True, False]


def test_the_bug_of_the_hopper_kernel_cuts_chunks_in_half_where_there_are_several_sequences():
    """By the line that is put in: the end of the chunk that a page lies in, from the first page of the tile on."""
    text = BY_ID["chunks by batch"].plants["hopper"].text("attention_hopper")
    assert "const int tiles_a_chunk = params.batch > 1 ? CHUNK_TILES / 2 : CHUNK_TILES;" in text
    assert "const int chunk_end = ((first_of_tile + from) / tiles_a_chunk + 1) * tiles_a_chunk - first_of_tile;" in text
    for tiles_a_chunk in (CHUNK_TILES // 2, CHUNK_TILES):
        for first_of_tile in (0, 5, CHUNK_TILES, 77):
            for since in (0, 1, 40):
                chunk_end = ((first_of_tile + since) // tiles_a_chunk + 1) * tiles_a_chunk - first_of_tile
                if tiles_a_chunk == CHUNK_TILES:  # as without the bug
                    assert chunk_end == ((first_of_tile + since) // CHUNK_TILES + 1) * CHUNK_TILES - first_of_tile
                assert since < chunk_end <= since + tiles_a_chunk and (chunk_end + first_of_tile) % tiles_a_chunk == 0


def test_keys_are_split_where_few_tiles_would_leave_the_gpu_idle_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(launching, "multiprocessors", lambda device: MULTIPROCESSORS)
    monkeypatch.setattr("flashcore.backends.hopper.multiprocessors", lambda device: MULTIPROCESSORS)
    broken, honest = planted("split by occupancy", "hopper"), backends.get("hopper")
    few = SMALL.with_(head_dim=64, seqlen_q=100)
    many = few.with_(batch=40)
    assert broken.defines(few, 0) == honest.defines(few.with_(batch_invariant=False), 0)
    assert options.INVARIANT not in dict(broken.defines(few, 0))
    assert broken.entry(few, 0) == "attention_hopper_split" and honest.entry(few, 0) == "attention_hopper"
    assert broken.room_for_sums(few, None, 4096, torch.device("cpu"), 0) is None, (
        "the kernel without the mode takes no room"
    )
    assert broken.defines(many, 0) == honest.defines(many, 0) and dict(broken.defines(many, 0))[options.INVARIANT] == 1
    assert broken.entry(many, 0) == honest.entry(many, 0) == "attention_hopper"
    assert few.batch_invariant and broken.why_not(few) is None, "it promises the bits all the same"
