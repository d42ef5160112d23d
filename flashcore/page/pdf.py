"""Print a page to PDF by the Chromium that is there: the system's, or the one that Playwright installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from flashcore.errors import PrintError, ToolMissing
from flashcore.records import write_whole

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
"""Names under which a Chromium may lie on the path."""
PLAYWRIGHT = ("chromium-*/chrome-linux*/chrome", "chromium-*/chrome-mac*/Chromium.app/Contents/MacOS/Chromium",
              "chromium-*/chrome-win*/chrome.exe")  # fmt: skip
"""Where Playwright keeps its own, below its folder of browsers."""
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
    home = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")
    return next((str(path) for pattern in PLAYWRIGHT for path in sorted(home.glob(pattern), reverse=True)), None)


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
        line = [
            program, "--headless", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-dev-shm-usage",
            "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
            f"--user-data-dir={folder}/profile", "--no-pdf-header-footer", "--generate-pdf-document-outline",
            f"--print-to-pdf={made}", page.resolve().as_uri(),
        ]  # fmt: skip
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            line.insert(1, "--no-sandbox")  # Chromium refuses to run as root with one; the page is our own file
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise PrintError(f"{program} took longer than {TIMEOUT_S:.0f} s to print {page} and was ended.") from None
        except OSError as error:
            raise PrintError(f"{program} could not be started to print {page} ({error.strerror}).") from error
        content = made.read_bytes() if made.is_file() else b""
        if not content.startswith(b"%PDF-"):
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]
            raise PrintError(f"{program} made no PDF of {page} (exit code {done.returncode}: {said}).")
    try:
        write_whole(pdf, content)
    except OSError as error:
        raise PrintError(f"The PDF {pdf} cannot be written ({error.strerror}).") from error
    return pdf
