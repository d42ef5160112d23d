"""Measure a backend: is it right (`check`), the same every time (`determinism`), and how fast (`timing`, `sweep`).

Each function makes records, one a measurement; `ceilings` measures what the machine could reach at best. What is wrong
with a kernel that `check` calls wrong is the question of `flashcore.bisection`.
"""

__all__ = ["ceilings", "check", "determinism", "sweep", "timing"]
