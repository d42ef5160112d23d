"""Attention over a sequence that is cut over several processes, one a GPU, beside the same on one card.

On this machine's CPU, two processes that speak through gloo::

    torchrun --standalone --nproc-per-node 2 examples/parallel_attention.py

On all four GPUs of a machine, with NCCL, and timed::

    torchrun --standalone --nproc-per-node 4 examples/parallel_attention.py --device cuda --time

On two machines of eight GPUs each, started on both of them::

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_HOST:29500 \\
        examples/parallel_attention.py --device cuda --time
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import flashcore
from flashcore import parallel

ROUNDS, CALLS = 9, 3
"""A timing: rounds of so many calls over all cards and as many on one, in turn."""


def arguments() -> argparse.Namespace:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    asked.add_argument("--keys-per-card", type=int, help="32768 on GPUs, 256 on CPUs")
    asked.add_argument("--heads", type=int, nargs=2, metavar=("Q", "KV"), default=(32, 8), help="32 8")
    asked.add_argument("--head-dim", type=int, default=128)
    asked.add_argument("--plan", choices=("gather", "ring"), default="gather")
    asked.add_argument("--whole", action="store_true", help="no causal mask")
    asked.add_argument("--time", action="store_true", help="print TFLOPS a card, and on one card alone")
    return asked.parse_args()


def seconds(call, device: torch.device) -> float:
    """How long a call takes on the slowest card, all having begun together."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    dist.barrier()
    wait()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    wait()
    took = torch.tensor((time.perf_counter() - begin) / CALLS, dtype=torch.float64, device=device)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def main() -> None:
    options = arguments()
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("Start this with torchrun, as its first lines show: it makes the processes and counts them.")
    place = int(os.environ["LOCAL_RANK"])
    device = torch.device(options.device, place) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("cp",))
    cards = mesh.size()

    # Every process makes the same whole tensors, to have something to compare with. A model cuts its tokens instead:
    # parallel.shard(tokens, mesh, dim=1), and their positions alike.
    seqlen = cards * (options.keys_per_card or (32768 if device.type == "cuda" else 256))
    source = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, seqlen, options.head_dim, device=device, dtype=torch.bfloat16, generator=source)
        for heads in (options.heads[0], options.heads[1], options.heads[1])
    )
    parts = [parallel.shard(tensor, mesh) for tensor in (q, k, v)]
    causal = not options.whole

    def on_all():
        return parallel.attention(*parts, mesh, causal=causal, plan=options.plan, seqlen_q=seqlen, seqlen_k=seqlen)

    def on_one():
        return flashcore.attention(q, k, v, causal=causal)

    out, one = on_all(), on_one()
    same_bits = torch.tensor(torch.equal(out, on_all()), dtype=torch.int32, device=device)
    dist.all_reduce(same_bits, dist.ReduceOp.MIN)
    off = (parallel.gather(out, mesh) - one).abs().max()
    if dist.get_rank() == 0:
        print(
            f"{seqlen} keys over {cards} of {device.type}: the largest difference from one card is {float(off):.1e}, "
            f"where bfloat16 rounds 1 by {torch.finfo(torch.bfloat16).eps / 2:.1e}; a second run gave "
            f"{'the same bits' if int(same_bits) else 'OTHER BITS'}."
        )

    if options.time:
        problem = flashcore.Problem(
            batch=1, num_heads_q=options.heads[0], num_heads_kv=options.heads[1], seqlen_q=seqlen, seqlen_k=seqlen,
            head_dim=options.head_dim, dtype="bfloat16", causal=causal,
        )  # fmt: skip
        rounds = [(seconds(on_all, device), seconds(on_one, device)) for _ in range(ROUNDS)]
        shares = sorted(alone / cards / together for together, alone in rounds)
        together, alone = (statistics.median(some) for some in zip(*rounds, strict=True))
        if dist.get_rank() == 0:
            tflops = problem.flops() / cards / together / 1e12, problem.flops() / alone / 1e12
            low, middle, high = (100 * share for share in (shares[0], statistics.median(shares), shares[-1]))
            print(
                f"{problem.label()}, plan {options.plan}: {tflops[0]:.1f} TFLOPS a card over {cards} "
                f"({1e3 * together:.2f} ms), {tflops[1]:.1f} on one ({1e3 * alone:.2f} ms): {middle:.1f} % "
                f"({low:.1f} to {high:.1f} in {ROUNDS} rounds; the slowest card counts)."
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
