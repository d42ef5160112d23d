"""Measure a backend: is it right (`check`), the same every time (`determinism`), and how fast (`timing`, `sweep`).

Each function makes one record for each measurement; `ceilings` measures what the machine could reach at best, and
`watching` reads its sensors meanwhile; `cards` measures each card of a fleet by one short list, and `workloads` lists
the problems with masks. Where a kernel that `check` calls wrong goes wrong is a question for `flashcore.bisection`.
"""

__all__ = ["cards", "ceilings", "check", "determinism", "sweep", "timing", "watching", "workloads"]
