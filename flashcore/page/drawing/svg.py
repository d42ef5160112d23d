"""Put a matplotlib figure into a page: inline SVG that follows light and dark, with its message as text alternative."""

from __future__ import annotations

import html
import io
import json
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import quote, unquote

import matplotlib
from markupsafe import escape
from matplotlib.artist import Artist
from matplotlib.figure import Figure

COLOURS = {
    "ink": "#1b2026",
    "muted": "#5a6370",
    "grid": "#dfe3e8",
    "target": "#a8123e",
    "s1": "#0a5fb0",
    "s2": "#b54708",
    "s3": "#00735c",
    "s4": "#8a3f9e",
    "s5": "#7a5c00",
    "s6": "#6b4226",
    "p1": "#59636f",
    "p2": "#5a6470",
    "p3": "#5b6571",
    "p4": "#5c6672",
}
"""Colours of plots by name, as seen on white. In a page each is the CSS variable ``--fc-<name>`` with this fallback, so
every value is unlike the others. `s` are our backends (told apart by colour-blind readers too, and never by colour
alone), `p` are peers."""

FONT_SIZE = 13.0
"""Points in a figure 480 units wide; the page shows it between 0.7 and 1.1 of that."""


_pen = threading.RLock()
"""Held while a plot is drawn: matplotlib's settings are the process's, and two pages may be drawn at once."""


@contextmanager
def style() -> Iterator[None]:
    """The look of every plot: no box, light grid, text as text. One thread at a time is inside."""
    import seaborn

    rc = {
        **seaborn.axes_style("ticks"),
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",
        "font.size": FONT_SIZE,
        "axes.titlesize": FONT_SIZE + 1,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": FONT_SIZE,
        "axes.edgecolor": COLOURS["muted"],
        "axes.labelcolor": COLOURS["muted"],
        "axes.titlecolor": COLOURS["ink"],
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": COLOURS["grid"],
        "grid.linewidth": 0.8,
        "text.color": COLOURS["ink"],
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["muted"],
        "xtick.labelsize": FONT_SIZE - 1,
        "ytick.labelsize": FONT_SIZE - 1,
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
    }
    with _pen, matplotlib.rc_context(rc):
        yield


MOST_LETTERS = 26
"""Of a name in a figure: beyond them it would push the plot itself out of its own frame."""


def named(name: str) -> str:
    """A name as it stands in a figure: one that is too long keeps its beginning and end, and a dollar is no formula."""
    shown = name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 11]}…{name[-10:]}"
    return shown.replace("$", r"\$")


TIPS = "tips:"
"""How the id of what carries tooltips begins, until `figure_html` has put them into its points."""


def with_tips(line: Artist, words: Sequence[str]) -> None:
    """Say what each of a line's points is: its value and its spread, for whoever points at it.

    Parameters
    ----------
    line
        As `Axes.plot` gives it, with a marker at each of its points.
    words
        One sentence a point, in the points' order.
    """
    line.set_gid(TIPS + quote(json.dumps(list(words))))


def _tipped(body: str) -> str:
    """The body of an SVG with the words of `with_tips` in a ``<title>`` inside each point."""
    parts = re.split(rf'<g id="{TIPS}([^"]*)">', body)
    found = [parts[0]]
    for words, rest in zip(parts[1::2], parts[2::2], strict=True):
        waiting = iter(json.loads(unquote(words)))

        def titled(use: re.Match[str], waiting: Iterator[str] = waiting) -> str:
            said = next(waiting, None)
            return use[0] if said is None else f"<use{use[1]}><title>{html.escape(said)}</title></use>"

        found.append("<g>" + re.sub(r"<use\b([^>]*?)\s*/>", titled, rest))
    return "".join(found)


def titled(figure: Figure, title: str, message: str, alt: str) -> str:
    """A figure with its title, and beside it in a sentence what it shows; `alt` as in `figure_html`."""
    return (
        f'<figure class="fc-figure"><figcaption><strong>{escape(title)}</strong> {escape(message)}</figcaption>'
        f"{figure_html(figure, alt)}</figure>"
    )


def figure_html(figure: Figure, alt: str, *, caption: str | None = None) -> str:
    """A figure as one inline ``<svg role="img">``, fit for a page that makes no request.

    Parameters
    ----------
    figure
        Drawn inside `style`, in colours from `COLOURS`.
    alt
        What the plot says, numbers included, for a reader who does not see it.
    caption
        Shown under the plot; without one the SVG comes without a ``<figure>`` around it.
    """
    buffer = io.StringIO()
    with _pen, matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    view_box = re.search(r'viewBox="([^"]+)"', text)[1]
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<\?xml.*?\?>|<!--.*?-->|<!DOCTYPE.*?>|<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r'<style type="text/css">.*?</style>', "", body, flags=re.S)
    body = _tipped(body.replace("xlink:href", "href"))
    body = _rename_ids(body)
    body = re.sub(r"font-family:[^;\"]*;?\s*", "", body)
    body = re.sub(r"font:\s*((?:[a-z]+\s+|\d+\s+)*)([\d.]+px)[^;\"]*", _font, body)
    body = re.sub(r"(?<![#\w])-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), body)
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--fc-{name},{colour})")
    body = re.sub(r"(?:#000000|\bblack\b)", "currentColor", body)
    body = re.sub(r">\s+<", "><", body).strip()
    body = re.sub(r"\n\s*", " ", body)
    message = html.escape(alt, quote=True)
    svg = (
        f'<svg class="fc-plot" role="img" aria-label="{message}" viewBox="{view_box}" '
        f'xmlns="http://www.w3.org/2000/svg" font-family="var(--fc-font,system-ui,sans-serif)">{body}</svg>'
    )
    if caption is None:
        return svg
    return f'<figure class="fc-figure">{svg}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _font(match: re.Match) -> str:
    weight = match[1].strip()
    return f"{'font-weight: ' + weight + '; ' if weight else ''}font-size: {match[2]}"


def _rename_ids(body: str) -> str:
    """Drop the ids nothing refers to, and make the others unlike those of every other figure on the page."""
    used = set(re.findall(r"url\(#([^)]+)\)", body)) | set(re.findall(r'href="#([^"]+)"', body))
    prefix = f"f{secrets.token_hex(4)}-"
    names = {old: f"{prefix}{number}" for number, old in enumerate(sorted(used))}
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", body)
    body = re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{names[m[1]]})", body)
    return re.sub(r'href="#([^"]+)"', lambda m: f'href="#{names[m[1]]}"', body)
