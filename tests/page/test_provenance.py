"""Where the figures come from, and the commands that make them again."""

from __future__ import annotations

from flashcore.page.provenance import command


def test_the_command_names_what_is_not_the_default():
    given = {"profile": "quick", "backends": "all", "problems": "tiny;report", "seed": 0}
    assert command({"parameters": given}) == "make report PROFILE=quick PROBLEM='tiny;report'"
    assert command({}) == command({"parameters": "odd"}) == "make report"
