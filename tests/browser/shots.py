"""Pictures of a report page, for docs/ and for looking: python tests/browser/shots.py REPORT_DIR OUT_DIR [--whole]"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VIEWS = {"desktop": (1280, 900), "phone": (390, 844)}


def executable() -> str | None:
    """A Chromium of this machine; none is downloaded."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # No sandbox, for tests run as root in containers; the page is our own file.
        browser = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        yield browser
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--whole", action="store_true", help="the whole page and not its first screens")
    parsed = parser.parse_args()
    parsed.out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for view, (width, height) in VIEWS.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": height * 2}, color_scheme=scheme)
                page.goto((parsed.report / "index.html").resolve().as_uri())
                page.screenshot(path=parsed.out / f"report-{view}-{scheme}.png", full_page=parsed.whole)
                page.close()


if __name__ == "__main__":
    main()
