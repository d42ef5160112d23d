"""Measure a backend: is it right (`check`), the same every time (`determinism`), and how fast (`timing`, `sweep`).

Each function makes one record for each measurement; `ceilings` measures what the machine could reach at best, and
`watching` reads its sensors meanwhile; `cards` measures each card of a fleet by one short list, and `workloads` lists
the problems with masks; `screening` tries packages of others in processes that may die. Where a kernel that `check`
calls wrong goes wrong is a question for `flashcore.bisection`.

Two rooms lie within: `cluster` computes lists of such trials on whatever workers there are, and `exploits` plants ways
to look fast or right, to prove that what measures and judges sees through them.
"""

__all__ = [
    "cards", "ceilings", "check", "cluster", "determinism", "exploits", "sweep", "timing", "watching", "workloads",
]  # fmt: skip
