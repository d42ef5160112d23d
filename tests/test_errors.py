"""Errors: one base class, and messages a person can act on."""

from __future__ import annotations

import inspect

import pytest

from flashcore import errors
from flashcore.errors import FlashCoreError

EXAMPLES = [
    errors.UnknownName("backend", "wmm", ["cpu", "wmma"]),
    errors.Unsupported("wmma", "head_dim 96 is not among 64, 128"),
    errors.BackendUnavailable("wmma", "there is no GPU", "run on an H200"),
    errors.CompileError("toy", "toy.cu(3): error: expected a ;"),
    errors.ToolMissing("nvdisasm", "pip install nvidia-cuda-nvdisasm"),
    errors.RecordsDamaged("records.jsonl", 3, "Unterminated string", [1, 2]),
    errors.RecordsTooNew("records.jsonl", 1, 9, 1),
    errors.GatesError("gates.toml", 12, "there is no metric 'speed'."),
    errors.ClaimsError("claims.toml", 7, "there is no quantity 'speed'."),
    errors.LaunchError("cuLaunchKernelEx", "CUDA_ERROR_INVALID_VALUE"),
    errors.CublasLtError("cublasLtMatmul", "NOT_SUPPORTED", "2048 x 128 x 64"),
    errors.PoolExhausted("pages", 3, 1, 64, "free a sequence"),
    errors.SequenceGone("Sequence 4"),
    errors.SequenceTooLong(2, 300, 256, "give the cache more pages a sequence"),
    errors.PagesOverlap(2, 17, 3),
    errors.JudgeTampered("wmma", ["torch.isnan"], "busy"),
    errors.InvalidTiming("wmma"),
    errors.NotebookFailed("04_tflops_sweep", "its kernel died"),
]


def test_every_error_has_the_one_base():
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    assert len(classes) > 10
    assert [c for c in classes if not issubclass(c, FlashCoreError)] == []
    undescribed = [c.__name__ for c in classes if not c.__doc__]
    assert undescribed == []


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_the_message_carries_every_field(error):
    message = str(error)
    for name, value in vars(error).items():
        if name == "trials":  # the records themselves ride along; the message counts them
            assert str(len(value)) in message
        else:
            for part in value if isinstance(value, list) else [value]:
                assert str(part) in message, name


def test_kinds_a_caller_would_expect():
    assert issubclass(errors.InvalidProblem, ValueError)
    assert issubclass(errors.UnknownName, LookupError)
    assert issubclass(errors.BackendUnavailable, RuntimeError)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wmm", "Did you mean 'wmma'?"), ("cudnn", "Did you mean 'sdpa-cudnn'?"), ("HOPPER", "Did you mean 'hopper'?"),
        ("sdpa_cudnn", "Did you mean 'sdpa-cudnn'?"), ("decdoe", "Did you mean 'attention_decode'?"), ("cuda", ""),
        ("", ""), ("x", ""),
    ],
)  # fmt: skip
def test_a_name_that_is_nearly_one_is_asked_about(name, said):
    known = ["wmma", "hopper", "sdpa-cudnn", "attention_decode"]
    assert errors.did_you_mean(name, known) == said
    assert str(errors.UnknownName("backend", name, known)).endswith(f"attention_decode. {said}".rstrip())


def test_at_most_two_names_are_meant():
    asked = errors.did_you_mean("attention_", ["attention_a", "attention_b", "attention_c"])
    assert asked.count("attention_") == errors.MOST_MEANT and " or " in asked


def test_an_error_from_a_lookup_prints_as_a_sentence():
    # str() of a KeyError would be its repr, in quotation marks.
    assert str(errors.UnknownName("kernel", "x", [])) == "There is no kernel 'x'; choose one of: (none)."
