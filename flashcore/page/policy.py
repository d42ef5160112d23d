"""Give a finished page the policy that a browser holds it to: only its own styles and scripts, nothing from elsewhere.

The Content-Security-Policy names the hash of each style and each script that the page was made with, so that a script
which came in by a record, a plug-in or a notebook does not run even where it was not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import re

STYLE = re.compile(r"<style\b[^>]*>(.*?)</style>", flags=re.DOTALL | re.IGNORECASE)
SCRIPT = re.compile(r"<script\b(?P<attributes>[^>]*)>(?P<text>.*?)</script>", flags=re.DOTALL | re.IGNORECASE)
TAG = re.compile(r"<[a-zA-Z][^<>]*?\sstyle=\"[^\"]*\"[^<>]*>")
WHOLE = re.compile(r"(<(?:style|script)\b.*?</(?:style|script)>)", flags=re.DOTALL | re.IGNORECASE)
"""Elements whose text is no markup."""


def secured(page: str) -> str:
    """A page with its policy in it; styles written at elements become classes, which a hash can cover.

    The policy stands behind the character set, or first of all in a page that names none.
    """
    page = _with_classes(page)
    styles = " ".join(sorted({_hash(text) for text in STYLE.findall(page)})) or "'none'"
    runs = {_hash(found["text"]) for found in SCRIPT.finditer(page) if _is_program(found["attributes"])}
    policy = (
        f"default-src 'none'; style-src {styles}; script-src {' '.join(sorted(runs)) or chr(39) + 'none' + chr(39)}; "
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


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _with_classes(page: str) -> str:
    """The page with a class in place of each `style` attribute, and one more style element that says what each is.

    A selector that names an id beside the class gives it the weight over other rules that an attribute has.
    """
    names: dict[str, str] = {}

    def classed(match: re.Match[str]) -> str:
        tag = match[0]
        style = re.search(r'\sstyle="([^"]*)"', tag)
        rules = style[1].strip()
        tag = tag.replace(style[0], "", 1)
        if not rules:
            return tag
        name = names.setdefault(rules, f"fc-i{len(names)}")
        own = re.search(r'\sclass="([^"]*)"', tag)
        if own:
            return tag.replace(own[0], f' class="{own[1]} {name}"', 1)
        end = re.match(r"<[a-zA-Z][\w:-]*", tag).end()
        return f'{tag[:end]} class="{name}"{tag[end:]}'

    parts = WHOLE.split(page)
    parts[::2] = [TAG.sub(classed, part) for part in parts[::2]]
    page = "".join(parts)
    if not names:
        return page
    rules = "\n".join(f":is(#fc-none, .{name}) {{ {_unescaped(text)} }}" for text, name in names.items())
    return page.replace("</head>", f"<style>{rules}</style>\n</head>", 1)


def _unescaped(text: str) -> str:
    """What stands in an attribute, as a style sheet has it; what could end a rule or the element is left out."""
    import html

    return re.sub(r"[{}<>]", "", html.unescape(text))
