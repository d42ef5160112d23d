"""Nothing that torch has set around a call reaches what computes or what judges, and all of it is there afterwards."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flashcore import backends
from flashcore.backends.cpu import CpuBackend
from flashcore.bisection import bisect
from flashcore.measure import determinism, timing
from flashcore.measure.check import check_attention, make_case
from flashcore.numerics import ambient, reference
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.tolerance import compare
from flashcore.ops import attention
from flashcore.paged_ops import paged_attention
from flashcore.paging import (
    AllPages,
    PagedKV,
    PagedKVCache,
    PageSelection,
    SinkWindow,
    TopK,
    append_tokens,
    bounds_of_pool,
    gather,
    make_attention,
    page_scores,
    paged_reference,
    paginate,
    recalled,
)
from flashcore.paging.stability import check_selection
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=33, seqlen_k=70, head_dim=16, dtype="float32",
                  causal=True, page_size=32)  # fmt: skip
HALF = PROBLEM.with_(dtype="float16", head_dim=64)
ON_GPU = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=64, seqlen_k=192, head_dim=64)


@contextlib.contextmanager
def set_to(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def deterministic():
    """As ``torch.use_deterministic_algorithms(True, warn_only=True)``, which loads torch's compiler to tell it too."""
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def coarse_products():
    return set_to(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium")


def everything_on(device: str) -> dict:
    """Contexts by name, each of which changes what torch computes."""
    return {
        "autocast": lambda: torch.autocast(device, dtype=torch.bfloat16),
        "float64": lambda: set_to(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
        "bfloat16": lambda: set_to(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
        "another device": lambda: torch.device("meta"),
        "another default device": lambda: default_device("meta"),
        "deterministic": deterministic,
        "coarse products": coarse_products,
        "inference": torch.inference_mode,
        "no grad": torch.no_grad,
        "grad": torch.enable_grad,
    }


AMBIENT = everything_on("cpu")
SETTINGS = [name for name in AMBIENT if name not in ("inference", "no grad", "grad")]


def state() -> tuple:
    """All that a call might leave behind."""
    return (
        torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), torch.get_default_dtype(),
        torch.get_default_device(), torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(), torch.get_float32_matmul_precision(),
        torch.is_inference_mode_enabled(), torch.is_grad_enabled(),
    )  # fmt: skip


def plain(found):
    """What a call gave, as something that can be compared."""
    if isinstance(found, torch.Tensor):
        return (found.dtype, found.device.type, found.shape, found.clone())
    if isinstance(found, PageSelection):
        return plain((found.pages, found.counts))
    if isinstance(found, PagedKV):
        return plain((found.k_pool, found.v_pool, found.page_table, found.lengths, found.key_bounds))
    if isinstance(found, reference.Trace):
        return plain([getattr(found, stage) for stage in reference.STAGES])
    if isinstance(found, (tuple, list)):
        return [plain(one) for one in found]
    return found


def alike(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(nan=7.5), b.nan_to_num(nan=7.5))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    return a == b


QKV, QKV_HALF = make_inputs(PROBLEM), make_inputs(HALF)
CACHE = paginate(*QKV_HALF[1:], 32)
CACHE.refresh_bounds()
QUERY = QKV_HALF[0][:, :, :1]


def appended():
    cache = PagedKVCache(num_pages=8, batch=2, num_heads_kv=2, head_dim=64, page_size=32, device="cpu")
    cache.add()
    cache.add()
    cache.append(QKV_HALF[1], QKV_HALF[2])
    append_tokens(QKV_HALF[1][:, :, :3], QKV_HALF[2][:, :, :3], cache.k_pool, cache.v_pool, cache.page_table,
                  cache.lengths, key_bounds=cache.key_bounds)  # fmt: skip
    return cache


def of_trial(trial):
    data = {k: v for k, v in trial.data.items() if k not in ("seconds",)}
    return trial.status, trial.reason, trial.correctness, data


def case():
    make_case.cache_clear()
    found = make_case(HALF, 0, "normal", "bhsd", "cpu")
    make_case.cache_clear()
    return plain([found.q, found.out, found.lse]), found.out_atol, found.lse_atol


def timed() -> list:
    """What each timed call sees of the settings."""
    seen = []

    def call(i):
        exact = [products.setting() in ambient.EXACT for products in ambient._products()]
        seen.append((exact, torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), torch.get_default_device(),
                     torch.are_deterministic_algorithms_enabled()))  # fmt: skip

    timing.time_on_cpu([timing.Candidate("one", call)], PROBLEM, rounds=2)
    return seen


COMPUTES = {
    **{f"attention {name}": lambda name=name: attention(*QKV, causal=True, backend=name)
       for name in ("auto", "cpu", "reference", "sdpa-math")},
    **{f"lse of {name}": lambda name=name: attention(*QKV_HALF, causal=True, backend=name, return_lse=True)
       for name in ("auto", "cpu", "reference")},
    **{f"run of {name}": lambda name=name: backends.get(name).run(*QKV, PROBLEM)
       for name in ("cpu", "reference", "sdpa-math")},
    **{f"trace of {name}": lambda name=name: backends.get(name).trace(*QKV_HALF, HALF)
       for name in ("cpu", "reference")},
    "paged_attention": lambda: paged_attention(QUERY, CACHE, policy=TopK(share=0.5), return_lse=True),
    "TopK": lambda: TopK(share=0.5).select(QUERY, CACHE),
    "SinkWindow": lambda: SinkWindow(1, 1).select(QUERY, CACHE),
    "AllPages": lambda: AllPages().select(QUERY, CACHE),
    "page_scores": lambda: page_scores(QUERY, CACHE),
    "append": appended,
    "fork": lambda: (lambda cache: (cache.fork(cache.sequences[0], 40), cache)[1])(filled()),
}  # fmt: skip


def filled():
    """A cache with a free row."""
    cache = PagedKVCache(num_pages=9, batch=3, num_heads_kv=2, head_dim=64, page_size=32, device="cpu")
    first = cache.add()
    cache.append(QKV_HALF[1][:1], QKV_HALF[2][:1], [first])
    return cache


JUDGES = {
    **{f"make_inputs {pattern}": lambda pattern=pattern: make_inputs(HALF, pattern=pattern)
       for pattern in ("normal", "uniform", "outlier", "alternating", "rising", "large", "constant")},
    "reference": lambda: reference.attention(*QKV_HALF, HALF),
    "same precision": lambda: reference.attention_same_precision(*QKV_HALF, HALF, round_scores=True),
    "stages_from": lambda: reference.stages_from(backends.get("cpu").trace(*QKV_HALF, HALF), *QKV_HALF, HALF),
    "compare": lambda: compare(QKV[0], QKV[0] + 1e-3, atol=1e-4, rtol=0.0),
    "make_case": case,
    "check": lambda: of_trial(check_attention("cpu", HALF)),
    "determinism": lambda: of_trial(determinism.check_determinism("cpu", HALF, runs=2)),
    "bisect": lambda: of_trial(bisect("cpu", HALF).to_trial()),
    "bisect a bug": lambda: of_trial(bisect(Late(), HALF).to_trial()),
    "paged_reference": lambda: paged_reference(QUERY, CACHE),
    "gather": lambda: gather(CACHE, 1),
    "recalled": lambda: recalled(QUERY, CACHE, SinkWindow(1, 1).select(QUERY, CACHE)),
    "paginate": lambda: paginate(*QKV_HALF[1:], 16),
    "bounds": lambda: bounds_of_pool(CACHE),
    "make_attention": lambda: make_attention(HALF, "peaked"),
    "check_selection": lambda: str(check_selection(TopK(share=0.5), QUERY, CACHE, runs=2)),
}  # fmt: skip


class Late(CpuBackend):
    """A backend with a bug, so that a window is cut out around it."""

    id = "late"

    def row_sum(self, row_sum, rescale, probs):
        return super().row_sum(row_sum, rescale, probs) * 1.01


@pytest.mark.parametrize("what", [*COMPUTES, *JUDGES])
def test_what_is_set_around_a_call_changes_nothing_of_it(what):
    call = (COMPUTES | JUDGES)[what]
    expected = plain(call())
    for name, make in AMBIENT.items():
        with make():
            before = state()
            found = call()
            assert state() == before, f"{what} leaves something behind under {name}"
        assert alike(plain(found), expected), f"{what} gives something else under {name}"


@pytest.mark.parametrize("outer", SETTINGS)
@pytest.mark.parametrize("inner", ["inference", "no grad", "autocast"])
def test_several_settings_at_once(outer, inner):
    expected = plain(JUDGES["check"]())
    with AMBIENT[outer](), AMBIENT[inner]():
        found = JUDGES["check"]()
    assert alike(plain(found), expected)


@pytest.mark.slow
def test_a_wrong_backend_is_wrong_and_a_right_one_right_whatever_is_set():
    for make in AMBIENT.values():
        with make():
            assert check_attention("cpu", HALF).status == "ok"
            assert bisect("cpu", HALF).passed
            assert bisect(Late(), HALF).producers == ["row_sum"]


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_timed_is_not_under_a_setting(name):
    expected = timed()
    with AMBIENT[name]():
        assert timed() == expected


def test_a_cache_made_in_inference_mode_is_written_outside_it():
    with torch.inference_mode():
        cache = PagedKVCache(num_pages=8, batch=2, num_heads_kv=2, head_dim=64, page_size=32, device="cpu")
        foreign = PagedKV.from_tables(*(t.clone() for t in (CACHE.k_pool, CACHE.v_pool, CACHE.page_table,
                                                            CACHE.lengths)), key_bounds=True)  # fmt: skip
        assert not foreign.key_bounds.is_inference()
    sequence = cache.add()
    cache.append(QKV_HALF[1][:1], QKV_HALF[2][:1], [sequence])
    cache.free(sequence)
    assert cache.lengths.tolist() == [0, 0]


def test_tokens_go_into_pools_of_inference_mode_inside_it():
    """Pools of the caller's are written in the mode that he made them in: torch takes no other writes."""
    with torch.inference_mode():
        tables = [t.clone() for t in (CACHE.k_pool, CACHE.v_pool, CACHE.page_table, CACHE.lengths)]
        with torch.autocast("cpu"):
            append_tokens(QKV_HALF[1][:, :, :2], QKV_HALF[2][:, :, :2], *tables)
    assert tables[3].tolist() == [72, 72]


def test_a_plug_in_s_methods_are_shielded_too():
    class Own(CpuBackend):
        id = "own"

        def run(self, q, k, v, problem):
            return torch.matmul(q, q.transpose(-1, -2)), torch.ones(1)

    with torch.autocast("cpu"), AMBIENT["float64"]():
        out, ones = Own().run(*QKV, PROBLEM)
    assert out.dtype == ones.dtype == torch.float32


def test_nothing_is_entered_where_nothing_is_set(monkeypatch):
    def entered(**options):
        raise AssertionError("a call that nothing reaches went through the shield")

    assert not ambient.reaches()
    monkeypatch.setattr(ambient, "shield", entered)
    assert attention(*QKV).shape == QKV[0].shape


def test_an_error_puts_everything_back():
    with contextlib.ExitStack() as stack:
        for name in SETTINGS:
            stack.enter_context(AMBIENT[name]())
        before = state()
        with pytest.raises(KeyError), ambient.shield(modes=True):
            assert not ambient.reaches() or torch.get_default_device() == torch.device("cpu")
            raise KeyError
        assert state() == before


def test_products_that_are_coarse_for_every_device_stay_so_and_no_longer():
    """A setting for all devices that one of them has taken over is not written down as that device's own."""
    settings = torch.backends
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("this torch has one setting for all devices")
    own = settings.cuda.matmul.fp32_precision
    settings.cuda.matmul.fp32_precision = "none"
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        assert settings.cuda.matmul.fp32_precision == "tf32" and ambient.reaches()
        with ambient.shield():
            assert settings.cuda.matmul.fp32_precision == "ieee" and not ambient.reaches()
        assert settings.cuda.matmul.fp32_precision == "tf32"
        settings.fp32_precision = "none"
        assert settings.cuda.matmul.fp32_precision == "none"
    finally:
        settings.fp32_precision = before
        settings.cuda.matmul.fp32_precision = own


def test_another_thread_s_autocast_is_its_own():
    seen = []
    with torch.autocast("cpu"):
        thread = threading.Thread(target=lambda: seen.append(ambient.reaches()))
        thread.start()
        thread.join()
    assert seen == [False]


def overlapping(first, second, inside):
    """Enter `first`, enter `second` in another thread, leave `first`, and say what `inside` gives in `second` then."""
    both, left, seen = threading.Event(), threading.Event(), []

    def other():
        with second():
            both.set()
            left.wait(60)
            seen.append(inside())

    thread = threading.Thread(target=other)
    with first():
        thread.start()
        both.wait(60)
    left.set()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("name", ["float64", "bfloat16", "deterministic", "coarse products"])
def test_a_call_that_begins_inside_another_thread_s_keeps_what_is_set_out_to_its_own_end(name):
    """The first call puts back what was set around it while the second one computes."""
    expected, before = state(), torch.get_default_dtype()
    with AMBIENT[name]():
        around = state()
        seen = overlapping(ambient.shield, ambient.shield, lambda: (ambient.reaches(), torch.get_default_dtype()))
        assert seen == (False, torch.float32)
        assert state() == around
    assert state() == expected and torch.get_default_dtype() is before


def test_a_call_that_does_not_see_what_is_set_since_another_thread_s_hides_it_keeps_it_out_too():
    """It is put back in the middle of that call."""
    entered, left = threading.Event(), threading.Event()

    @ambient.shielded
    def computes():
        entered.set()
        left.wait(60)
        return torch.get_default_dtype()

    with set_to(torch.get_default_dtype, torch.set_default_dtype, torch.float64):
        with ThreadPoolExecutor(1) as pool:
            with ambient.shield():
                seen = pool.submit(computes)
                entered.wait(60)
            left.set()
            assert seen.result() is torch.float32
        assert torch.get_default_dtype() is torch.float64


def test_what_a_function_sets_inside_is_there_again_after_a_call_in_it_whatever_other_threads_do():
    with ambient.shield(), set_to(torch.get_default_dtype, torch.set_default_dtype, torch.float64):
        with ambient.shield():
            assert torch.get_default_dtype() is torch.float32
        assert torch.get_default_dtype() is torch.float64
        overlapping(ambient.shield, ambient.shield, lambda: None)
        assert torch.get_default_dtype() is torch.float64
    assert not ambient.reaches()


def test_a_deterministic_mode_for_a_while_is_gone_after_calls_of_other_threads_that_overlap_it():
    for first, second in ((ambient.deterministic, ambient.deterministic), (ambient.deterministic, None),
                          (None, ambient.deterministic)):  # fmt: skip
        contexts = [ambient.shield if one is None else lambda one=one: one("warn") for one in (first, second)]
        overlapping(*contexts, lambda: None)
        assert torch.get_deterministic_debug_mode() == 0, (first, second)


FORKS = """
import contextlib, os, sys, threading, warnings
warnings.simplefilter("ignore")  # Python says that a child may wait for ever, which is what is asked here
import torch
from flashcore.backends import _registry
from flashcore.numerics import ambient, instruments
from flashcore import records
inside, over = threading.Event(), threading.Event()

def holds():
    locks = ambient.alone, ambient.choosing, records._one_at_a_time, _registry._discovering
    with ambient.shield(), contextlib.ExitStack() as stack, instruments.watched("honest"):
        for lock in locks:
            stack.enter_context(lock)
        inside.set()
        over.wait(60)

torch.set_default_dtype(torch.float64)
thread = threading.Thread(target=holds)
thread.start()
inside.wait(60)
child = os.fork()
if not child:
    locks = (ambient._lock, ambient.alone, ambient.choosing, records._one_at_a_time, _registry._discovering,
             instruments._turn)
    free = all(lock.acquire(timeout=1) for lock in locks) and not ambient._inside and not instruments._watches
    os._exit(0 if free and torch.get_default_dtype() is torch.float64 else 1)
_, status = os.waitpid(child, 0)
over.set()
thread.join()
sys.exit(os.waitstatus_to_exitcode(status) or torch.get_default_dtype() is not torch.float64)
"""


@pytest.mark.slow
def test_a_process_that_is_forked_meanwhile_has_what_is_set_and_waits_for_no_thread_that_it_has_not(tmp_path):
    """As when torch's data loader starts its workers while another thread computes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FORKS], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hopper", "wmma", "scalar", "sdpa-cudnn", "sdpa-flash", "sdpa-math", "cublaslt",
                                  "cublaslt-graph", "reference"])  # fmt: skip
@pytest.mark.parametrize("setting", list(everything_on("cuda")))
def test_nothing_reaches_a_backend_on_the_gpu(name, setting):
    q, k, v = make_inputs(ON_GPU, device="cuda")
    expected = plain(attention(q, k, v, backend=name))
    with everything_on("cuda")[setting]():
        before = state()
        found = attention(q, k, v, backend=name)
        assert state() == before
    assert alike(plain(found), expected)
    assert check_attention(name, ON_GPU).status == "ok"


@pytest.mark.gpu
@pytest.mark.parametrize("setting", list(everything_on("cuda")))
def test_nothing_reaches_float32_products_or_the_judge_on_the_gpu(setting):
    wide = ON_GPU.with_(dtype="float32")
    q, k, v = make_inputs(wide, device="cuda")
    cache = paginate(*make_inputs(ON_GPU, device="cuda")[1:], 32)
    query = make_inputs(ON_GPU, device="cuda")[0][:, :, :1]

    def calls():
        make_case.cache_clear()
        bounds = make_case(ON_GPU, 0, "normal", "bhsd", "cuda")
        return plain([
            attention(q, k, v, backend="sdpa-math"), paged_attention(query, cache, backend="decode", return_lse=True),
            bounds.out_atol, bounds.lse_atol, bisect("hopper", ON_GPU).passed, bisect("decode", DECODED).passed,
        ])  # fmt: skip

    expected = calls()
    with everything_on("cuda")[setting]():
        assert alike(calls(), expected)


DECODED = ON_GPU.with_(seqlen_q=3, page_size=32)
