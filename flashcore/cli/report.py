"""The commands that make pages: `flashcore report` and `flashcore render`. `add_to` puts them into the program."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from flashcore.cli import completing, spreading
from flashcore.cli.printing import errors, print_decision, say, shown
from flashcore.cli.spreading import ClusterOption, GpusOption, SchedulerOption, WorkersOption
from flashcore.paths import absolute_place


class Profile(StrEnum):
    """How much a report measures."""

    quick = "quick"
    full = "full"


class Audience(StrEnum):
    """For whom the page is."""

    leadership = "leadership"
    engineering = "engineering"


RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run's folder, its id, or the word 'latest'.", autocompletion=completing.run),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Folder that holds the run folders.  [default: reports/runs]")
]
AudienceOption = Annotated[
    Audience | None,
    typer.Option(help="leadership: details folded, notebooks left out; engineering: everything open.  "
                      "[default: everything, folded]"),
]  # fmt: skip
TitleOption = Annotated[str | None, typer.Option(help="Title of the page.  [default: FlashCore status report]")]
OrganisationOption = Annotated[str | None, typer.Option(help="Organisation, shown before the title.")]
LogoOption = Annotated[Path | None, typer.Option(help="A PNG, JPEG, WebP or SVG file of at most 200 KB to show.")]
SectionsOption = Annotated[
    str | None,
    typer.Option(metavar="A,B,...", help="Sections to show, out of decision, since, speed, correctness, questions, "
                                         "survey, paging, claims, fleet, evidence, provenance.  [default: all]",
                 autocompletion=completing.sections),
]  # fmt: skip
PdfOption = Annotated[bool, typer.Option("--pdf/--no-pdf", help="Print the page to report.pdf by Chromium.")]


def report(
    profile: Annotated[
        Profile | None, typer.Option(help="How much to measure.  [default: full with a GPU, quick without]")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="Backends to measure: 'all', or ids separated by commas, such as wmma,sdpa-cudnn.",
                     autocompletion=completing.backends),
    ] = None,
    problem: Annotated[
        list[str] | None,
        typer.Option(help="A preset or a label such as B=1,H=8,S=512,D=64; may be repeated.  [default: the profile's]",
                     autocompletion=completing.problem),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random input.  [default: 0]")] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="PART,...", help="Measure these parts of a run again and keep its rest: environment, "
                                              "bisection, survey, sweep, paging, model, proof, or names of "
                                              "notebooks."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Measure the parts of a run that did not finish, and keep its rest.")
    ] = False,
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="RUN", help="The run that --only or --resume is about.  [default: latest; with "
                                                  "--resume the one begun last]", autocompletion=completing.run)
    ] = None,
    later: Annotated[
        str | None,
        typer.Option("--later", metavar="PART,...", help="Leave these parts of a new run to --resume."),
    ] = None,
    within: Annotated[
        float | None,
        typer.Option("--within", metavar="SECONDS", help="What all of it may take: parts that do not fit are left to "
                                                         "--resume, and the page is made.")
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option("--kernel", metavar="FILE.py:FUNCTION", help="A function of yours, or MODULE:FUNCTION, to check, "
                                                                  "diagnose, time and judge beside the others.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="With --kernel: how it wants its tensors, bhsd or bshd.  [default: bhsd]")
    ] = None,
    lse: Annotated[
        str | None, typer.Option(help="With --kernel: what it returns beside its output, none, natural or log2.")
    ] = None,
    gpus: GpusOption = None,
    workers: WorkersOption = None,
    scheduler: SchedulerOption = None,
    cluster: ClusterOption = None,
    audience: AudienceOption = None,
    title: TitleOption = None,
    organisation: OrganisationOption = None,
    logo: LogoOption = None,
    sections: SectionsOption = None,
    pdf: PdfOption = True,
    out_dir: OutOption = None,
) -> None:  # fmt: skip
    """Measure, judge and render a report. Exit code 0: made; 1: made, but a notebook failed; 2: could not be made."""
    from flashcore.errors import FlashCoreError
    from flashcore.gpu import device
    from flashcore.pipeline import folders, redo, reporting

    variant = _variant(audience, title, organisation, logo, sections)
    given: dict[str, Any] = {"profile": profile and profile.value, "backends": backend, "seed": seed,
                             "problems": ";".join(problem) if problem else None}  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if run is not None and only is None and not resume:
        raise FlashCoreError(
            "--run names the run that --only PART does again, or --resume ends; 'flashcore report' alone makes a new "
            "run."
        )
    if later is not None and not later.strip():
        raise FlashCoreError("--later names no part; name one, or leave the option out.")
    if later is not None and (resume or only is not None):
        raise FlashCoreError("--later leaves parts of a new run to --resume; leave --only and --resume out.")
    if resume and only is not None:
        raise FlashCoreError("--resume measures all parts that did not finish; leave it or --only out.")
    if resume and given:
        raise FlashCoreError(
            "--resume goes on as the run was begun; leave --profile, --backend, --problem, --seed out."
        )
    err = errors()
    common: dict[str, Any] = {"variant": variant, "pdf": pdf, "within_s": within}
    common["progress"] = lambda line: err.print(escape(line))
    if kernel is None and (layout is not None or lse is not None):
        raise FlashCoreError("--layout and --lse say how the function of --kernel is called; name it by --kernel too.")
    if kernel is not None and (scheduler is not None or cluster is not None):
        raise FlashCoreError(
            "The function of --kernel lies on this machine, and workers of --scheduler and --cluster run elsewhere; "
            "use --gpus, or leave one of the two out."
        )
    begun = None
    if resume:
        begun = reporting.find_run(run, out_dir) if run is not None else folders.newest_run(out_dir)
    elif only is not None:
        begun = reporting.find_run("latest" if run is None else run, out_dir)
    told = (begun and redo.kernel_of(begun)) or {}
    layout = told.get("layout") or "bhsd" if layout is None else layout
    lse = told.get("lse") if lse is None else lse
    with contextlib.ExitStack() as stack:
        adopted = stack.enter_context(_adopted(kernel, layout, lse))
        if begun is not None:
            redo.refuse_other_kernel(begun, adopted)  # before workers are started
        named = {"gpus": gpus, "workers": workers, "scheduler": scheduler, "cluster": cluster}
        pool = stack.enter_context(spreading.spread(err, **named))
        if pool is not None:
            common |= {"places": pool.places, "bars": not err.is_terminal}
        if resume:
            result = redo.resume(begun, kernel=adopted, **common)
        elif only is not None:
            result = redo.redo(begun, only, changes=given, kernel=adopted, **common)
        else:
            defaults = {"profile": "full" if device.has_gpu() else "quick", "backends": "all", "problems": "default",
                        "seed": 0}  # fmt: skip
            result = reporting.report(**{**defaults, **given}, out=out_dir, later=later or "", kernel=adopted, **common)
    print_decision(result.decision)
    for name, reason in result.failed.items():
        say(f"Notebook {name} did not finish: {escape(reason)}")
    _say_pdf(result.pdf, result.no_pdf)
    say(f"Report: {escape(shown(result.html))}")
    raise typer.Exit(1 if result.failed else 0)


@contextlib.contextmanager
def _adopted(kernel: str | None, layout: str, lse: str | None) -> Iterator[dict[str, Any] | None]:
    """The function as a backend of every process that is started inside; None for none."""
    if kernel is None:
        yield None
        return
    from flashcore.bisection.diagnosis import write_plugin

    place = absolute_place(kernel)
    before = os.environ.get("FLASHCORE_PLUGINS")
    with tempfile.TemporaryDirectory(prefix="flashcore-kernel-") as folder:
        backend = write_plugin(Path(folder), place, layout=layout, lse=lse)
        os.environ["FLASHCORE_PLUGINS"] = os.pathsep.join(filter(None, [before, folder]))
        try:
            yield {"backend": backend, "place": place, "layout": layout, "lse": lse}
        finally:
            if before is None:
                os.environ.pop("FLASHCORE_PLUGINS", None)
            else:
                os.environ["FLASHCORE_PLUGINS"] = before


def render(
    run: RunArgument = "latest",
    audience: AudienceOption = None,
    title: TitleOption = None,
    organisation: OrganisationOption = None,
    logo: LogoOption = None,
    sections: SectionsOption = None,
    pdf: PdfOption = True,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Write the page there, and leave the run as it is.")
    ] = None,
    out_dir: OutOption = None,
) -> None:
    """Make a run's page and PDF again from its records; needs no GPU and measures nothing."""
    from flashcore.decision import seal
    from flashcore.errors import NotebookFailed
    from flashcore.pipeline import folders, rendering, reporting

    variant = _variant(audience, title, organisation, logo, sections)
    found = reporting.find_run(run, out_dir)
    if to is None:
        folders.refuse_recorded(found)
    try:
        if to is not None:
            page, printed, why = rendering.render_to(found, to, variant=variant, pdf=pdf)
        else:
            page = reporting.render(found, variant=variant)
            printed, why = reporting.print_page(found) if pdf else (None, "")
            seal.seal_pages(found)
    except NotebookFailed as error:
        errors().print(escape(str(error)))
        raise typer.Exit(1) from None
    _say_pdf(printed, why)
    say(seal.check(found).sentence)
    say(f"Report: {escape(shown(page))}")


def _variant(audience, title, organisation, logo, sections):
    from flashcore import page

    return page.variant(
        audience=audience and audience.value, title=title, organisation=organisation, logo=logo, sections=sections
    )


def _say_pdf(printed: Path | None, why_not: str) -> None:
    if printed is not None:
        say(f"PDF: {escape(shown(printed))}")
    elif why_not:
        say(escape(why_not))


def add_to(app: typer.Typer) -> None:
    """Put the commands into the program."""
    app.command()(report)
    app.command()(render)
