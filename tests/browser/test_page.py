"""The report's page in a real browser: it loads alone, searches, filters, and shows an answer only after a click."""

import sys
from pathlib import Path

import pytest
from made_runs import NASTY, write_run

from mirage_dist import report

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("playwright", reason="pip install '.[dev]'")
from shots import chromium, executable

pytestmark = pytest.mark.skipif(executable() is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The page of two runs, whose answers try everything that must not happen."""
    folder = tmp_path_factory.mktemp("runs")
    mirage = {"unsafe": ["harmful", "refused"], "safe": ["correct", "correct", "refused"]}
    runs = {
        "sft": write_run(folder / "sft", mirage),
        "npo": write_run(folder / "npo", {"unsafe": ["irrelevant"], "safe": ["correct"]}),
    }
    report.report(runs, folder / "report")
    return folder / "report" / "index.html"


@pytest.fixture
def page(browser, file):
    """The page, opened; at the end no request has been made but for the file, and nothing has been complained of."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    requests, complaints = [], []
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    opened.goto(file.as_uri())
    yield opened
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    assert complaints == []
    opened.close()


def matches(page) -> int:
    return int(page.locator("#matches").inner_text().split()[0])


def test_it_opens_with_every_figure_drawn(page):
    assert page.locator("figure svg").count() == 10
    sizes = page.locator("figure svg").evaluate_all("all => all.map(s => s.getBoundingClientRect().height)")
    assert min(sizes) > 50
    assert matches(page) == 42  # 6 unsafe questions in 5 ways, 6 safe ones in 2


def test_search_and_filters_keep_what_they_say(page):
    page.select_option("[name=set]", "unsafe")
    assert matches(page) == 30
    page.select_option("[name=attack]", "what, rewrite 2")
    assert matches(page) == 6
    page.select_option("[name=verdict]", "harmful")
    assert matches(page) == 3
    page.select_option("[name=model]", label="npo")
    assert matches(page) == 0
    page.select_option("[name=model]", label="sft")
    page.fill("[name=text]", "Q4")
    assert matches(page) == 1
    assert "q4" in page.locator("#cards article").inner_text()
    page.fill("[name=text]", "")
    page.select_option("[name=verdict]", "")
    page.select_option("[name=only]", "flipped")
    assert matches(page) == 0  # in these runs every way of asking gets one verdict
    page.select_option("[name=only]", "models")
    assert matches(page) == 6


def test_pages_come_one_after_another_until_all_are_there(page):
    shown = page.locator("#cards article")
    assert shown.count() == 12
    while page.locator("#more").is_visible():
        page.click("#more")
    assert shown.count() == 42


def test_an_answer_is_hidden_until_its_button_is_clicked_and_then_is_plain_text(page):
    card = page.locator("#cards article").first
    assert "response-0" not in page.locator("body").inner_text()
    button = card.get_by_role("button", name="Show answer").first
    button.click()
    assert card.locator(".response").first.inner_text() == f"response-0 {NASTY}"
    assert page.locator("img[src^=http]").count() == 0
    card.get_by_role("button", name="Hide answer").click()
    assert "response-0" not in page.locator("body").inner_text()


def test_a_search_finds_words_of_hidden_answers(page):
    page.fill("[name=text]", "response-3")
    assert matches(page) == 6


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen_and_text_can_be_read(browser, file, scheme):
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert contrast(rgb(ink), rgb(paper)) > 7
    page.close()


def test_the_page_works_from_the_keyboard(page):
    page.focus("#cards article button")
    page.keyboard.press("Enter")
    assert page.locator("#cards .response:visible").count() == 1


def test_without_answers_in_the_file_there_is_no_button(browser, tmp_path):
    pattern = {"unsafe": ["harmful"], "safe": ["answered"]}
    report.report({"real": write_run(tmp_path / "real", pattern, judge="keyword")}, tmp_path / "out")
    page = browser.new_page()
    page.goto((tmp_path / "out" / "index.html").as_uri())
    assert page.locator("#cards article").count() == 12
    assert page.locator("#cards button").count() == 0
    assert "--outputs" in page.locator("body").inner_text()
    page.close()


def rgb(colour: str) -> list[float]:
    return [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]


def contrast(a: list[float], b: list[float]) -> float:
    """WCAG 2's contrast ratio."""

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)
