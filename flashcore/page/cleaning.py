"""Clean HTML that came from elsewhere, by a kept library: markup that shows something stays, all that acts is left out.

An executed notebook lies in a run's folder, where anybody may have written it; what it displays goes into a page that
is mailed around.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bleach.sanitizer import Cleaner
    from tinycss2.ast import Node

TAGS = frozenset(
    "a abbr b blockquote br caption circle clipPath code defs desc details div em figcaption figure g h1 "
    "h2 h3 h4 h5 h6 hr i img kbd li line linearGradient ol p path pattern polygon polyline pre rect s "
    "small span stop strong sub summary sup svg symbol table tbody td text tfoot th thead title tr tspan "
    "u ul use".split()
)
ATTRIBUTES = frozenset(
    "alt class clip-path colspan cx cy d data-label dx dy fill font-family font-size height id offset "
    "opacity points preserveAspectRatio r role rowspan rx ry scope stroke stroke-width tabindex "
    "text-anchor title transform viewBox width x x1 x2 xmlns y y1 y2".split()
)
PROPERTIES = frozenset(
    "background-color color fill fill-opacity fill-rule font-family font-size font-style font-weight "
    "opacity stroke stroke-dasharray stroke-dashoffset stroke-linecap stroke-linejoin stroke-miterlimit "
    "stroke-opacity stroke-width text-align text-anchor".split()
)
FUNCTIONS = frozenset("calc hsl hsla rgb rgba url var".split())
"""What a value of a style may call; a `url` only for a place on the page."""
ACTS = re.compile(r"<(script|style|iframe|object|template|noscript)\b.*?(</\1\s*>|\Z)", re.DOTALL | re.IGNORECASE)
"""Elements that go with all that is in them; of every other one that is not known the text stays."""


@functools.cache
def _cleaner() -> Cleaner:
    from bleach.css_sanitizer import CSSSanitizer
    from bleach.sanitizer import Cleaner

    class Styles(CSSSanitizer):
        """The library looks at the names of properties alone; here what they are set to counts as well."""

        def sanitize_css(self, style: str) -> str:
            import tinycss2

            known = tinycss2.parse_declaration_list(super().sanitize_css(style))
            return tinycss2.serialize([d for d in known if d.type == "declaration" and _stays(d.value)])

    styles = Styles(allowed_css_properties=PROPERTIES, allowed_svg_properties=PROPERTIES)
    return Cleaner(tags=TAGS, attributes=_may_have, protocols=["data"], css_sanitizer=styles, strip=True)


def _stays(tokens: Iterable[Node]) -> bool:
    """Whether a value of a style, as the CSS parser read it, asks for nothing from elsewhere."""
    for token in tokens:
        if token.type == "error" or (token.type == "url" and not token.value.startswith("#")):
            return False
        if token.type == "function":
            inner = token.arguments
            away = token.lower_name == "url" and not all(getattr(t, "value", "").startswith("#") for t in inner)
            if token.lower_name not in FUNCTIONS or away or not _stays(inner):
                return False
        elif hasattr(token, "content") and not _stays(token.content):
            return False
    return True


def _may_have(tag: str, name: str, value: str) -> bool:
    """Whether an element may keep an attribute; a link leads to a place on the page alone, a picture lies in it."""
    if name == "src":
        return tag == "img" and value.startswith("data:image/")
    if name in ("href", "xlink:href"):
        return tag in ("a", "use") and value.startswith("#")
    if name == "id":
        return not value.lower().startswith("fc-")  # the page's own, by which its script finds the records
    if name == "clip-path":
        return bool(re.fullmatch(r"url\(#[\w-]+\)", value))
    if name in ("fill", "stroke"):
        import tinycss2

        return _stays(tinycss2.parse_component_value_list(value))
    return name == "style" or name in ATTRIBUTES or name.startswith("aria-")


def cleaned(html: str) -> str:
    """HTML without scripts, frames, handlers, and links that lead away."""
    return _cleaner().clean(ACTS.sub("", html))
