"""A candidate: which options a function is given, what counts as an answer, and where functions are found."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flashcore.bisection.diagnosis import calling, conform, diagnose
from flashcore.bisection.diagnosis.calling import Broken, Refusal, candidate_of, limited
from flashcore.errors import BackendUnavailable, InvalidProblem, UnknownName
from flashcore.problem import Problem, square

PROBLEM = Problem(batch=1, num_heads_q=2, num_heads_kv=1, seqlen_q=3, seqlen_k=5, head_dim=8, dtype="float32",
                  causal=True, softmax_scale=0.25)  # fmt: skip


def tensors():
    generator = torch.Generator().manual_seed(1)
    shapes = (1, 2, 3, 8), (1, 1, 5, 8), (1, 1, 5, 8)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def heard(function, **options):
    """What `function` was given besides q, k and v."""
    given = {}

    def listening(*args, **keywords):
        given.update(keywords)
        return torch.zeros_like(args[0]), torch.zeros(args[0].shape[:3])

    listening.__signature__ = __import__("inspect").signature(function)
    candidate_of(listening, device="cpu", **options)(*tensors(), PROBLEM)
    return given


def test_a_function_is_given_the_options_that_its_signature_takes():
    assert heard(lambda q, k, v: 0) == {}
    assert heard(lambda q, k, v, causal: 0) == {"causal": True}
    assert heard(lambda q, k, v, is_causal=False, scale=None: 0) == {"is_causal": True, "scale": 0.25}
    assert heard(lambda q, k, v, *, sm_scale, **rest: 0) == {"causal": True, "sm_scale": 0.25}
    assert heard(lambda q, k, v, return_lse=False: 0) == {}
    assert heard(lambda q, k, v, return_lse=False: 0, lse="natural") == {"return_lse": True}


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda q, k: 0, "takes 2 positional arguments"),
        (lambda q, k, v, bias: 0, r"needs 'bias', which diagnose does not know; wrap it"),
        (7, "int is none"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_in_one_sentence(function, words):
    with pytest.raises(InvalidProblem, match=words):
        candidate_of(function, device="cpu")


def test_a_builtin_function_without_a_signature_gets_q_k_and_v():
    q = torch.randn(1, 1, 3, 8)
    out = candidate_of(torch.nn.functional.scaled_dot_product_attention, device="cpu")(
        q, q, q, PROBLEM.with_(num_heads_q=1, seqlen_k=3, causal=False)
    )
    assert out.out.shape == q.shape and out.lse is None


def test_lse_of_base_2_is_made_natural_and_other_shapes_are_turned():
    q, k, v = tensors()
    rows = torch.full((1, 2, 3), 2.0)
    for given in (rows, rows[..., None], rows.transpose(1, 2)):
        answer = candidate_of(lambda q, k, v, given=given: (q, given), device="cpu", lse="log2")(q, k, v, PROBLEM)
        assert answer.lse.shape == (1, 2, 3) and torch.allclose(answer.lse, torch.tensor(1.3862944).double())
    with pytest.raises(Broken, match="returns no lse"):
        candidate_of(lambda q, k, v: q, device="cpu", lse="natural")(q, k, v, PROBLEM)
    with pytest.raises(Broken, match="lse has shape"):
        candidate_of(lambda q, k, v: (q, rows[..., :2]), device="cpu", lse="natural")(q, k, v, PROBLEM)


def test_what_it_raises_is_a_refusal_on_one_line():
    def raising(q, k, v):
        raise ValueError("first\n  second.")

    with pytest.raises(Refusal, match="^ValueError: first second$"):
        candidate_of(raising, device="cpu")(*tensors(), PROBLEM)


def test_inputs_that_are_changed_are_seen_in_every_layout():
    def changing(q, k, v):
        k[..., 0] += 1
        return q

    for layout in ("bhsd", "bshd"):
        with pytest.raises(Broken, match="changes its input k: 5 of 40 elements"):
            candidate_of(changing, device="cpu", layout=layout)(*tensors(), PROBLEM)


def test_a_time_limit_ends_python_and_leaves_the_timer_as_it_was():
    before = calling.signal.getitimer(calling.signal.ITIMER_REAL)[0]  # pytest's own
    with pytest.raises(Broken, match=r"within 0\.05 s"), limited(0.05):
        time.sleep(60)
    with limited(30):
        pass
    after = calling.signal.getitimer(calling.signal.ITIMER_REAL)[0]
    assert after <= before and (after > 0) == (before > 0)


def test_outside_the_main_thread_there_is_no_limit_and_no_error():
    done = []
    thread = threading.Thread(target=lambda: [done.append(1) for _ in [0] if limited(1).__enter__() is None])
    thread.start()
    thread.join()
    assert done == [1]


def test_functions_are_found_by_file_and_by_module(tmp_path):
    (tmp_path / "beside.py").write_text("SHIFT = 1\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "import beside\nclass Box:\n    @staticmethod\n    def run(q, k, v):\n        return q + beside.SHIFT\n"
    )
    assert calling.load(f"{file}:Box.run")(1, 2, 3) == 2
    assert calling.load("torch.nn.functional:softmax") is torch.nn.functional.softmax
    for place, error, words in (
        (f"{file}:none", UnknownName, "function in .*mine.py 'none'"),
        (f"{tmp_path}/other.py:run", UnknownName, "no file"),
        ("no_such_module:run", UnknownName, "no module"),
        ("mine.py", InvalidProblem, "is not FILE.py:function"),
    ):
        with pytest.raises(error, match=words):
            calling.load(place)
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(InvalidProblem, match="cannot be imported: ModuleNotFoundError"):
        calling.load(f"{file}:run")


def test_an_edited_file_is_read_anew_also_within_the_same_second(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # kept bytecode is what could be stale
    file, beside = tmp_path / "edited.py", tmp_path / "lies_beside.py"
    beside.write_text("SHIFT = 10\n")
    for step in (1, 2, 3):
        file.write_text(f"import lies_beside\ndef run(q):\n    return q + lies_beside.SHIFT + {step}\n")
        os.utime(file, (1000, 1000))  # the same second and the same size: all that Python looks at
        assert calling.load(f"{file}:run")(0) == 10 + step
    beside.write_text("SHIFT = 200\n")
    assert calling.load(f"{file}:run")(0) == 203, "what lies beside it may have been edited too"


def test_threads_that_load_files_get_each_what_lies_beside_its_own(tmp_path):
    """Where Python looks for modules is the process's, and so is what it has imported under a name."""
    places = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "beside_both.py").write_text(f"import time\ntime.sleep(0.05)\nNUMBER = {number}\n")
        (folder / f"mine{number}.py").write_text("import beside_both\ndef run():\n    return beside_both.NUMBER\n")
        places.append(f"{folder / f'mine{number}.py'}:run")
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            assert [run() for run in pool.map(calling.load, places)] == [0, 1]


def test_backends_are_candidates_and_say_what_they_lack():
    assert candidate_of("cpu").lse == "natural" and candidate_of("sdpa-math", device="cpu").lse == "none"
    with pytest.raises(InvalidProblem, match="leave layout out"):
        candidate_of("cpu", layout="bshd")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable):
            candidate_of("hopper")
        with pytest.raises(InvalidProblem, match="torch finds no GPU"):
            candidate_of(lambda q, k, v: q, device="cuda")


def test_a_problem_with_masks_is_no_question_about_a_function():
    calling.refuse_masks(square(1, 1, 8, 16, causal=True))
    with pytest.raises(InvalidProblem, match=r"has masks \(window, sink\), and a function is asked about causal"):
        calling.refuse_masks(square(1, 1, 8, 16, window_left=3, sink=True))
    for ask in (diagnose, conform):
        with pytest.raises(InvalidProblem, match="bisect a backend"):
            ask("cpu", "B=1,H=1,S=8,D=16,softcap=3.0")
