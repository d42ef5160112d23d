"""The limit of attention that stores its scores: the least time that its bytes, products and launches need.

For each group of heads and each page of keys the design runs three kernels one after the other on one stream, and one
more when a group's last page is done::

    scores = Q K^T        reads Q and K, writes the scores
    softmax               reads the scores, writes the probabilities, and rescales accum after the first page
    accum += P V          reads the probabilities and V, writes accum, and reads it after the first page
    out = accum / sum     reads accum, writes out

A kernel waits for the one before it in its lane (a stream that works on one group), so their times add up; inside a
kernel everything may overlap, so it takes at least the longest of its terms::

    kernel >= max(bytes through device memory / copy bandwidth, bytes through L2 / L2 bandwidth,
                  operations / matrix product speed, one node of a CUDA graph)
    time   >= max(sum of all kernels / lanes, all bytes through device memory / copy bandwidth,
                  all bytes through L2 / L2 bandwidth, all operations / matrix product speed)

With one lane the sum is always the longest. Scores, probabilities, accum and Q of the groups under way are in L2 when
together they fit there, else in device memory; K, V and out always go through device memory. All four rates are the
run's own `ceiling` records (a copy's bandwidth: a kernel that mostly reads may be a tenth faster). This is the roofline
of Williams et al. (2009), kernel by kernel; exponentials are left out, so the true time lies above.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from flashcore.decision.compare import is_figure
from flashcore.problem import DTYPE_BYTES, Problem
from flashcore.records import Trial

TERMS = ("memory", "L2", "products", "launches")
TERM_WORDS = {
    "memory": "bytes through device memory", "L2": "bytes through the L2 cache", "products": "the matrix products",
    "launches": "the launches",
}  # fmt: skip
LARGEST_PAGE = 2048
PAGES = (64, 128, 256, 512, 1024, 2048)
LANES = (1, 2, 4)
RESIDENT_SHARE = 0.55
"""Share of the L2 cache that `cublaslt` gives to the scores of the groups under way."""


@dataclass(frozen=True)
class Variant:
    """How a backend of this design cuts its work."""

    page_size: int | None
    """Keys in a page; None takes the problem's own."""
    heads: int | None
    """Query heads in one group; None for all, 0 for as many as keep their scores in L2."""
    score_bytes: int
    """A score's bytes in memory."""
    in_place: bool
    """Whether probabilities are written over the scores."""
    lanes: int = 1
    """Groups under way at once."""


VARIANTS: dict[str, Variant] = {
    "cublaslt": Variant(page_size=1024, heads=0, score_bytes=2, in_place=True, lanes=2),
    "cublaslt-batched": Variant(page_size=LARGEST_PAGE, heads=None, score_bytes=2, in_place=True),
    "cublaslt-loop": Variant(page_size=None, heads=1, score_bytes=4, in_place=False),
}
"""By backend id; a test holds them against the backends themselves, which cannot be imported here without torch."""


@dataclass(frozen=True)
class Ceilings:
    """Rates that nothing on the machine exceeds."""

    copy_tbs: float
    """TB/s through device memory."""
    tflops: float
    """Of a large 16-bit matrix product."""
    l2_tbs: float | None = None
    """TB/s through L2; None counts such bytes as free, which keeps the bound a bound."""
    node_us: float = 0.0
    """The shortest kernel inside a CUDA graph, in µs."""


@dataclass(frozen=True)
class Prediction:
    """The least time of a problem under a variant, and what it consists of."""

    time_us: float
    tflops: float
    """`Problem.flops()` over `time_us`: the most that the variant can reach."""
    terms_us: Mapping[str, float]
    """What the time consists of, by `TERMS`; they sum to `time_us`."""
    page_size: int
    heads: int
    """Query heads in one group."""
    launches: int
    memory_bytes: int
    l2_bytes: int

    @property
    def binds(self) -> str:
        """The term with the largest share."""
        return max(self.terms_us, key=self.terms_us.get)


def ceilings_of(trials: Iterable[Trial], dtype: str = "float16") -> Ceilings | None:
    """The rates among a run's `ceiling` records; None without a GPU's copy bandwidth and matrix product."""
    units = {"copy_bandwidth": "TB/s", "l2_copy_bandwidth": "TB/s", "graph_node": "us"}
    product = {"float16": "matmul_fp16", "bfloat16": "matmul_bf16"}.get(dtype, "")
    units[product] = "TFLOPS"
    values = {
        str(t.data.get("name")): float(t.data["value"])
        for t in trials
        if t.kind == "ceiling" and t.status == "ok" and t.data.get("unit") == units.get(str(t.data.get("name")))
        and is_figure(t.data.get("value")) and t.data["value"] > 0
    }  # fmt: skip
    if "copy_bandwidth" not in values or product not in values:
        return None
    return Ceilings(
        values["copy_bandwidth"], values[product], values.get("l2_copy_bandwidth"), values.get("graph_node", 0.0)
    )


def predict(problem: Problem, variant: Variant, ceilings: Ceilings, *, l2_bytes: int) -> Prediction:
    """The least time of `problem` under `variant`.

    Parameters
    ----------
    l2_bytes
        Size of the L2 cache.
    """
    size = DTYPE_BYTES[problem.dtype]
    page = min(variant.page_size or problem.page_size, LARGEST_PAGE, -(-problem.seqlen_k // 8) * 8)
    prob_bytes = size
    kept = variant.score_bytes if variant.in_place else variant.score_bytes + prob_bytes
    total = problem.batch * problem.num_heads_q
    group = problem.num_heads_q // problem.num_heads_kv
    heads = _heads(variant, problem, page, kept, l2_bytes, total, group)
    rows, depth = problem.seqlen_q, problem.head_dim
    lanes = min(variant.lanes, -(-total // heads))
    working = lanes * heads * rows * (page * kept + depth * (4 + size))
    resident = working <= l2_bytes

    chain, alone = dict.fromkeys(TERMS, 0.0), dict.fromkeys(TERMS, 0.0)
    launches = memory = through_l2 = 0
    for count, times in _groups(total, heads):
        for kernel_memory, kernel_kept, flops in _kernels(problem, page, count, group, variant.score_bytes, prob_bytes):
            far = kernel_memory + (0 if resident else kernel_kept)
            near = kernel_kept if resident else 0
            times_us = {
                "memory": far / ceilings.copy_tbs / 1e6,
                "L2": near / ceilings.l2_tbs / 1e6 if ceilings.l2_tbs else 0.0,
                "products": flops / ceilings.tflops / 1e6,
                "launches": ceilings.node_us,
            }
            binds = max(times_us, key=times_us.get)
            chain[binds] += times * times_us[binds]
            for term in ("memory", "L2", "products"):  # lanes share these; each has launches of its own
                alone[term] += times * times_us[term]
            launches += times
            memory += times * far
            through_l2 += times * near
    terms = {term: us / lanes for term, us in chain.items()}
    shared = max(alone, key=alone.get)
    if alone[shared] > sum(terms.values()):
        terms = {**dict.fromkeys(TERMS, 0.0), shared: alone[shared]}
    time_us = sum(terms.values())
    return Prediction(
        time_us=time_us, tflops=problem.flops() / time_us / 1e6, terms_us=terms, page_size=page, heads=heads,
        launches=launches, memory_bytes=memory, l2_bytes=through_l2,
    )  # fmt: skip


def _heads(
    variant: Variant, problem: Problem, page: int, kept: int, l2_bytes: int, total: int, group: int
) -> int:  # fmt: skip
    """Query heads in one group."""
    if variant.heads is None:
        return total
    wanted = variant.heads or int(RESIDENT_SHARE * l2_bytes / variant.lanes / (problem.seqlen_q * page * kept))
    return max(group, min(total, wanted // group * group))


def _groups(total: int, heads: int) -> Iterator[tuple[int, int]]:
    """(heads, times): full groups, and what is left over."""
    if total // heads:
        yield heads, total // heads
    if total % heads:
        yield total % heads, 1


def _kernels(
    problem: Problem, page: int, heads: int, group: int, score_bytes: int, prob_bytes: int
) -> Iterator[tuple[int, int, int]]:
    """Every kernel of a group of heads: bytes that must go through device memory, bytes of its own, operations."""
    size, depth = DTYPE_BYTES[problem.dtype], problem.head_dim
    for number, first_key in enumerate(range(0, problem.seqlen_k, page)):
        keys = min(page, problem.seqlen_k - first_key)
        skipped = max(0, first_key - (problem.seqlen_k - problem.seqlen_q)) if problem.causal and number else 0
        rows = max(0, problem.seqlen_q - skipped)
        if not rows:
            continue
        scores, accum, query = heads * rows * keys, heads * rows * depth * 4, heads * rows * depth * size
        one_side = max(1, heads // group) * keys * depth * size  # this page of K, or of V
        again = number > 0
        flops = 2 * scores * depth
        yield one_side + (0 if again else query), scores * score_bytes + (query if again else 0), flops
        yield 0, scores * (score_bytes + prob_bytes) + (2 * accum if again else 0), 0
        yield one_side, scores * prob_bytes + accum * (2 if again else 1), flops
    everything = heads * problem.seqlen_q * depth
    yield everything * size, everything * 4, 0


def best(problem: Problem, ceilings: Ceilings, *, l2_bytes: int) -> tuple[Variant, Prediction]:
    """The cut with the highest limit, over page sizes, group sizes and lanes; 16-bit scores, overwritten in place."""
    total = problem.batch * problem.num_heads_q
    group = problem.num_heads_q // problem.num_heads_kv
    sizes = sorted({min(total, group * 2**i) for i in range(total.bit_length())} | {total})
    tried = []
    for page in PAGES:
        for heads in sizes:
            for lanes in LANES:
                variant = Variant(page, heads, DTYPE_BYTES[problem.dtype], True, lanes)
                tried.append((variant, predict(problem, variant, ceilings, l2_bytes=l2_bytes)))
    return min(tried, key=lambda pair: pair[1].time_us)


def through_memory(problem: Problem, ceilings: Ceilings) -> Prediction:
    """The limit of a cut that keeps no scores in L2: all heads at once, over whole rows."""
    variant = Variant(LARGEST_PAGE, None, DTYPE_BYTES[problem.dtype], True)
    return predict(problem, variant, ceilings, l2_bytes=0)


def cut_in_words(variant: Variant) -> str:
    """How a variant cuts the work, as part of a sentence."""
    lanes = "" if variant.lanes == 1 else f" in each of {variant.lanes} lanes"
    noun = "head" if variant.heads == 1 else "heads"
    return f"pages of {variant.page_size} keys and {variant.heads} {noun} at once{lanes}"


def in_words(prediction: Prediction) -> str:
    """Which term binds, with its share of the time."""
    share = prediction.terms_us[prediction.binds] / prediction.time_us
    return f"{TERM_WORDS[prediction.binds]} ({100 * share:.0f} % of the least time)"
