"""The command line: a module for each group of commands, put together in `program`.

A command reads its arguments, calls the function that does the work, prints the result, and ends with an exit code.
`printing` holds what several commands print alike.
"""

from flashcore.cli.program import app, main

__all__ = ["app", "main"]
