"""Print a page to PDF by the Chromium that is there: the system's, or the one that Playwright installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashcore.errors import PrintError, ToolMissing
from flashcore.paths import folder_in, home
from flashcore.records import write_whole

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
"""Names under which a Chromium may lie on the path."""
PLAYWRIGHT = ("chromium-*/chrome-linux*/chrome", "chromium-*/chrome-mac*/Chromium.app/Contents/MacOS/Chromium",
              "chromium-*/chrome-win*/chrome.exe")  # fmt: skip
"""Where Playwright keeps its own, below its folder of browsers."""
NOBODY = 65534
"""User and group without rights, by the number that Linux gives them."""
TIMEOUT_S = 120.0
FIX = (
    "install Chromium or Chrome ('apt-get install chromium', or 'playwright install chromium'), or name one in "
    "FLASHCORE_CHROMIUM"
)


def browser() -> str | None:
    """The browser to print with: `FLASHCORE_CHROMIUM`, else one on the path, else Playwright's; None if there is none.

    An empty `FLASHCORE_CHROMIUM` means none at all.
    """
    if (named := os.environ.get("FLASHCORE_CHROMIUM")) is not None:
        return shutil.which(named) if named else None
    if found := next(filter(None, map(shutil.which, BROWSERS)), None):
        return found
    folder = folder_in("PLAYWRIGHT_BROWSERS_PATH") or home() / ".cache" / "ms-playwright"
    return next((str(path) for pattern in PLAYWRIGHT for path in sorted(folder.glob(pattern), reverse=True)), None)


def print_pdf(page: Path, pdf: Path) -> Path:
    """Print an HTML file, by its print style, and put the PDF in its place when it is whole.

    Raises
    ------
    ToolMissing
        There is no browser here.
    PrintError
        The browser failed, took too long, or made no PDF.
    """
    program = browser()
    if program is None:
        raise ToolMissing("A Chromium to print the page with", FIX)
    with tempfile.TemporaryDirectory(prefix="flashcore-pdf-") as folder:
        made = Path(folder) / "report.pdf"
        copy = Path(shutil.copyfile(page, Path(folder) / "report.html"))
        line = [
            program, "--headless", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-dev-shm-usage",
            "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
            f"--user-data-dir={folder}/profile", "--no-pdf-header-footer", "--generate-pdf-document-outline",
            f"--print-to-pdf={made}", copy.as_uri(),
        ]  # fmt: skip
        done = failed = None
        for attempt in _attempts(line, Path(folder)):
            try:
                done = subprocess.run(**attempt, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            except subprocess.TimeoutExpired:
                raise PrintError(
                    f"{program} took longer than {TIMEOUT_S:.0f} s to print {page} and was ended."
                ) from None
            except OSError as error:
                failed = error
                continue
            content = made.read_bytes() if made.is_file() else b""
            if content.startswith(b"%PDF-"):
                break
        else:
            if done is None:
                raise PrintError(f"{program} could not be started to print {page} ({failed.strerror}).") from failed
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]
            raise PrintError(f"{program} made no PDF of {page} (exit code {done.returncode}: {said}).")
    try:
        write_whole(pdf, content)
    except OSError as error:
        raise PrintError(f"The PDF {pdf} cannot be written ({error.strerror}).") from error
    return pdf


def _attempts(line: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Ways to start the browser, the best first: as this user in Chromium's sandbox.

    Chromium refuses to be sandboxed as root. There it runs as nobody, in the sandbox, and as root without one only
    where that does not work, as on a machine without such a user or with a browser that others may not read.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield {"args": line}
        return
    try:
        for path in (folder, *folder.iterdir()):
            os.chown(path, NOBODY, NOBODY)
        environment = {**os.environ, "HOME": str(folder)}
        yield {"args": line, "user": NOBODY, "group": NOBODY, "extra_groups": [], "env": environment}
    except OSError:
        pass
    yield {"args": [line[0], "--no-sandbox", *line[1:]]}
