"""Which page is wanted, and a clear error for one that cannot be made."""

from __future__ import annotations

import pytest

from flashcore import page
from flashcore.errors import PageError, UnknownName
from flashcore.page.variants import MOST_LOGO_BYTES

PIXEL = bytes.fromhex("89504e470d0a1a0a0000000d49484452")


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        ({"sections": "speed,sped"}, UnknownName, "no section 'sped'.*decision, since, speed"),
        ({"sections": " , "}, PageError, "No section is named.*decision"),
        ({"audience": "everybody"}, UnknownName, "leadership, engineering"),
        ({"title": "  "}, PageError, "title is empty"),
    ],
)
def test_a_page_that_does_not_exist_is_refused_with_what_does(words, error, said):
    with pytest.raises(error, match=said):
        page.variant(**words)


@pytest.mark.parametrize(
    ("content", "mime"),
    [
        (PIXEL, "image/png"),
        (b"\xff\xd8\xff\xe0 rest", "image/jpeg"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "image/webp"),
        (b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="x"></svg>', "image/svg+xml"),
        (b"<svg/>", "image/svg+xml"),
    ],
)
def test_a_logo_is_embedded_by_what_it_is(tmp_path, content, mime):
    path = tmp_path / "logo.txt"
    path.write_bytes(content.replace(b"<svg/>", b"<svg >"))
    assert page.variant(logo=path).logo.startswith(f"data:{mime};base64,")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GIF89a", "no PNG, JPEG"),
        (b"", "no PNG"),
        (b"<html><svg>", "no PNG"),
        (PIXEL * 20_000, "200,000"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_logo_is_one_clear_error(tmp_path, content, said):
    path = tmp_path / "logo.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PageError, match=said):
        page.variant(logo=path)
    assert MOST_LOGO_BYTES == 200_000
    with pytest.raises(PageError):
        page.variant(logo=tmp_path)


def test_leadership_gets_no_executed_notebooks_and_engineering_does():
    assert not page.Variant(audience="leadership").has("evidence") and page.Variant(audience="engineering").has(
        "evidence"
    )
    assert page.opened('<details class="a"><details open>') == '<details open class="a"><details open>'
