"""The claims file: figures with units and digits, and one clear error where it makes no sense."""

from __future__ import annotations

import math

import pytest
from support.made_up_claims import GPU, claim_text

from flashcore.decision import claims as library
from flashcore.decision.claims.file import shipped_path
from flashcore.errors import ClaimsError
from flashcore.problem import square


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("0.45", 0.445, 0.455), ("0.450", 0.4495, 0.4505), ("5.7", 5.65, 5.75), ("711", 710.5, 711.5),
        ("270", 265, 275), ("25000", 24500, 25500), ("1000", 950, 1050), ("3", 2.5, 3.5), ("1.5e3", 1450, 1550),
        ("615.0", 614.95, 615.05),
    ],
)  # fmt: skip
def test_the_digits_given_say_how_far_the_truth_may_lie(value, low, high):
    claim = next(iter(library.parse_claims(claim_text("a", "tflops", value, "TFLOPS"))))
    assert claim.interval == pytest.approx((low, high))


def test_units_and_bounds():
    text = claim_text("a", "latency_us", 0.073, "s") + claim_text("b", "latency_us", 5, "µs", bound="at most")
    a, b, c = library.parse_claims(text + claim_text("c", "tokens_per_s", 25000, "tokens/s", bound="at least"))
    assert a.number == pytest.approx(73000) and a.figure == "0.073 s"
    assert b.interval == (0, 5) and b.figure == "at most 5 µs"
    assert c.interval == (25000, math.inf) and c.figure == "at least 25,000 tokens/s"


GOOD = claim_text("good", "latency_us", 73, "ms", workload="report")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("[[claim]\n", 1, "not TOML"),
        ("", None, "no claim"),
        ("claim = 3\n", 1, "[[claim]]"),
        (GOOD + "[[clam]]\n", 9, "'clam'"),
        (GOOD + GOOD, 10, "two claims with the id 'good'"),
        (GOOD + "colour = 3\n", 9, "no key 'colour'"),
        (GOOD.replace('source = "nowhere"\n', ""), 1, "'source' is missing"),
        (GOOD.replace('"latency_us"', '"latency"'), 5, "no quantity 'latency'"),
        (GOOD.replace('"ms"', '"hours"'), 1, "not in 'hours'"),
        (GOOD.replace("value = 73", 'value = "73"'), 6, "without quotes"),
        (GOOD.replace("value = 73", "value = true"), 6, "without quotes"),
        (GOOD.replace("value = 73", "value = nan"), 6, "finite"),
        (GOOD.replace("value = 73", "value = -73"), 6, "greater than 0"),
        (GOOD.replace("value = 73", "value = 1e400"), 1, "beyond"),
        (GOOD.replace('"report"', '"reprot"'), 8, "no problem 'reprot'"),
        (GOOD.replace('"report"', '"B=1,H=0,S=8,D=64"'), 8, "greater than 0"),
        (GOOD.replace('"report"', "{ batch = 1, colour = 2 }"), 8, "no 'colour'"),
        (GOOD.replace('"report"', "{ batch = 1 }"), 8, "num_heads_q"),
        (GOOD + 'gpu = "H900"\n', 9, "no gpu 'H900'"),
        (GOOD + 'same_as = "bad"\n', 9, "no claim 'bad'"),
        (GOOD + 'same_as = "good"\n', 9, "itself"),
        (GOOD + 'of = "good"\n', 1, "go together"),
        (GOOD + "factors = [2]\n", 1, "belong to"),
        (GOOD + 'bound = "roughly"\n', 9, "at least"),
        (GOOD + claim_text("b", "clock_ghz", 1, "GHz", same_as=["good"]), 16, "cannot be compared"),
        (GOOD + claim_text("b", "latency_us", 1, "ms", same_as=["good"], workload="tiny"), 16, "another workload"),
        (GOOD + claim_text("b", "tflops", 1, "TFLOPS")
         + claim_text("c", "speedup", 2, "x", of="good", over="b"), 24, "two quantities"),
        (GOOD + claim_text("b", "tflops", 1, "TFLOPS", share=0.5), 9, "there is none"),
        (GOOD + GPU.replace("sm_count = 10\n", ""), 10, "'sm_count' is missing"),
        (GOOD + GPU.replace("l2_mb = 1", "l2_mb = -1"), 10, "positive"),
        (GOOD + GPU.replace("float32", "float8"), 13, "peak_tflops"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_sentence_with_line_and_reason(tmp_path, text, line, said):
    path = tmp_path / "claims.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ClaimsError) as error:
        library.load_claims(path)
    assert said in error.value.reason and (error.value.path, error.value.line) == (str(path), line), error.value
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}{f', line {line}' if line else ''}: ")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ClaimsError, match="cannot be read"):
        library.load_claims(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ClaimsError, match="UTF-8"):
        library.load_claims(tmp_path / "bytes.toml")


def test_a_file_of_one_s_own_knows_the_shipped_gpus_and_may_correct_them(tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text(GOOD + 'gpu = "H200"\n' + GPU.replace('"Toy"', '"H200"'), encoding="utf-8")
    found = library.load_claims(path)
    assert found.gpu("H200").boost_ghz == 2 and found.gpu("H100 SXM") is not None
    assert library.load_claims(shipped_path()).gpu("H200").boost_ghz == 1.98


def test_a_workload_may_be_a_table():
    table = "{ batch = 16, num_heads_q = 16, num_heads_kv = 16, seqlen_q = 2048, seqlen_k = 2048, head_dim = 64 }"
    assert library.parse_claims(GOOD.replace('"report"', table)).claims[0].workload == square(16, 16, 2048, 64)


def test_the_shipped_gpus_are_what_their_parts_make():
    for gpu in library.load_claims().gpus:
        flop_a_clock = gpu.sm_count * 4096
        assert gpu.peak_tflops["float16"] == pytest.approx(flop_a_clock * gpu.peak_clock_ghz / 1e3, rel=1e-3)
    assert library.load_claims().gpu("H200").is_named("NVIDIA H200")
    assert library.load_claims().gpu("H100 SXM").is_named("NVIDIA H100 80GB HBM3")
