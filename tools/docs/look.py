"""Look at the built site in a browser: every page at desktop and phone width, opened from the disk.

python tools/docs/look.py build/site [--shots DIR PAGE…]

Ends with 1 where a page is wider than the screen, asks for anything but its own files, or complains in the console; and
where the search finds nothing. --shots: pictures of these pages too, in light and dark.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/browser"))
from shots import VIEWS, chromium

WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def faults(browser: Browser, site: Path) -> list[str]:
    """A line for whatever is wrong."""
    wrong: list[str] = []
    for view, (width, height) in VIEWS.items():
        page = browser.new_page(viewport={"width": width, "height": height})
        _listen(page, site, wrong)
        for file in sorted(set(site.rglob("*.html")) - {site / "404.html"}):  # whose own files are at a server's root
            page.goto(file.as_uri())
            if (pixels := page.evaluate(WIDER)) > 0:
                wrong.append(f"{page.url} ({view}): {pixels} pixels wider than the screen")
        page.close()
    return wrong + searched(browser, site)


def searched(browser: Browser, site: Path) -> list[str]:
    """Whether the search finds a key of a recipe, on a page that was opened from the disk."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((site / "faq.html").as_uri())
    results = results_of(page, "nonfinite_patience")
    page.close()
    return [] if any("train_keys.html" in link for link in results) else [f"the search for a key finds {results}"]


def results_of(page: Page, words: str) -> list[str]:
    page.click("input.md-search__input")
    page.keyboard.type(words)
    page.wait_for_selector("a.md-search-result__link", timeout=20_000)
    return [str(link.get_attribute("href")) for link in page.query_selector_all("a.md-search-result__link")]


def _listen(page: Page, site: Path, wrong: list[str]) -> None:
    page.on("console", lambda message: wrong.append(f"{page.url}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    page.on("request", lambda sent: wrong.append(f"{page.url}: {sent.url}") if _foreign(sent.url, site) else None)


def _foreign(url: str, site: Path) -> bool:
    return not url.startswith((site.as_uri(), "data:", "blob:"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--shots", nargs="+", metavar="DIR PAGE", help="a folder, and pages without .html")
    parsed = parser.parse_args()
    site = parsed.site.resolve()
    with chromium() as browser:
        folder, *pages = parsed.shots or [None]
        for name in pages:
            for view, (width, height) in VIEWS.items():
                for scheme in ("light", "dark"):
                    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                    page.goto((site / f"{name}.html").as_uri())
                    page.screenshot(path=Path(folder) / f"{name.replace('/', '-')}-{view}-{scheme}.png")
                    page.close()
        wrong = [] if pages else faults(browser, site)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
