"""Which page is wanted: for whom, under which title and logo, with which sections. Refuses what cannot be made."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flashcore.errors import PageError, UnknownName

SECTIONS = (
    "decision", "since", "speed", "correctness", "questions", "survey", "paging", "claims", "fleet", "evidence",
    "provenance",
)  # fmt: skip
"""The page's sections under the names that choose them, in the page's order. The verdict and the four figures are no
section: they are always there."""
OF_THE_TEMPLATE = ("fleet", "evidence", "provenance")
"""Those that the template makes of records and executed notebooks; the others are cells of the status report."""
SHORT = {
    "decision": "Decision", "since": "Last run", "speed": "Speed", "correctness": "Correctness",
    "questions": "Questions", "survey": "cuBLASLt", "paging": "Paging", "claims": "Claims", "fleet": "Fleet",
    "evidence": "Evidence", "provenance": "Provenance",
}  # fmt: skip
"""What the navigation calls them."""
AUDIENCES = ("leadership", "engineering")
MOST_LOGO_BYTES = 200_000
"""A logo is embedded, and the page stays under 2 MB."""
PICTURES = (
    (rb"\x89PNG\r\n\x1a\n", "image/png"),
    (rb"\xff\xd8\xff", "image/jpeg"),
    (rb"RIFF....WEBP", "image/webp"),
    (rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*(?:<!DOCTYPE[^>]*>\s*)?<svg[\s>]", "image/svg+xml"),
)
"""How the kinds of picture that a browser shows begin; what a file is called proves nothing."""


@dataclass(frozen=True)
class Variant:
    """How a page is made; the default has everything, with the details folded."""

    audience: Literal["leadership", "engineering"] | None = None
    """`leadership`: without the executed notebooks, details folded; `engineering`: all details open."""
    title: str = "FlashCore status report"
    organisation: str = ""
    """Shown above the title and named as the file's author."""
    logo: str = ""
    """A picture as a data URI, see `embedded`."""
    sections: tuple[str, ...] = SECTIONS

    def __post_init__(self):
        if self.audience not in (None, *AUDIENCES):
            raise UnknownName("audience", str(self.audience), list(AUDIENCES))
        for name in self.sections:
            if name not in SECTIONS:
                raise UnknownName("section", name, list(SECTIONS))

    def has(self, section: str) -> bool:
        """Whether the page holds a section, by its name."""
        return section in self.sections and not (section == "evidence" and self.audience == "leadership")


def variant(
    *,
    audience: str | None = None,
    title: str | None = None,
    organisation: str | None = None,
    logo: Path | None = None,
    sections: str | None = None,
) -> Variant:
    """A variant from the words of the command line; what is None keeps its default.

    Parameters
    ----------
    logo
        A PNG, JPEG, WebP or SVG file of at most `MOST_LOGO_BYTES`.
    sections
        Names out of `SECTIONS`, separated by commas; the page keeps its own order.

    Raises
    ------
    UnknownName
        There is no such audience or section; names those there are.
    PageError
        The logo cannot be read, is too large, or is no picture; the list of sections or the title is empty.
    """
    given = {"audience": audience, "organisation": _line(organisation), "logo": embedded(logo) if logo else None}
    if title is not None:
        given["title"] = _line(title)
        if not given["title"]:
            raise PageError("The page's title is empty; give one in --title, or leave the option out.")
    if sections is not None:
        wanted = tuple(filter(None, (name.strip() for name in sections.split(","))))
        if not wanted:
            raise PageError(f"No section is named; choose from: {', '.join(SECTIONS)}.")
        given["sections"] = wanted
    return Variant(**{name: value for name, value in given.items() if value is not None})


def embedded(path: Path) -> str:
    """A picture as a data URI."""
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MOST_LOGO_BYTES else b""
    except OSError as error:
        raise PageError(f"The logo {path} cannot be read ({error.strerror}); name a picture file.") from error
    if size > MOST_LOGO_BYTES:
        raise PageError(
            f"The logo {path} has {size:,} bytes and may have {MOST_LOGO_BYTES:,}, since it goes into the page; "
            "make it smaller."
        )
    mime = next((mime for start, mime in PICTURES if re.match(start, content, flags=re.DOTALL)), None)
    if mime is None:
        raise PageError(f"The logo {path} is no PNG, JPEG, WebP or SVG picture; convert it to one.")
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _line(text: str | None) -> str | None:
    """Text on one line."""
    return None if text is None else " ".join(text.split())
