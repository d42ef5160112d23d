"""Give a finished page the policy that a browser holds it to: only its own styles and scripts, nothing from elsewhere.

The Content-Security-Policy names the hash of each style and each script that the page was made with, so that a script
which came in by a record, a plug-in or a notebook does not run even where it was not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Collection

STYLE = re.compile(r"<style\b[^>]*>(.*?)</style>", flags=re.DOTALL | re.IGNORECASE)
SCRIPT = re.compile(r"<script\b(?P<attributes>[^>]*)>(?P<text>.*?)</script>", flags=re.DOTALL | re.IGNORECASE)
_NAME, _VALUE = r"""[^\s"'<>/=]+""", r"""(?:"[^"]*"|'[^']*'|[^\s"'<>=`]+)"""
ATTRIBUTE = re.compile(rf"\s+({_NAME})(?:\s*=\s*({_VALUE}))?")
MARKUP = re.compile(
    r"<(?P<whole>style|script)\b.*?</(?P=whole)\s*>|<!--.*?-->|"
    rf"<[a-z][\w:-]*(?P<attributes>(?:\s+{_NAME}(?:\s*=\s*{_VALUE})?)*+)\s*/?>",
    flags=re.DOTALL | re.IGNORECASE,
)
"""A tag, or first of all an element or a comment whose text is no markup. A value in quotes may hold anything."""


def secured(page: str, *, scripts: Collection[str] = ()) -> str:
    """A page with its policy in it; styles written at elements become classes, which a hash can cover.

    The policy stands behind the character set, or first of all in a page that names none.

    Parameters
    ----------
    scripts
        The page's own programs. One that stands in the page and is none of them gets no hash, and styles get one in
        the page's head alone: whatever came in below it was not written by the page.
    """
    page = _with_classes(page)
    own = {text.strip() for text in scripts}
    styles = sorted({_hash(text) for text in STYLE.findall(page.partition("</head>")[0])})
    runs = sorted({
        _hash(found["text"])
        for found in SCRIPT.finditer(page)
        if _is_program(found["attributes"]) and found["text"].strip() in own
    })  # fmt: skip
    policy = (
        f"default-src 'none'; style-src {_sources(styles)}; script-src {_sources(runs)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    head = re.search(r"<meta charset=[^>]*>", page)
    at = head.end() if head else 0
    return f"{page[:at]}\n{meta}{page[at:]}"


def _is_program(attributes: str) -> bool:
    """Whether a script element is run, and not data that lies in the page."""
    found = re.search(r'\btype="([^"]*)"', attributes)
    return found is None or found[1] in ("", "module", "text/javascript", "application/javascript")


def _sources(hashes: list[str]) -> str:
    return " ".join(hashes) or "'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _with_classes(page: str) -> str:
    """The page with a class in place of each `style` attribute, and one more style element that says what each is.

    A selector that names an id beside the class gives it the weight over other rules that an attribute has.
    """
    names: dict[str, str] = {}

    def classed(match: re.Match[str]) -> str:
        tag, given = match[0], match["attributes"]
        found = {} if given is None else _attributes(given)
        if "style" not in found:
            return tag
        rules = found.pop("style").strip()
        if rules:
            name = names.setdefault(rules, f"fc-i{len(names)}")
            found = {"class": f"{found.pop('class', '')} {name}".strip(), **found}
        start, end = (at - match.start() for at in match.span("attributes"))
        kept = "".join(f" {name}" if value is None else f' {name}="{value}"' for name, value in found.items())
        return f"{tag[:start]}{kept}{tag[end:]}"

    page = MARKUP.sub(classed, page)
    if not names:
        return page
    rules = "\n".join(f":is(#fc-none, .{name}) {{ {_unescaped(text)} }}" for text, name in names.items())
    return page.replace("</head>", f"<style>{rules}</style>\n</head>", 1)


def _attributes(text: str) -> dict[str, str | None]:
    """Attributes as written in a tag, with what stands between the quotes; of two by one name the first counts."""
    found: dict[str, str | None] = {}
    for name, value in ATTRIBUTE.findall(text):
        known = name.lower() if name.lower() in ("style", "class") else name
        inner = value[1:-1] if value[:1] in ("'", '"') else value
        found.setdefault(known, inner.replace('"', "&quot;") if value else None)
    return found


def _unescaped(text: str) -> str:
    """What stands in an attribute, as a style sheet has it; what could end a rule or the element is left out."""
    import html

    return re.sub(r"[{}<>]", "", html.unescape(text))
