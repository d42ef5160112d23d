"""What every backend promises: reasons as clauses, errors as one sentence, and copies that leave the original alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashcore import backends
from flashcore.backends import AVAILABLE, Availability, Backend, _contract, with_masks, with_methods
from flashcore.errors import BackendUnavailable, FaultError, Unsupported
from flashcore.gpu import build
from flashcore.numerics.masking import MaskTensors
from flashcore.problem import square

PROBLEM = square(1, 2, 8, 16)


class Twice(Backend):
    """Gives back twice Q, where somebody asks for it."""

    id = "twice"
    title = "twice Q"
    role = "ours"
    device = "cpu"
    head_dims = (16, 32)

    def run(self, q, k, v, problem):
        return q * 2, None


def test_a_backend_without_run_is_none():
    class Empty(Backend):
        id = "empty"

    with pytest.raises(TypeError, match="run"):
        Empty()


def test_what_a_backend_is_unless_it_says_otherwise():
    backend = Twice()
    assert backend.availability() is AVAILABLE and AVAILABLE.ok
    assert backend.dtypes == ("float16", "bfloat16") and backend.swept and backend.dense
    assert not (backend.traceable or backend.paged or backend.rounds_scores or backend.variant_of)
    assert backend.suits(PROBLEM) is PROBLEM
    with pytest.raises(dataclasses.FrozenInstanceError):
        AVAILABLE.ok = False


def test_the_reason_against_a_problem_names_what_it_takes():
    backend = Twice()
    assert backend.why_not(PROBLEM) is None and backend.why_not(PROBLEM.with_(head_dim=32)) is None
    assert backend.why_not(PROBLEM.with_(head_dim=24)) == "head_dim 24 is not among 16, 32"
    assert backend.why_not(PROBLEM.with_(dtype="float32", head_dim=24)) == (
        "dtype float32 is not among float16, bfloat16"
    )
    backend.head_dims = None
    assert backend.why_not(PROBLEM.with_(head_dim=24)) is None, "None stands for any"


def test_a_mask_that_it_does_not_take_is_the_reason():
    backend = Twice()
    masked = PROBLEM.with_(window_left=3, softcap=30.0, sink=True, lengths="left")
    assert backend.masks == () and backend.why_not(PROBLEM.with_(causal=True, window_right=0)) is None
    assert backend.why_not(masked) == (
        "it does not take a window or a softcap or a sink or lengths of padded sequences"
    )
    backend.masks = ("window", "sink", "lengths")
    assert backend.why_not(masked) == "it does not take a softcap"
    assert backend.why_not(PROBLEM.with_(lengths="ragged")) == "it does not take ragged batches"
    assert backend.why_not(masked.with_(softcap=None)) is None


def test_mask_tensors_are_handed_on_by_name_and_only_where_there_are_some():
    given = []

    class Takes(Twice):
        def run(self, q, k, v, problem, masks=None):
            given.append(masks)
            return super().run(q, k, v, problem)

    masks = MaskTensors(sink=torch.zeros(2))
    q = torch.zeros(1, 2, 8, 16)
    assert with_masks(None) == {} and with_masks(masks) == {"masks": masks}
    Takes().run_with_lse(q, q, q, PROBLEM, masks)
    Takes().run_with_lse(q, q, q, PROBLEM)
    assert given == [masks, None]
    assert Twice().run_with_lse(q, q, q, PROBLEM)[1] is None, "a backend without the argument runs as ever"


def test_require_names_the_machine_before_the_problem():
    class Gone(Twice):
        def availability(self):
            return Availability(False, "there is no such thing", "wait for it")

    Twice().require()
    Twice().require(PROBLEM)
    with pytest.raises(Unsupported, match="^Backend 'twice' cannot run this problem: head_dim 24 is not among 16, 32"):
        Twice().require(PROBLEM.with_(head_dim=24))
    for problem in (None, PROBLEM, PROBLEM.with_(head_dim=24)):
        with pytest.raises(BackendUnavailable, match="there is no such thing. To mend it: wait for it") as raised:
            Gone().require(problem)
        assert (raised.value.backend, raised.value.fix) == ("twice", "wait for it")


def test_stages_and_pages_that_a_backend_does_not_have_are_unsupported():
    q = torch.ones(1, 2, 8, 16)
    with pytest.raises(Unsupported, match="it does not expose its stages, so it cannot be bisected"):
        Twice().trace(q, q, q, PROBLEM)
    with pytest.raises(Unsupported, match="it reads no page table"):
        Twice().run_paged(q, None, PROBLEM)
    assert Twice().why_not_paged(PROBLEM) == Twice().why_not_paged(PROBLEM, selected=True) == "it reads no page table"

    class Paged(Twice):
        paged = True

    assert Paged().why_not_paged(PROBLEM) is None
    assert Paged().why_not_paged(PROBLEM.with_(head_dim=8), selected=True) == "head_dim 8 is not among 16, 32"


def test_the_hash_is_that_of_the_kernel_that_is_launched():
    class WithKernel(Twice):
        kernel = "attention_scalar"

    assert Twice().source_hash() is None
    assert WithKernel().source_hash() == build.source_hash("attention_scalar")


# ------------------------------------------------------------------------------------------------ other methods


def test_a_copy_with_other_methods_leaves_the_original_alone():
    original = Twice()
    original.note = "kept"
    changed = with_methods(original, {"run": lambda self, q, k, v, problem: (q * 3, self.note), "title": "thrice Q"})
    q = torch.ones(1, 2, 8, 16)
    out, note = changed.run(q, q, q, PROBLEM)
    assert bool((out == 3).all()) and note == "kept" and changed.title == "thrice Q"
    assert changed.id == "twice" and isinstance(changed, Twice)
    assert bool((original.run(q, q, q, PROBLEM)[0] == 2).all()) and original.title == Twice.title == "twice Q"
    changed.note = "its own"
    assert original.note == "kept"


def test_another_method_may_use_the_one_that_it_stands_for():
    def more(self, problem):
        reason = super(type(self), self).why_not(problem)
        return reason or "it is planted"

    changed = with_methods(Twice(), {"why_not": more})
    assert changed.why_not(PROBLEM) == "it is planted"
    assert changed.why_not(PROBLEM.with_(head_dim=24)) == "head_dim 24 is not among 16, 32"


def test_a_method_that_the_backend_no_longer_has_is_an_error():
    with pytest.raises(FaultError, match="overrides 'scores', which backend 'twice' no longer has"):
        with_methods(Twice(), {"title": "x", "scores": None})


def test_planted_methods_are_kept_from_what_is_set_around_a_call_as_the_backends_own_are():
    changed = with_methods(Twice(), {"run": lambda self, q, k, v, problem: (q @ q.mT, torch.ones(1))})
    q = torch.ones(1, 2, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product, _ = changed.run(q, q, q, PROBLEM)
        assert (q @ q.mT).dtype == torch.bfloat16, "autocast is on out here"
    assert product.dtype == torch.float32


def test_what_a_kernel_has_for_masks_counts_where_a_problem_has_some():
    hopper, plain = backends.get("hopper"), square(1, 2, 128, 64)
    assert hopper.source_hash() == hopper.source_hash(plain) == build.source_hash("attention_hopper")
    for masks in ({"window_left": 3}, {"sink": True}, {"softcap": 5.0}, {"lengths": "ragged"}):
        masked = hopper.source_hash(plain.with_(**masks))
        assert masked == build.source_hash("attention_hopper", options=True) != hopper.source_hash()
        assert masked in build.source_hashes().values(), "a trial of it is fresh"
    assert backends.get("cpu").source_hash(plain.with_(sink=True)) is None


# ------------------------------------------------------------------------------------ bits that are the same anywhere


@pytest.fixture
def keepers(monkeypatch):
    """A registry of three that promise batch-invariant bits: on the CPU, on a GPU, and on a GPU over pages alone."""

    class Keeps(Twice):
        batch_invariant = True

    class OnGpu(Keeps):
        id, device = "on-gpu", "cuda"
        dtypes = ("bfloat16",)

    class OverPages(OnGpu):
        id, dense, paged, paged_masks = "over-pages", False, True, ("sink",)
        masks = ("sink",)

    Keeps.id = "keeps"
    monkeypatch.setattr(_contract, "REGISTERED", {one.id: one() for one in (Keeps, Twice, OnGpu, OverPages)})
    return _contract.REGISTERED


REFUSAL = "it does not promise bits that are the same in every batch (batch_invariant), and {}"


def test_who_does_not_promise_the_bits_of_every_batch_names_who_does_on_its_device(keepers):
    asked = PROBLEM.with_(batch_invariant=True)
    assert not Twice.batch_invariant and Twice().why_not(PROBLEM) is None
    assert Twice().why_not(asked) == REFUSAL.format("'keeps' does")
    assert Twice().why_not(asked.with_(dtype="float32")) == "dtype float32 is not among float16, bfloat16"
    assert keepers["keeps"].why_not(asked) is None and keepers["on-gpu"].why_not(asked.with_(dtype="bfloat16")) is None
    with pytest.raises(Unsupported, match=r"'twice' cannot run this problem: it does not promise .* 'keeps' does\.$"):
        Twice().require(asked)

    class Anywhere(Twice):
        device, masks = "any", ("sink",)

    assert Anywhere().why_not(asked) == REFUSAL.format("'keeps' does"), "the one on a GPU takes bfloat16 alone"
    assert Anywhere().why_not(asked.with_(dtype="bfloat16")) == REFUSAL.format("'keeps' and 'on-gpu' do")
    assert Anywhere().why_not(asked.with_(sink=True)) == REFUSAL.format("no backend does for this problem")


def test_over_pages_those_are_named_that_promise_it_over_pages(keepers):
    class Paged(Twice):
        device, paged, masks, paged_masks = "cuda", True, ("window", "sink"), ("window", "sink")

        def why_not_paged(self, problem, *, selected=False):
            return "it takes no selection" if selected else super().why_not_paged(problem)

    asked = PROBLEM.with_(batch_invariant=True, dtype="bfloat16")
    assert Paged().why_not_paged(PROBLEM) is None and Paged().why_not(asked) == REFUSAL.format("'on-gpu' does")
    assert Paged().why_not_paged(asked) == REFUSAL.format("'over-pages' does")
    assert Paged().why_not_paged(asked.with_(sink=True)) == REFUSAL.format("'over-pages' does")
    assert Paged().why_not_paged(asked.with_(window_left=2)) == REFUSAL.format("no backend does for this problem")
    assert Paged().why_not_paged(asked.with_(head_dim=24)) == "head_dim 24 is not among 16, 32"
    assert keepers["over-pages"].why_not_paged(asked) is None
    assert keepers["over-pages"].why_not_paged(asked.with_(window_left=2)) == "it does not take a window"
    assert Twice().why_not_paged(asked) == "it reads no page table"


def test_no_peer_promises_the_bits_of_every_batch():
    asked = square(1, 2, 64, 64, batch_invariant=True)
    for backend in backends.all_backends():
        assert backend.role == "ours" or not backend.batch_invariant
        promised = backend.batch_invariant or "batch_invariant" in (backend.why_not(asked) or "")
        assert promised or backend.why_not(asked) == backend.why_not(asked.with_(batch_invariant=False)) is not None
