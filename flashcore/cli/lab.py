"""The command line's way into JupyterLab: `flashcore lab`. `add_to` puts it into the program."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import typer
from rich.markup import escape

from flashcore.cli.printing import say, shown
from flashcore.errors import ToolMissing


def lab(context: typer.Context) -> None:
    """Open copies of the notebooks in JupyterLab; what is saved there reaches no report.

    Further arguments go to JupyterLab, as in 'flashcore lab --no-browser --port 9000'. Exit code: JupyterLab's.
    """
    from flashcore.pipeline import workbench

    if importlib.util.find_spec("jupyterlab") is None:
        raise ToolMissing("JupyterLab", "pip install 'flashcore[lab]'")
    folder, remarks = workbench.lay_out()
    for remark in remarks:
        say(escape(remark))
    say(f"Copies to work in: {escape(shown(folder))}")
    line = [sys.executable, "-m", "jupyter", "lab", f"--notebook-dir={folder}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        line.append("--allow-root")  # the server refuses root otherwise, and in a container there is nobody else
    try:
        code = subprocess.run([*line, *context.args], check=False).returncode
    except KeyboardInterrupt:
        code = 0  # how a server is ended
    raise typer.Exit(code)


def add_to(app: typer.Typer) -> None:
    """Put the command into the program."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(lab)
