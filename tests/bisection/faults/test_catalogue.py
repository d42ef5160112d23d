"""The catalogue of planted bugs: each fits its source exactly once, compiles, and is found at the stage it names."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
from support import synthetic_records as synthetic
from support.planted_bugs import run_and_find_all

import flashcore
from flashcore import backends, tables
from flashcore.bisection import stagewise
from flashcore.bisection.bisecting import bisect
from flashcore.bisection.faults import catalogue, plants
from flashcore.bisection.faults.catalogue import FAULTS
from flashcore.bisection.faults.planting import Source
from flashcore.decision import compare, verdict
from flashcore.errors import UnknownName
from flashcore.gpu import build
from flashcore.measure.check import check_attention
from flashcore.problem import square

PATCHES = [(f.id, b) for f in FAULTS for b, plant in f.plants.items() if isinstance(plant, Source)]
IN_KERNELS = [(f.id, b) for f in FAULTS for b in f.plants if b in ("scalar", "wmma")]


bare = functools.lru_cache(maxsize=32)(build._bare)
"""A source without comments and white space; many patches are of one source."""


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


# ------------------------------------------------------------------------------------------------ patches of kernels


@pytest.mark.parametrize(("name", "backend"), PATCHES)
def test_a_patch_fits_exactly_once_and_changes_the_code(name, backend):
    kernel = kernel_of(backend)
    plant = catalogue.get(name).plants[backend]
    assert bare(plant.text(kernel)) != bare(plant.unpatched(kernel))


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


def group_of(variant: tuple) -> str:
    """The kernel of a variant, both that decode for one."""
    return variant[0].removesuffix("_paired")


def sampled(variants: dict[tuple, list]) -> list:
    """Every variant as a parameter: one of each group by a fixed seed, the rest `exhaustive`."""
    groups: dict[tuple, list[tuple]] = {}
    for variant in variants:
        groups.setdefault(group_of(variant), []).append(variant)
    chosen = {random.Random(0).choice(group) for group in groups.values()}
    return [
        pytest.param(*variant, id="-".join(patches[0]), marks=[] if variant in chosen else pytest.mark.exhaustive)
        for variant, patches in variants.items()
    ]


@pytest.mark.compiler
@pytest.mark.parametrize(("kernel", "defines", "text"), sampled(patched()))
def test_a_patched_kernel_compiles_to_other_code(kernel, defines, text):
    """The traced build holds all the code that the production build does."""
    pytest.importorskip("cuda.core")
    given = {"head_dim": 64, "dtype": "float16", "trace": True, "defines": dict(defines)}
    changed, clean = build.compile_kernel(kernel, source=text, **given), build.compile_kernel(kernel, **given)
    assert changed.path.read_bytes() != clean.path.read_bytes()


@pytest.mark.slow
def test_the_sample_of_patches_has_some_of_every_kernel():
    parameters = sampled(patched())
    default = [group_of(p.values) for p in parameters if not p.marks]
    assert set(default) == {group_of(p.values) for p in parameters} and len(default) == len(set(default)) >= 6


def test_names_that_do_not_exist():
    with pytest.raises(UnknownName, match="There is no fault 'F99'"):
        catalogue.get("F99")
    with pytest.raises(UnknownName, match="plant G7 in backend 'cpu'; choose one of: cublaslt, cublaslt-batched, deco"):
        catalogue.get("G7").plant("cpu")


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


@pytest.mark.slow
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
@pytest.mark.parametrize("backend", sorted(plants.LATE))
def test_a_late_copy_alone_does_no_harm(backend):
    """What makes the missing barrier show is no bug by itself."""
    late = Source(plants.LATE[backend]).apply(backends.get(backend))
    assert bisect(late, catalogue.get("G1").problem_in(backend)).passed
