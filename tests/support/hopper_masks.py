"""The Hopper kernel's own text about masks, compiled for the host: which pages rows see, and the list of tiles.

A block of the kernel that makes the list runs as threads of the host, one after another; its warps exchange numbers
through memory.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from flashcore.gpu import build

STRUCTS = ("Strides", "AttentionParams", "Sequence", "alignas(8) ListedTile", "MaskParams", "Span", "Share")
FUNCTIONS = ("place", "sequence_at", "first_row_of", "clear_outputs", "clear_around", "sum_up_to")

HOST = """#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)
using std::min, std::max;
using Element = unsigned short;
using Index = long long;
struct Dim { int x; };
thread_local Dim threadIdx, blockIdx;
Dim gridDim;
struct int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr bool HAS_WINDOW = true;
constexpr int HEAD_DIM = 64, WARP = 32, WARP_ROWS = 16, PLAN_THREADS = 256, PLAN_WARPS = 8;
constexpr int TILE_M = FLASHCORE_TILE_M, TILE_N = 64;
std::barrier<> whole_block(PLAN_THREADS);
struct Warp { std::barrier<> all{32}; int of_lane[32]; };
Warp warps[PLAN_WARPS];
void __syncthreads() { whole_block.arrive_and_wait(); }
int __shfl_up_sync(unsigned, int x, int step) {
  Warp& warp = warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  warp.of_lane[lane] = x;
  warp.all.arrive_and_wait();
  const int found = lane >= step ? warp.of_lane[lane - step] : x;
  warp.all.arrive_and_wait();
  return found;
}
void let_next_kernel_start() {}
"""

MAIN = """
std::vector<int> numbers(FILE* file, int count) {
  std::vector<int> found(count);
  for (int& number : found) if (std::fscanf(file, "%d", &number) != 1) std::exit(2);
  return found;
}

void spans(FILE* file) {
  const auto n = numbers(file, 7);
  MaskParams masks = {};
  masks.window_left = n[0], masks.window_right = n[1];
  const PageSpan span(masks, n[2], n[3], n[4], n[5], n[6]);
  std::printf("%d %d %d %d\\n", span.first, span.end, span.whole_from, span.whole_end);
}

// A call: its shape, its grid, whether sequences lie end to end, which lengths are given, and the lengths.
void plan(FILE* file) {
  const auto n = numbers(file, 13);
  const int tensor_batch = n[0], heads = n[1], rows_q = n[2], rows_k = n[3], sequences = n[5], most = n[11];
  const bool ragged = n[8];
  AttentionParams params = {};
  params.batch = tensor_batch, params.num_heads_q = params.num_heads_kv = heads;
  params.seqlen_q = rows_q, params.seqlen_k = rows_k, params.causal = n[4];
  std::vector<Element> out(Index(tensor_batch) * heads * rows_q * HEAD_DIM + 8, 0x7f7f);
  Element* aligned = out.data() + (16 - reinterpret_cast<size_t>(out.data()) % 16) % 16 / sizeof(Element);
  std::vector<float> lse(tensor_batch * heads * rows_q, 7.f);
  params.out_gmem = aligned, params.lse_gmem = lse.data();
  params.out = {Index(heads) * rows_q * HEAD_DIM, Index(rows_q) * HEAD_DIM, HEAD_DIM};
  MaskParams masks = {};
  masks.window_left = n[6], masks.window_right = n[7];
  masks.sequences = sequences, masks.most_tiles = most, masks.padded_left = n[10];
  const auto of_q = numbers(file, sequences + ragged), of_k = numbers(file, sequences + ragged);
  if (ragged)
    masks.cu_seqlens_q_gmem = of_q.data(), masks.cu_seqlens_k_gmem = of_k.data();
  else
    masks.seqlens_q_gmem = n[9] ? of_q.data() : nullptr, masks.seqlens_k_gmem = of_k.data();
  std::vector<ListedTile> tiles(most + 1, ListedTile{-7, 0, 0});
  int num_tiles[2] = {-1, -1};
  masks.tiles_gmem = tiles.data(), masks.num_tiles_gmem = num_tiles;
  gridDim.x = n[12];
  for (int block = 0; block < gridDim.x; ++block) {
    std::vector<std::thread> threads;
    for (int thread = 0; thread < PLAN_THREADS; ++thread)
      threads.emplace_back([&, thread] {
        threadIdx.x = thread, blockIdx.x = block;
        attention_hopper_plan(params, masks);
      });
    for (auto& thread : threads) thread.join();
  }
  std::printf("%d %d %d", num_tiles[0], num_tiles[1], tiles[most].sequence);
  for (int i = 0; i < min(num_tiles[0], most); ++i)
    std::printf(" %d %d %d", tiles[i].sequence, int(tiles[i].head), int(tiles[i].nth));
  std::printf("\\n");
  for (size_t row = 0; row < lse.size(); ++row) {
    int zeros = 0, untouched = 0;
    for (int i = 0; i < HEAD_DIM; ++i)
      zeros += aligned[row * HEAD_DIM + i] == 0, untouched += aligned[row * HEAD_DIM + i] == 0x7f7f;
    const bool cleared = zeros == HEAD_DIM && lse[row] == -INFINITY;
    std::printf("%c", cleared ? '0' : untouched == HEAD_DIM && lse[row] == 7.f ? '.' : '?');
  }
  std::printf("\\n");
}

int main() {
  for (char what; std::scanf(" %c", &what) == 1;) what == 's' ? spans(stdin) : plan(stdin);
}
"""


def _piece(text: str, begins: str) -> str:
    """A struct or function of the source, from the line that begins so up to its closing brace."""
    found = re.findall(rf"^{begins}.*?^\}};?$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"{begins}: {len(found)} of them"
    return found[0]


def host_source(tile_m: int) -> str:
    """The kernel's text about masks between a stand-in for the GPU and a program that reads calls."""
    text = build.kernel_source("attention_hopper")
    pieces = [_piece(text, rf"struct {re.escape(name)} ") for name in STRUCTS]
    pieces.append(_piece(text, r"__device__ __forceinline__ Span seen_by\("))
    pieces.append(_piece(text, "struct PageSpan "))
    pieces += [_piece(text, rf"__device__ __forceinline__ \w+ {name}\(") for name in FUNCTIONS]
    pieces.append(_piece(text, r'extern "C" __global__ void __launch_bounds__\(PLAN_THREADS, 1\)'))
    assert "PLAN_THREADS = 256;" in text
    pieces = [piece.replace("__shared__ alignas(16)", "alignas(16) __shared__") for piece in pieces]  # as C++ has it
    return f"#define FLASHCORE_TILE_M {tile_m}\n" + HOST + "\n".join(pieces) + MAIN


@dataclass(frozen=True)
class Listed:
    """What the kernel that plans a call left in memory."""

    tiles: list[tuple[int, int, int]]
    """Sequence, head and number of each tile of the list."""
    taken: int
    """Tiles that blocks have taken."""
    behind: int
    """What lies behind the room for the list; -7 unless something was written there."""
    rows: str
    """A letter for each row of `out`: 0 for cleared, a dot for untouched."""


@dataclass(frozen=True)
class HostKernel:
    """The kernel's text about masks, as a program."""

    program: Path

    @classmethod
    def compile(cls, folder: Path, tile_m: int) -> HostKernel:
        source, program = folder / f"masks{tile_m}.cpp", folder / f"masks{tile_m}"
        source.write_text(host_source(tile_m))
        command = ["c++", "-std=c++20", "-O1", "-w", "-pthread", "-o", program, source]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]
        return cls(program)

    def _lines(self, calls: list[str]) -> list[str]:
        done = subprocess.run([self.program], input="\n".join(calls), capture_output=True, text=True)
        assert done.returncode == 0
        return done.stdout.splitlines()

    def page_spans(self, calls: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """`PageSpan` of (window_left, window_right, first_row, rows, tile_n, seqlen_q, seqlen_k): its four fields."""
        return [tuple(map(int, line.split())) for line in self._lines([f"s {' '.join(map(str, c))}" for c in calls])]

    def plans(self, calls: list[tuple[int, ...]]) -> list[Listed]:
        """What the kernel lists and clears for each call (see `plan` above)."""
        lines = self._lines([f"p {' '.join(map(str, call))}" for call in calls])
        found = []
        for listed, rows in zip(lines[::2], lines[1::2], strict=True):
            _, taken, behind, *numbers = map(int, listed.split())
            found.append(Listed(list(zip(*[iter(numbers)] * 3, strict=True)), taken, behind, rows))
        return found
