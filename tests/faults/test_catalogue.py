"""The catalogue of planted bugs: each fits its source exactly once, compiles, and is found at the stage it names."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support import synthetic_records as synthetic

import flashcore
from flashcore import backends, tables
from flashcore.bisection import stagewise
from flashcore.bisection.bisecting import bisect
from flashcore.decision import compare, verdict
from flashcore.errors import FaultError, UnknownName
from flashcore.faults import catalogue, planting, plants
from flashcore.faults.catalogue import FAULTS
from flashcore.faults.planting import Override, Source
from flashcore.faults.plants import cublaslt, decode, hopper
from flashcore.gpu import build
from flashcore.measure.check import check_attention
from flashcore.problem import square

CPU = [f.id for f in FAULTS if "cpu" in f.plants]
PATCHES = [(f.id, b) for f in FAULTS for b, plant in f.plants.items() if isinstance(plant, Source)]
IN_KERNELS = [(f.id, b) for f in FAULTS for b in f.plants if b in ("scalar", "wmma")]
IN_CUBLASLT = [(f.id, b) for f in FAULTS for b in f.plants if b in ("cublaslt", "cublaslt-batched")]
IN_HOPPER = [(f.id, b) for f in FAULTS for b in f.plants if b in ("hopper", "hopper-unsplit")]
IN_PAGED = [(f.id, b) for f in FAULTS for b in f.plants if b in ("decode", "hopper-paged", "cublaslt-paged")]


def kernel_of(host: str) -> str:
    """The kernel of a backend, or the kernel of that name, where a bug is of no backend."""
    return host if host in build.kernel_names() else backends.get(host).kernel


def test_the_catalogue_has_every_bug_of_the_list_and_leaves_none_out_in_silence():
    ids = [f.id for f in FAULTS]
    assert len(set(ids)) == len(ids)
    assert [i for i in ids if i.startswith("F")] == [f"F{n}" for n in range(1, 17)]
    assert len([i for i in ids if i.startswith("G")]) >= 8
    for fault in FAULTS:
        assert bool(fault.plants) != bool(fault.held_by), f"{fault.id} is neither planted nor explained"
        stages = {"labels": (*flashcore.numerics.reference.STAGES, "survey"), "selection": ("page table",)}
        assert fault.plants == {} or fault.stage in stages.get(fault.found_by, flashcore.numerics.reference.STAGES)
    for backend, planted in plants.PLANTS.items():
        assert sum(fault.why_not(backend) is None for fault in FAULTS) == len(planted)
        assert len(planted) >= 20 or backends.get(backend).paged, f"{backend} runs no other backend's code"
        assert set(planted) <= set(ids), f"planted in {backend} and not in the catalogue"
    for backend, problems in plants.PROBLEMS.items():
        assert set(problems) <= set(plants.PLANTS[backend])


@pytest.mark.parametrize(
    ("name", "backend"), [(f.id, b) for f in FAULTS for b in f.plants if f.found_by != "selection"]
)
def test_a_bug_is_planted_where_the_backend_takes_its_problem(name, backend):
    assert backends.get(backend).why_not(catalogue.get(name).problem_in(backend)) is None


# ------------------------------------------------------------------------------------------------ on the cpu backend


@pytest.mark.parametrize("name", CPU)
def test_a_bug_of_the_cpu_backend_is_found_at_its_stage(name):
    fault = catalogue.get(name)
    assert bisect("cpu", fault.problem, pattern=fault.pattern).passed, "the clean run has to be silent"
    found = bisect(fault.plant("cpu"), fault.problem, pattern=fault.pattern)
    assert found.producers[:1] == [fault.stage], found.finding()
    first = found.first_row[1].first_bad
    assert first["stage"] == fault.stage and {"batch", "head", "row", "got", "expected"} <= set(first)
    assert found.window["stage"] == fault.stage and found.coverage["complete"]


def test_planting_leaves_the_backend_itself_alone():
    for fault in FAULTS:
        for backend in fault.plants if fault.found_by != "selection" else ():
            planted = fault.plant(backend)
            assert planted is not backends.get(backend) and planted.id == backend
    assert bisect("cpu", planting.PLAIN).passed
    assert backends.get("wmma").source is None


# ------------------------------------------------------------------------------------------------ patches of kernels


@pytest.mark.parametrize(("name", "backend"), PATCHES)
def test_a_patch_fits_exactly_once_and_changes_the_code(name, backend):
    kernel = kernel_of(backend)
    text = catalogue.get(name).plants[backend].text(kernel)
    assert build._bare(text) != build._bare(build.kernel_source(kernel))


def patched() -> dict[tuple, list[tuple[str, str]]]:
    """Every patched source, by kernel, macros and text, with the patches that give it: backends may share one."""
    found: dict[tuple, list[tuple[str, str]]] = {}
    for name, host in PATCHES:
        fault, kernel = catalogue.get(name), kernel_of(host)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flashcore.backends.hopper.multiprocessors", lambda device: 132)
            defines = () if host == kernel else backends.get(host).defines(fault.problem_in(host), 0)
        found.setdefault((kernel, defines, fault.plants[host].text(kernel)), []).append((name, host))
    return found


def sampled(variants: dict[tuple, list]) -> list:
    """Every variant as a parameter: a fifth of each kernel and macros by a fixed seed, the rest marked `exhaustive`."""
    groups: dict[tuple, list[tuple]] = {}
    for variant in variants:
        groups.setdefault(variant[:2], []).append(variant)
    chosen = {v for group in groups.values() for v in random.Random(0).sample(group, k=-(-len(group) // 5))}
    return [
        pytest.param(*variant, id="-".join(patches[0]), marks=[] if variant in chosen else pytest.mark.exhaustive)
        for variant, patches in variants.items()
    ]


@pytest.mark.parametrize(("kernel", "defines", "text"), sampled(patched()))
def test_a_patched_kernel_compiles_to_other_code(kernel, defines, text):
    """The traced build holds all the code that the production build does."""
    pytest.importorskip("cuda.core")
    given = {"head_dim": 64, "dtype": "float16", "trace": True, "defines": dict(defines)}
    changed, clean = build.compile_kernel(kernel, source=text, **given), build.compile_kernel(kernel, **given)
    assert changed.path.read_bytes() != clean.path.read_bytes()


def test_the_sample_of_patches_has_some_of_every_kernel():
    parameters = sampled(patched())
    default = {p.values[:2] for p in parameters if not p.marks}
    assert default == {p.values[:2] for p in parameters} and 30 <= sum(not p.marks for p in parameters) < 60


def test_a_patch_that_no_longer_fits_is_an_error():
    for text in ("no such text stands there", "__syncthreads();"):
        with pytest.raises(FaultError, match="stands there (0|2) times instead of once"):
            Source(((text, ""),)).apply(backends.get("scalar"))
    for plant in (Override({"no_such_method": lambda self: None}), Source((), {"no_such_method": None})):
        with pytest.raises(FaultError, match="which backend 'wmma' no longer has"):
            plant.apply(backends.get("wmma"))


def test_names_that_do_not_exist():
    with pytest.raises(UnknownName, match="There is no fault 'F99'"):
        catalogue.get("F99")
    with pytest.raises(UnknownName, match="plant G7 in backend 'cpu'; choose one of: cublaslt, cublaslt-batched, deco"):
        catalogue.get("G7").plant("cpu")


def test_why_a_bug_is_not_planted_is_said():
    assert catalogue.get("F3").why_not("cublaslt") is None
    assert catalogue.get("F4").why_not("cpu") == "makes no sense in cpu"
    assert catalogue.get("F3").why_not("cublaslt-loop") == "planted in cublaslt, whose code this one runs"
    assert catalogue.get("G4").why_not("cublaslt-loop") == "makes no sense in cublaslt-loop"
    assert (
        catalogue.get("F10").why_not("cpu") == "makes no sense in cpu"
        and catalogue.get("F10").why_not("decode") is None
    )
    assert catalogue.get("F3").why_not("hopper-paged") == "planted in hopper, whose code this one runs"
    assert catalogue.get("F13").why_not("cpu") == "no bug of a backend: planted in page_selection"
    assert catalogue.get("F16").why_not("cpu").startswith("no bug of a backend: tests/")


def test_the_problem_that_shows_a_bug_may_be_another_in_a_backend():
    assert catalogue.get("F3").problem_in("cpu") == catalogue.get("F3").problem_in("hopper-paged") == planting.PLAIN
    assert catalogue.get("F3").problem_in("decode") == decode.PLAIN
    assert (
        catalogue.get("G38").problem_in("decode").page_size == catalogue.get("G38").problem_in("hopper-paged").page_size
    )


def test_a_patch_and_a_wrong_method_are_planted_together():
    planted = catalogue.get("F6").plant("cublaslt")
    assert planted.alpha(planting.PLAIN) == 1.0 != backends.get("cublaslt").alpha(planting.PLAIN)
    assert "* params.softmax_scale" in planted.source and backends.get("cublaslt").source is None
    assert planted.page_size(planting.PLAIN) == 60, "small pages, so that a small problem has several and a tail"


# ------------------------------------------------------------------------------------------------ F16: the report


def reads_right() -> bool:
    """Whether good evidence is GO and the same evidence with one wrong result is NO-GO."""
    good = synthetic.gpu_trials(synthetic.FAST)
    wrong = synthetic.correctness("wmma", square(16, 16, 2048, 64), status="failed")
    with_wrong = [wrong if t.kind == "correctness" and t.backend == "wmma" else t for t in good]
    return decided(good).verdict == "GO" and decided(with_wrong).verdict == "NO-GO"


def decided(trials) -> verdict.Decision:
    return verdict.decide(trials, verdict.load_gates(), environment=synthetic.environment(),
                          current_hashes=synthetic.HASHES)  # fmt: skip


def test_f16_a_verdict_the_wrong_way_round_is_seen(monkeypatch):
    assert reads_right()
    right = compare.passed

    def inverted(trial):
        return None if right(trial) is None else not right(trial)

    monkeypatch.setattr(compare, "passed", inverted)
    monkeypatch.setattr("flashcore.decision.judging.compare.passed", inverted)
    assert not reads_right(), "the planted polarity changes nothing, so no test would see it"


def tables_right() -> bool:
    """Whether a stage table says FAIL of the planted stage and nowhere else, and of a clean run nowhere."""
    fault = catalogue.get("G14")
    planted = tables.stage_table(bisect(fault.plant("cpu"), fault.problem).to_trial()).set_index("stage")
    clean = tables.stage_table(bisect("cpu", fault.problem).to_trial())
    said = [stage for stage in planted.index if planted.loc[stage, "from own inputs"].startswith("FAIL")]
    return said == ["lse"] and set(clean["from own inputs"]) == {"PASS"}


def test_f16_a_table_the_wrong_way_round_is_seen(monkeypatch):
    assert tables_right()
    words = tables._verdict
    monkeypatch.setattr(tables, "_verdict", lambda j: words({**j, "passed": not j["passed"]}))
    assert not tables_right()
    monkeypatch.undo()
    monkeypatch.setattr(stagewise.Judgement, "passed", property(lambda self: self.num_bad > 0))
    with pytest.raises(Exception):  # noqa: B017  a judge that calls wrong right has no first bad element to show
        assert tables_right()


def test_f16_no_glyph_says_anything_anywhere():
    package = Path(flashcore.__file__).parent
    files = [*package.rglob("*.py"), *(build.data_dir("notebooks")).glob("*.ipynb")]
    files += [p for p in (build.data_dir("reports") / "template").rglob("*") if p.is_file()]
    glyphs = set("✅❌✓✗✔✘☑☒🟢🔴🟡👍👎⚠")
    assert len(files) > 20
    assert [p.name for p in files if glyphs & set(p.read_text(encoding="utf-8", errors="replace"))] == []


@pytest.mark.compiler
@pytest.mark.skipif(build.disassembler() is None, reason="nvdisasm is not installed")
def test_f16_the_audit_of_the_sass_looks_for_what_is_there(monkeypatch):
    wmma = build.compile_kernel("attention_wmma", head_dim=64, dtype="float16")
    scalar = build.compile_kernel("attention_scalar", head_dim=64, dtype="float16")
    assert wmma.tensor_instructions and not scalar.tensor_instructions
    monkeypatch.setattr(build, "AUDITED", ("WGMMA",))
    assert build.count_sass(wmma.path) == {"WGMMA": 0}, "Tensor Cores in SASS are HMMA and HGMMA, never WGMMA"


# ------------------------------------------------------------------------------------------------ finite and wrong


def no_go_of(trial) -> verdict.Decision:
    """The verdict on evidence that meets every gate, once a wrong result takes the place of that backend's checks."""
    good = synthetic.gpu_trials(synthetic.FAST)
    hashes = {t.backend: t.source_hash for t in good if t.kind == "correctness"}
    trial = trial.model_copy(update={"environment": synthetic.ENV_ID, "source_hash": hashes[trial.backend]})
    trials = [t for t in good if (t.kind, t.backend) != ("correctness", trial.backend)] + [trial]
    return decided(trials)


def assert_finite_and_no_go(backend: str):
    fault = catalogue.get("F8")
    planted = fault.plant(backend)
    found = bisect(planted, fault.problem)
    assert found.output == {"finite": True, "nonzero": True}, "the naive check has to be fooled"
    assert found.producers[0] == "scores" and found.first_row[1].first_bad["stage"] == "scores"
    checked = check_attention(planted, fault.problem)
    assert checked.status == "failed" and checked.correctness.num_nan == checked.correctness.num_inf == 0
    decision = no_go_of(checked)
    assert decision.verdict == "NO-GO", decision.reason
    gate = next(g for g in decision.gates if g.id == f"{backend}-correct")
    assert gate.state == "FAIL"
    assert no_go_of(check_attention(backend, fault.problem)).verdict != "NO-GO", "the clean backend has to pass"


def test_a_finite_wrong_result_is_no_go_on_the_cpu():
    assert_finite_and_no_go("cpu")


@pytest.mark.gpu
def test_the_original_bug_in_wmma_is_found_at_scores_and_is_no_go():
    assert_finite_and_no_go("wmma")


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_bug_of_the_kernels_is_found_at_its_stage():
    run_and_find_all("scalar,wmma", IN_KERNELS)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_bug_of_cublaslt_is_found_at_its_stage():
    trials = run_and_find_all("cublaslt,cublaslt-batched", IN_CUBLASLT)
    said = {t.variant: t.data["finding"] for t in trials if t.data.get("error")}
    assert "F5" in said and "8 bytes (int64) for STRIDED_BATCH_OFFSET" in said["F5"]
    if "F4" in said:  # a cuBLASLt that took the layouts would have given wrong scores, found there as well
        assert "CUBLAS_STATUS_" in said["F4"] and "n=20" in said["F4"]


def run_and_find_all(names, plants):
    """Every bug of these backends, each found at its stage; the trials."""
    from flashcore.faults.proving import run_faults

    trials = run_faults(None, backends.select(names))
    planted = [t for t in trials if t.data["outcome"] != "not applicable"]
    assert len(planted) == len(plants) + 1, "F13 is planted whichever the backends are"
    wrong = [(t.variant, t.backend, t.data["outcome"], t.reason) for t in planted if t.status != "ok"]
    assert wrong == []
    return trials


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_bug_over_pages_is_found_at_its_stage():
    trials = run_and_find_all("decode,hopper-paged,cublaslt-paged", IN_PAGED)
    [selecting] = [t for t in trials if t.variant == "F13"]
    assert selecting.backend == "page_selection" and "other pages" in selecting.data["finding"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["decode", "hopper-paged", "cublaslt-paged"])
def test_backends_over_pages_are_clean_where_their_bugs_are_planted(backend):
    assert_clean_where_bugs_are_planted(backends.get(backend))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["normal", "large"])
def test_two_heads_a_block_alone_do_no_harm(pattern):
    """What makes a head's leftovers show in a traced call is no bug by itself."""
    found = bisect(Override(decode.TWO_HEADS_A_BLOCK).apply(backends.get("decode")), decode.TWO_HEADS, pattern=pattern)
    assert found.passed, found.finding()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cublaslt", "cublaslt-batched"])
def test_cublaslt_is_clean_where_its_bugs_are_planted(backend):
    """In the small pages of the plants."""
    small = Override({"pages_of": cublaslt.LT_PAGE}).apply(backends.get(backend))
    assert_clean_where_bugs_are_planted(small)


def assert_clean_where_bugs_are_planted(backend):
    """Every problem and pattern of the bugs that are planted there."""
    planted = [fault for fault in catalogue.planted_in(backend.id) if fault.stage != "survey"]
    for problem, pattern in {(f.problem_in(backend.id), f.pattern) for f in planted}:
        found = bisect(backend, problem, pattern=pattern)
        assert found.passed, f"{problem.label()}, {pattern}: {found.finding()}"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cublaslt", "cublaslt-batched", "cublaslt-loop"])
def test_every_algorithm_that_a_backend_names_is_the_one_that_runs(backend):
    from flashcore.survey.labels import wrong_labels

    assert wrong_labels(backends.get(backend), catalogue.get("F14").problem) == []


@pytest.mark.gpu
@pytest.mark.parametrize("backend", sorted(plants.LATE))
def test_a_late_copy_alone_does_no_harm(backend):
    """What makes the missing barrier show is no bug by itself."""
    late = Source(plants.LATE[backend]).apply(backends.get(backend))
    assert bisect(late, catalogue.get("G1").problem_in(backend)).passed


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_bug_of_the_hopper_kernel_is_found_at_its_stage():
    trials = run_and_find_all("hopper,hopper-unsplit", IN_HOPPER)
    hung = [t for t in trials if t.variant in ("G28", "G32") and t.status == "ok"]
    assert [t.data["outcome"] for t in hung] == ["crashed"] * 3
    assert "timeout" not in [t.data["ended"] for t in hung], "the watchdog ends a hang, not the time limit"


@pytest.mark.gpu
@pytest.mark.parametrize("edits", [(), (hopper.TWO_SPLITS,), hopper.WATCHDOG], ids=["as it is", "two", "watchdog"])
def test_hopper_is_clean_where_its_bugs_are_planted(edits):
    """With two chains of pages as with four, and with barriers that end a hang."""
    assert_clean_where_bugs_are_planted(Source(edits).apply(backends.get("hopper")))
    if hopper.TWO_SPLITS not in edits:
        assert_clean_where_bugs_are_planted(Source(edits).apply(backends.get("hopper-unsplit")))
