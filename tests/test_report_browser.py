"""The page in a real browser: headless Chromium, as Debian packages it (`apt-get install chromium`)."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_up import found, gate, paper_columns, run
from PIL import Image

from bench import report
from bench.record import Facts

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
#: the page as it looked when it was last looked at, 64 × 48 grey levels
KEPT = Path(__file__).parent / "report_looks.png"
#: mean difference in grey levels of 255: a serif font moves the picture by 5, a blank page by 8, one without its style by 11
GROSS = 7


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        # each launch has an empty profile of its own
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


def leaning(sharpness, images=200, experts=9):
    """Weights of a gate that leans towards the expert of an image's class."""
    scores = np.where(np.arange(images)[:, None] % 10 == np.arange(experts), sharpness, 0.0)
    return np.exp(scores) / np.exp(scores).sum(1, keepdims=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    run(
        results,
        {f"fgsm-0.0{i}": 190 - 6 * i for i in range(1, 10)},
        defense="mixture",
        model=Facts(mixture="soft"),
        experts=gate({"clean": leaning(3.0), "attacked": leaning(1.0)}, np.arange(9) < 7),
        step=np.arange(200) % 50,
    )
    run(results, {"a-pgd-100": 60}, defense="doubted", findings=[found("gradients vanish")])
    run(results, {"a-pgd-100": 120}, defense="another")
    run(
        results,
        {"fgsm-0.01": 90},
        defense="small",
        dataset="cifar10",
        protocol="mine",
        columns=paper_columns()[:3],
    )
    run(results, defense="broken", findings=[found("NaN", severity="blocks", code="non-finite")])
    return report.write(results)


class Opened:
    """A tab with the page in it, and everything that went wrong there."""

    def __init__(self, browser, written, **context):
        self.wrong, self.asked = [], []
        self.page = browser.new_page(**{"viewport": {"width": 1280, "height": 960}, **context})
        self.page.on("console", lambda said: self.wrong.append(said.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(written.as_uri())
        self.page.wait_for_selector("#overview svg")

    @property
    def names(self):
        return self.page.locator("#board tbody tr:visible th").all_inner_texts()


@pytest.fixture
def opened(browser, written):
    tab = Opened(browser, written)
    yield tab
    tab.page.close()


def opens_all(page):
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for figure in page.locator("figure.chart").all():
        figure.scroll_into_view_if_needed()
        figure.locator("svg").first.wait_for()


def test_it_opens_and_draws_every_chart_without_a_word_on_the_console(opened):
    opens_all(opened.page)
    assert opened.page.locator("figure.chart svg").count() > 8
    assert opened.wrong == []


def test_it_asks_for_nothing_but_itself(opened, written):
    opens_all(opened.page)
    assert [url for url in opened.asked if not url.startswith("data:")] == [written.as_uri()]


def test_a_heading_sorts_by_its_column_and_back(opened):
    heading = opened.page.locator("#board th[data-key=worst]")
    heading.locator("button").click()
    assert opened.names == ["mixture", "another", "small", "doubted", "broken"]
    assert heading.get_attribute("aria-sort") == "descending"
    heading.locator("button").click()
    assert opened.names == ["doubted", "small", "another", "mixture", "broken"]
    assert heading.get_attribute("aria-sort") == "ascending"


def test_the_keyboard_sorts_too(opened):
    opened.page.locator("#board th[data-key=label] button").focus()
    opened.page.keyboard.press("Enter")
    assert opened.names == ["another", "broken", "doubted", "mixture", "small"]


@pytest.mark.parametrize(
    ("name", "value", "left"),
    [
        ("dataset", "cifar10", ["small"]),
        ("protocol", "mine", ["small"]),
        ("kind", "soft mixture", ["mixture"]),
        ("verdict", "void", ["broken"]),
    ],
)
def test_a_filter_leaves_what_fits(opened, name, value, left):
    opened.page.select_option(f"select[name={name}]", value)
    assert opened.names == left
    assert opened.page.locator("#count").inner_text() == "1 of 5 rows"


def test_a_part_of_a_name_filters(opened):
    opened.page.fill("input[name=label]", "OTH")
    assert opened.names == ["another"]


def test_hovering_a_point_tells_its_numbers(opened):
    opened.page.locator("#overview svg path[aria-roledescription=point]").first.hover(force=True)
    tip = opened.page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert "worst" in tip.inner_text()


@pytest.fixture
def heat(opened):
    """The tiles of the mixture's gate, clean and attacked."""
    opened.page.get_by_role("link", name="mixture").click()
    found = []
    for figure in opened.page.locator("details.defense[open] figure[data-heat]").all()[:2]:
        figure.scroll_into_view_if_needed()
        found.append(figure.locator("svg path[aria-roledescription='rect mark']"))
        found[-1].first.wait_for()
    return found


def test_the_gate_is_drawn_clean_beside_attacked_to_one_scale(heat):
    clean, attacked = heat
    assert clean.count() == attacked.count() == 10 * 9
    # each is the largest of its figure: scaled to itself, it would have the deepest shade in both
    assert clean.first.get_attribute("fill") != attacked.first.get_attribute("fill")
    (left, right) = (tiles.first.bounding_box() for tiles in heat)
    assert left["y"] == right["y"] and left["x"] < right["x"]


def test_hovering_a_tile_tells_class_expert_and_weight(opened, heat):
    heat[0].first.hover(force=True)
    tip = opened.page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert tip.inner_text().split() == ["class", "0", "expert", "1", "mean", "weight", "(%)", "71.5"]


def test_a_link_opens_the_section_that_it_leads_to(opened):
    opened.page.get_by_role("link", name="another").click()
    section = opened.page.locator("details.defense[open]")
    section.wait_for()
    assert "another" in section.locator("summary h3").inner_text()


def test_it_is_as_wide_as_a_phone(browser, written):
    tab = Opened(browser, written, viewport={"width": 390, "height": 844})
    opens_all(tab.page)
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 390
    tab.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_inaccessible(browser, written, scheme, width):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    )
    tab = Opened(browser, written, color_scheme=scheme, viewport={"width": width, "height": 960})
    opens_all(tab.page)
    found = axe.Axe().run(tab.page)
    assert found.violations_count == 0, found.generate_report()
    tab.page.close()


def test_its_paper_is_white_in_the_dark(browser, written):
    tab = Opened(browser, written, color_scheme="dark")
    tab.page.emulate_media(media="print", color_scheme="dark")
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    text = "getComputedStyle(document.querySelector('#overview svg text')).fill"
    assert tab.page.evaluate(text) == "rgb(0, 0, 0)"
    tab.page.close()


def looks(page):
    """The first screen, small and grey."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("L").resize((64, 48), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float64)


def test_it_looks_as_it_did_when_it_was_last_looked_at(opened):
    kept = np.asarray(Image.open(KEPT), dtype=np.float64)
    assert np.abs(looks(opened.page) - kept).mean() < GROSS
    opened.page.evaluate("document.querySelectorAll('style').forEach((style) => style.remove())")
    assert np.abs(looks(opened.page) - kept).mean() > GROSS
