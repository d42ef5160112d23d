"""Work that several ranks do together, each in a process of its own, and what they got: with gloo, or with NCCL.

`results` starts one process, which loads torch once and forks the ranks. They do all the work of the tests in
`tests/parallel` and write what they got to files; the tests judge it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from flashcore.problem import Problem

LIMIT = 600
"""Seconds after which the processes are killed; for a busy machine, and nothing is judged by it."""
PATIENCE = timedelta(seconds=300)
"""How long a rank waits for another, so that one that died ends the others."""
WORLD = 3
GRADIENTS = ("square", "whole", "three", "rows without keys")
"""Cases that are differentiated too."""


@dataclass(frozen=True)
class Case:
    """One problem over ranks 0 to `ranks` - 1."""

    ranks: int
    batch: int
    heads: tuple[int, int]
    seqlens: tuple[int, int]
    head_dim: int
    causal: bool
    dtype: str = "float32"
    scale: float | None = None
    rows_first: bool = False
    """Whether tensors are views of ``[batch, seqlen, heads, head_dim]``."""

    def problem(self, seqlen_q: int, seqlen_k: int) -> Problem:
        """The whole problem, or its last rows against some keys."""
        return Problem(
            batch=self.batch, num_heads_q=self.heads[0], num_heads_kv=self.heads[1], seqlen_q=seqlen_q,
            seqlen_k=seqlen_k, head_dim=self.head_dim, dtype=self.dtype, causal=self.causal, softmax_scale=self.scale,
        )  # fmt: skip

    def inputs(self, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Whole q, k and v: the same in every process."""
        made = []
        for number, which in enumerate((0, 1, 1)):  # queries, keys, values
            source = torch.Generator(device).manual_seed(11 + number)
            heads, length = self.heads[which], self.seqlens[which]
            shape = (self.batch, heads, length, self.head_dim)
            if self.rows_first:
                shape = (self.batch, length, heads, self.head_dim)
            tensor = torch.randn(shape, generator=source, device=device).to(getattr(torch, self.dtype))
            made.append(tensor.transpose(1, 2) if self.rows_first else tensor)
        return tuple(made)

    def cotangents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What `out` and `lse` are multiplied by before gradients of their sum are taken."""
        source = torch.Generator().manual_seed(5)
        rows = self.batch, self.heads[0], self.seqlens[0]
        return torch.randn(*rows, self.head_dim, generator=source), torch.randn(rows, generator=source)


CASES = {
    "square": Case(2, 2, (4, 2), (48, 48), 16, True),
    "odd": Case(2, 1, (4, 1), (37, 37), 16, True, rows_first=True),
    "whole": Case(2, 1, (2, 2), (21, 33), 8, False, scale=-0.3),
    "bfloat16": Case(2, 1, (2, 1), (70, 70), 32, True, "bfloat16"),
    "three": Case(3, 1, (4, 2), (61, 61), 16, True),
    "more keys": Case(3, 1, (2, 1), (20, 45), 8, True),
    "rows without keys": Case(3, 1, (2, 1), (45, 20), 8, True),
}


def results(folder: Path, what: str = "cpu", ranks: int = WORLD) -> list[dict]:
    """What each rank got from its work; a rank that fails or hangs fails the test, and no process stays."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    code = f"from support.ranks import main; main({str(folder)!r}, {what!r}, {ranks})"
    here = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    here.setdefault("NCCL_NVLS_ENABLE", "0")
    strict = ["-W", "error"] if what == "cpu" else []  # what NCCL's releases warn of is not ours
    with open(folder / "said.txt", "w+") as said:
        process = subprocess.Popen(
            [sys.executable, *strict, "-c", code], stdout=said, stderr=subprocess.STDOUT, env=here,
            start_new_session=True,
        )  # fmt: skip
        try:
            ended = process.wait(LIMIT if what == "cpu" else 5 * LIMIT)
        except subprocess.TimeoutExpired:
            ended = "none: it was killed for its time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its ranks are in its session
                process.wait()
        said.seek(0)
        assert ended == 0, f"exit code {ended}\n{said.read()}"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def put_together(parts: list[torch.Tensor], seqlen: int) -> torch.Tensor:
    """The whole along dimension 2, from the parts of all ranks."""
    from flashcore.parallel.plan import chunks, owned

    pieces = {}
    for rank, part in enumerate(parts):
        early, late = owned(rank, len(parts))
        first = chunks(seqlen, len(parts))[early]
        pieces[early], pieces[late] = part.split([first[1] - first[0], part.shape[2] - first[1] + first[0]], 2)
    return torch.cat([pieces[chunk] for chunk in sorted(pieces)], 2)


def main(folder: str, what: str, ranks: int) -> None:
    """The process that forks the ranks."""
    import flashcore.parallel  # noqa: F401  (loaded once for all ranks)

    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            if what != "cpu":  # a process that uses CUDA begins anew
                code = f"from support.ranks import work; work({folder!r}, {what!r}, {ranks}, {rank})"
                os.execv(sys.executable, [sys.executable, "-c", code])
            try:
                work(folder, what, ranks, rank)
            except SystemExit as ended:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(int(ended.code or 0))
        pids.append(pid)
    failed = 0
    while pids and not failed:
        pid, status = os.wait()
        pids.remove(pid)
        failed = os.waitstatus_to_exitcode(status)
    for pid in pids:  # they wait for the one that failed
        os.kill(pid, signal.SIGKILL)
    sys.exit(1 if failed else 0)


def work(folder: str, what: str, ranks: int, rank: int) -> None:
    """All that one rank does; its process ends with it."""
    torch.set_num_threads(1)
    code = 1
    try:
        got = (on_cpus if what == "cpu" else on_gpus)(rank, ranks, Path(folder))
        torch.save(got, Path(folder) / f"rank{rank}.pt")
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.exit(code)


def refusal(function, *args, **kwargs) -> tuple[str, str]:
    """The kind of error that a call ends with, and its words; empty words where it ends with none."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def on_cpus(rank: int, ranks: int, folder: Path) -> dict:
    """All that the tests without a GPU ask three ranks for."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks, timeout=PATIENCE
    )
    meshes = {2: DeviceMesh("cpu", [0, 1]), 3: init_device_mesh("cpu", (ranks,))}
    got = {"cases": cases(rank, meshes), "cut": cut(rank, meshes[3])}
    if rank < 2:
        got["refused"] = refused(rank, meshes[2])
        got["context_parallel"] = context_parallel(meshes[2])
    else:
        tensor = torch.zeros(1, 1, 4, 8)
        got["not in the mesh"] = refusal(attention(), tensor, tensor, tensor, meshes[2])
    flat = init_device_mesh("cpu", (3, 1), mesh_dim_names=("cp", "dp"))
    got["two dimensions"] = refusal(attention(), *(torch.zeros(1, 1, 4, 8) for _ in range(3)), flat)
    dist.barrier()
    dist.destroy_process_group()
    got["no group"] = refusal(attention(), *(torch.zeros(1, 1, 4, 8) for _ in range(3)), meshes[3])
    return got


def attention():
    from flashcore import parallel

    return parallel.attention


def cases(rank: int, meshes: dict) -> dict:
    from flashcore import parallel

    got = {}
    for name, case in CASES.items():
        if rank >= case.ranks:
            continue
        mesh, whole = meshes[case.ranks], case.inputs()
        parts = [parallel.shard(tensor, mesh) for tensor in whole]
        if case.rows_first:
            parts = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in parts]
        options = {"causal": case.causal, "softmax_scale": case.scale}
        known = {"seqlen_q": case.seqlens[0], "seqlen_k": case.seqlens[1]}
        for plan in ("gather", "ring"):
            out, lse = parallel.attention(*parts, mesh, **options, plan=plan, return_lse=True)
            again = parallel.attention(*parts, mesh, **options, **known, plan=plan, return_lse=True)
            alone = parallel.attention(*parts, mesh, **options, **known, plan=plan)
            got[name, plan] = {
                "out": out, "lse": lse, "alone": alone, "strides": out.stride() == torch.empty_like(parts[0]).stride(),
                "same": torch.equal(out, again[0]) and torch.equal(lse, again[1]),
            }  # fmt: skip
        if name in GRADIENTS:
            got[name, "gradients"] = gradients(case, mesh)
    return got


def gradients(case: Case, mesh) -> dict:
    """Gradients of q, k and v on this rank, for the cotangents that `cotangents` makes; with and without one of lse."""
    from flashcore import parallel

    to_out, to_lse = (parallel.shard(tensor, mesh) for tensor in case.cotangents())
    got = {}
    for both in (True, False):
        parts = [parallel.shard(tensor, mesh).requires_grad_() for tensor in case.inputs()]
        out, lse = parallel.attention(*parts, mesh, causal=case.causal, softmax_scale=case.scale, return_lse=True)
        # A row that sees no key has lse -inf, and no gradient through it.
        total = (out * to_out).sum() + ((lse.masked_fill(lse == -torch.inf, 0) * to_lse).sum() if both else 0)
        got[both] = torch.autograd.grad(total, parts)
    return got


def cut(rank: int, mesh) -> dict:
    """Tensors cut and put together again, along several dimensions."""
    from flashcore import parallel

    got = {}
    for shape, dim in (((2, 3, 17, 4), 2), ((6,), 0), ((2, 23), -1), ((3, 2, 7), 2)):
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
        part = parallel.shard(whole, mesh, dim=dim)
        got[shape] = part, torch.equal(parallel.gather(part, mesh, dim=dim), whole)
    part = torch.zeros(2, 3, 4, 5)
    got["too short"] = refusal(parallel.shard, torch.zeros(1, 1, 5, 8), mesh)
    got["no such dimension"] = refusal(parallel.shard, part, mesh, dim=4)
    got["no tensor"] = refusal(parallel.shard, [1, 2, 3], mesh, dim=0)
    got["lengths"] = refusal(parallel.gather, part[:, :, : 4 - rank], mesh)
    got["dtypes"] = refusal(parallel.gather, part.to(torch.float16 if rank else torch.bfloat16), mesh)
    got["elsewhere"] = refusal(parallel.gather, part.to("meta") if rank == 1 else part, mesh)
    got["gradients"] = refusal(parallel.gather, part.clone().requires_grad_(), mesh)
    return got


def refused(rank: int, mesh) -> dict:
    """Calls that two ranks make and that have to be refused, and one that has to work after all of them."""
    from torch.distributed.tensor import DTensor, Shard

    from flashcore import parallel

    q = torch.randn(1, 2, 8, 8)
    call, zeros = parallel.attention, torch.zeros_like(q)
    spread = DTensor.from_local(q, mesh, [Shard(2)], run_check=False)
    got = {
        "lengths of q": refusal(call, q[:, :, : 8 - rank * 2], q, q, mesh),
        "lengths of k": refusal(call, q, q[:, :, : 6 + rank * 2], q[:, :, : 6 + rank * 2], mesh),
        "too short": refusal(call, q[:, :, :1], q, q, mesh),
        "causal": refusal(call, q, q, q, mesh, causal=rank == 0),
        "scale": refusal(call, q, q, q, mesh, softmax_scale=1.0 + rank),
        "plan differs": refusal(call, q, q, q, mesh, plan=("gather", "ring")[rank]),
        "one refuses": refusal(call, *((q,) * 3 if rank else (q, q.half(), q)), mesh),
        "no tensor": refusal(call, q if rank else None, q, q, mesh),
        "elsewhere": refusal(call, *((q.to("meta"),) * 3 if rank else (q,) * 3), mesh),
        "DTensor": refusal(call, spread, spread, spread, mesh),
        "gradients": refusal(call, q.clone().requires_grad_(), q, q, mesh, plan="ring"),
        "gradients differ": refusal(call, q.clone().requires_grad_(rank == 0), q, q, mesh),
        "mapped": refusal(torch.vmap(lambda one: call(one, q, q, mesh)), q[None]),
        "plan": refusal(call, q, q, q, mesh, plan="gathr"),
        "backend": refusal(call, q, q, q, mesh, backend="no-such"),
        "one backend": refusal(call, q, q, q, mesh, backend="auto" if rank else "no-such"),
        "alone": refusal(call, q, q, q, mesh, seqlen_k=16),
        "given": refusal(call, q, q, q, mesh, seqlen_q=16, seqlen_k=20),
        "given too short": refusal(call, q, q, q, mesh, seqlen_q=3, seqlen_k=16),
        "a list": refusal(call, q, q, q, [0, 1]),
    }
    got["after all"] = torch.equal(call(q, zeros, zeros, mesh), zeros)
    return got


def context_parallel(mesh) -> dict:
    """torch's `context_parallel` with our attention in it: whole tensors in, parts inside, and whole ones again."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options, context_parallel_unshard

    import flashcore
    from flashcore import parallel

    q, k, v = CASES["square"].inputs()
    k, v = (tensor.repeat_interleave(2, 1) for tensor in (k, v))
    torchs = torch.nn.functional.scaled_dot_product_attention
    got = {"expected": torchs(q, k, v, is_causal=True)}
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    torchs(*leaves, is_causal=True).square().sum().backward()
    got["expected gradients"] = [leaf.grad for leaf in leaves]
    buffers = [q.clone(), k.clone(), v.clone()]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]):
        function = torch.nn.functional.scaled_dot_product_attention
        with parallel.in_context_parallel() as calls:
            part = function(*buffers, is_causal=True)
        with parallel.in_context_parallel(plan="ring"):
            ring = function(*buffers, is_causal=True)
        parts = [buffer.clone().requires_grad_() for buffer in buffers]
        with parallel.in_context_parallel():
            function(*parts, is_causal=True).square().sum().backward()
        got["outside"] = refusal(function, *buffers, is_causal=True)[0]
        with flashcore.replace_sdpa(backend="cpu") as replaced:
            got["replaced"] = [refusal(function, *buffers, is_causal=True)[0], replaced.ours, dict(replaced.torchs)]
        with parallel.in_context_parallel(plan="ring") as others:
            refusal(function, *buffers, dropout_p=0.5)
            refusal(function, *parts, is_causal=True)
            _cp_options.enable_load_balance = False
            refusal(function, *buffers, is_causal=True)
            _cp_options.enable_load_balance = True
        got["whole"], got["ring"], *got["gradients"] = context_parallel_unshard(
            mesh, [part, ring, *(one.grad for one in parts)], [2] * 5
        )
        got["kind"] = type(part).__name__
    got["said"], got["others"], got["ours"] = str(calls), dict(others.torchs), calls.ours
    with parallel.in_context_parallel() as plain:
        got["untouched"] = torch.equal(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
                                       got["expected"])  # fmt: skip
    got["plain"] = plain.ours
    return got


def gradients_off(case: Case, whole, parts, mesh) -> list[float]:
    """How far gradients are from those of one card, as a share of these."""
    import flashcore
    from flashcore import parallel

    options = {"causal": case.causal, "softmax_scale": case.scale}
    leaves = [tensor.detach().requires_grad_() for tensor in whole]
    expected = torch.autograd.grad(flashcore.attention(*leaves, **options).float().square().sum(), leaves)
    leaves = [tensor.detach().requires_grad_() for tensor in parts]
    found = torch.autograd.grad(parallel.attention(*leaves, mesh, **options).float().square().sum(), leaves)
    truths = [parallel.shard(tensor, mesh).float() for tensor in expected]
    return [float((mine - truth).norm() / truth.norm()) for mine, truth in zip(found, truths, strict=True)]


def on_gpus(rank: int, ranks: int, folder: Path) -> dict:
    """Attention over GPUs: against float64 at both chunk ends of each rank, against one card, and twice."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import flashcore
    from flashcore import parallel
    from flashcore.measure.check import expected
    from flashcore.numerics.tolerance import compare
    from flashcore.parallel.plan import chunks, owned

    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks, timeout=PATIENCE, device_id=device
    )
    mesh = init_device_mesh("cuda", (ranks,))
    got = {}
    long = 128 * 1024 if ranks == 4 else 16 * 1024
    for case in (
        Case(ranks, 1, (32, 8), (long, long), 128, True, "bfloat16"),
        Case(ranks, 2, (8, 2), (3001, 3001), 64, True, "float16", rows_first=True),
        Case(ranks, 1, (4, 4), (1500, 2999), 128, True, "bfloat16"),
        Case(ranks, 1, (4, 1), (2049, 777), 64, False, "float16", scale=0.2),
    ):
        q, k, v = case.inputs("cuda")
        one_out, one_lse = flashcore.attention(q, k, v, causal=case.causal, softmax_scale=case.scale, return_lse=True)
        parts = [parallel.shard(tensor, mesh) for tensor in (q, k, v)]
        for plan in ("gather", "ring"):
            options = {"causal": case.causal, "softmax_scale": case.scale, "plan": plan, "return_lse": True}
            runs = [parallel.attention(*parts, mesh, **options) for _ in range(3)]
            known = {"seqlen_q": case.seqlens[0], "seqlen_k": case.seqlens[1]}
            runs += [parallel.attention(*parts, mesh, **options, **known) for _ in range(3)]
            out, lse = runs[0]
            wrong, at = [], 0
            for chunk in owned(rank, ranks):
                start, stop = chunks(case.seqlens[0], ranks)[chunk]
                at += stop - start
                rows = min(64, stop - start)
                end = stop + case.seqlens[1] - case.seqlens[0] if case.causal else case.seqlens[1]
                problem = case.problem(rows, end)
                truth = expected(q[:, :, stop - rows : stop], k[:, :, :end], v[:, :, :end], problem, round_scores=False)
                mine = slice(at - rows, at)
                for found in (
                    compare(out[:, :, mine], truth.out, atol=truth.out_atol, rtol=truth.out_rtol),
                    compare(lse[:, :, mine], truth.lse, atol=truth.lse_atol, rtol=truth.lse_rtol),
                ):
                    wrong += [] if found.passed else [found.sentence()]
            off_one = float((out - parallel.shard(one_out, mesh)).abs().max())
            off_lse = (lse - parallel.shard(one_lse, mesh)).abs().nan_to_num(0.0)
            got[case, plan] = {
                "wrong": wrong, "off one card": off_one, "lse off one card": float(off_lse.max()),
                "same": all(torch.equal(out, run[0]) and torch.equal(lse, run[1]) for run in runs),
            }  # fmt: skip
        if case.seqlens[0] < 8 * 1024:
            got[case, "gather"]["gradients off one card"] = gradients_off(case, (q, k, v), parts, mesh)
    dist.barrier()
    dist.destroy_process_group()
    return got
