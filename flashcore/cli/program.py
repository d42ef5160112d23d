"""Put the command line together, and hold `flashcore build` and `doctor`; the work is done elsewhere."""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from flashcore import __version__
from flashcore.cli import (
    claims,
    compare,
    completing,
    conform,
    debug,
    diagnose,
    exploits,
    fleet,
    invariance,
    lab,
    model,
    paging,
    printing,
    report,
    survey,
    verdict,
)  # fmt: skip
from flashcore.cli.printing import console, errors, say
from flashcore.errors import FlashCoreError, did_you_mean
from flashcore.paths import set_home

USAGE_ERROR, INTERRUPTED = 2, 130
_UsageError = typer.BadParameter.__bases__[0]
"""Click's, which newer releases of typer bring themselves."""


class _Ended(KeyboardInterrupt):
    """The process was asked to end by a signal other than that of Ctrl-C."""

    def __init__(self, number: int):
        self.code = 128 + number
        super().__init__()


def _end(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # whoever asks a second time is not made to wait
    raise _Ended(number)


def _end_in_order() -> None:
    """Let what stops a job or closes a terminal end a command as Ctrl-C does, workers, jobs and folders included."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup wants to be left alone
            signal.signal(number, _end)


class _Group(TyperGroup):
    """Turns an error made on purpose into one sentence on stderr, without a traceback, and an exit code."""

    def resolve_command(self, ctx, args):
        try:
            return super().resolve_command(ctx, args)
        except _UsageError as error:
            hint = did_you_mean(args[0], self.list_commands(ctx)) if args else ""
            if hint and "Did you mean" not in error.message:  # newer releases of typer ask it themselves
                error.message = f"{error.message} {hint}"
            raise

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except FlashCoreError as error:
            if os.environ.get("FLASHCORE_DEBUG"):
                raise
            errors().print(escape(str(error)))
            raise typer.Exit(USAGE_ERROR) from None
        except KeyboardInterrupt as error:
            errors().print("Interrupted; records written so far are kept in the run's folder.")
            raise typer.Exit(error.code if isinstance(error, _Ended) else INTERRUPTED) from None


app = typer.Typer(
    name="flashcore",
    cls=_Group,
    help="Check, time and judge attention kernels for Hopper GPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"flashcore {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="FLASHCORE_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    if debug:
        os.environ["FLASHCORE_DEBUG"] = "1"


@app.command()
def build(
    kernel: Annotated[
        str | None,
        typer.Option(
            "--kernel",
            help="Kernels to compile, separated by commas.  [default: all]",
            autocompletion=completing.kernels,
        ),
    ] = None,
    cached: Annotated[
        bool, typer.Option("--cached", help="Show also the variants that were compiled before and are up to date.")
    ] = False,
) -> None:
    """Compile the kernels and show what the compiler made of them; needs no GPU. Exit code 1: one did not compile."""
    from flashcore.gpu.build import build_all

    kernels = None if kernel is None else [name.strip() for name in kernel.split(",")]
    err = errors()
    with err.status("Compiling ...") as status:
        if err.is_terminal:
            trials = build_all(lambda what: status.update(f"Compiling {escape(what)} ..."), kernels=kernels)
        else:
            trials = build_all(lambda what: err.print(f"Compiled {escape(what)}"), kernels=kernels)
    told = [trial for trial in trials if cached or not trial.data.get("cached")]
    if not told:
        say(f"{len(trials)} variants are up to date.")
        return
    table = Table(title="Kernels, compiled for sm_90a")
    table.add_column("Kernel", no_wrap=True)
    table.add_column("Variant", no_wrap=True)
    for column in ("Registers", "Spilled bytes", "Shared bytes"):
        table.add_column(column, justify="right")
    table.add_column("Tensor Core SASS", no_wrap=True)
    table.add_column("Compile time", justify="right", no_wrap=True)
    for trial in told:
        d = trial.data
        names = [escape(str(d["kernel"])), f"D={d['head_dim']} {d['dtype']}{' traced' if d['trace'] else ''}"]
        if trial.status == "ok":
            took = f"{d['compile_seconds']:.2f} s{', cached' if d['cached'] else ''}"
            figures = [str(d["registers"]), str(d["spill_bytes"]), str(d["shared_bytes"]), _instructions(d), took]
        else:
            figures = ["", "", "", "did not compile", ""]
        table.add_row(*names, *figures)
    console().print(table)
    broken = [trial for trial in trials if trial.status != "ok"]
    for reason in dict.fromkeys(trial.reason for trial in broken):
        err.print(escape(reason or "A kernel did not compile."))
    for warning in dict.fromkeys(f"{t.data['kernel']}: {w}" for t in told for w in t.data.get("warnings") or []):
        err.print(f"The compiler warns of {escape(warning)}")
    raise typer.Exit(1 if broken else 0)


def _instructions(data: dict) -> str:
    counts = data["tensor_instructions"]
    if counts is None:
        return "no nvdisasm to read it"
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


@app.command()
def doctor() -> None:
    """Say what works on this machine, what is missing, and what mends it. Exit code 1: not even the CPU can report."""
    from flashcore.cli import peers
    from flashcore.gpu.device import COMPILER, checks

    found = [*checks(), *peers.checks()]
    table = Table(title="What FlashCore found on this machine")
    for column in ("Part", "State", "Detail", "To mend it"):
        table.add_column(column, overflow="fold")
    for check in found:
        state = "works" if check.ok else ("MISSING" if check.needed else "not here")
        table.add_row(escape(check.name), state, escape(check.detail), "" if check.ok else escape(check.fix))
    console().print(table)
    missing = [check.name for check in found if check.needed and not check.ok]
    if missing:
        say(f"Reports cannot be made here until this is mended: {escape(', '.join(missing))}.")
        raise typer.Exit(1)
    if any(check.name == COMPILER and not check.ok for check in found):
        say(f"No kernel can be compiled here: a report can be made, and it stays INCONCLUSIVE without {COMPILER}.")
    if any(check.name == "GPU" and check.ok for check in found):
        say("Reports can be made here, with live GPU figures.")
    else:
        say("Reports can be made here on the CPU; GPU evidence comes from recorded runs, labelled so.")


report.add_to(app)
verdict.add_to(app)
debug.add_to(app)
diagnose.add_to(app)
conform.add_to(app)
invariance.add_to(app)
exploits.add_to(app)
survey.add_to(app)
paging.add_to(app)
model.add_to(app)
claims.add_to(app)
compare.add_to(app)
fleet.add_to(app)
lab.add_to(app)


def main() -> None:
    """Run the command line and end the process with its exit code."""
    _end_in_order()
    set_home()
    printing.settle()
    app(prog_name="flashcore")


if __name__ == "__main__":
    main()
