"""The report pages in a real browser: figures drawn, nothing fetched, nothing complained about, usable on a phone and unseen.

Chromium and its driver are looked for under /usr/bin and on the path; without them these tests are skipped.
"""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from suites import ODD, kept_run, whole_run, whole_suite, write_plan

from fedkeel.evidence.report import write_report, write_suite_report

selenium = pytest.importorskip("selenium", reason="selenium is not installed: the pages are not tried in a browser")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no chromium with chromedriver here: the pages are not tried in a browser"
    ),
]
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
)


@dataclass
class Browser:
    """A browser that remembers what a page asked for and complained about."""

    driver: Any

    def open(self, page: Path, width: int = 1280, dark: bool = False) -> None:
        self.driver.get_log("performance"), self.driver.get_log("browser")
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}  # else clicks land where a scrolling page was
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, still]})
        self.driver.get(page.as_uri())
        self.driver.execute_async_script(
            """
            const done = arguments[0], end = Date.now() + 60000, drawn = () => 'drawn' in document.documentElement.dataset;
            const look = () => { if (drawn() || Date.now() > end) done(); else setTimeout(look, 30); };
            look();
            """
        )

    def js(self, script: str, *given: Any) -> Any:
        return self.driver.execute_script(script, *given)

    def settled(self, holds: Callable[[], bool]) -> bool:
        """Whether it holds within ten seconds: a window tells its page of a new size or scheme a little later."""
        end = time.monotonic() + 10
        while not holds():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def requests(self) -> list[str]:
        found = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        sent = [one["params"]["request"]["url"] for one in found if one["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    driver.set_page_load_timeout(180)
    driver.set_script_timeout(180)
    yield Browser(driver)
    driver.quit()


def real_suite(folder: Path) -> Path:
    """Committed runs as a suite: three methods on the MiniLM stream, two seeds each."""
    methods = ("fedit", "fedprox", "full")
    write_plan(folder, [(f"{m}-{k}", "minilm", m, k) for m in methods for k in (1, 2)], reference="fedit")
    for method in methods:
        for seed in (1, 2):
            kept_run(f"clinc150-{method}-s{seed}", folder / f"{method}-{seed}")
    return folder


def real_run(folder: Path) -> Path:
    return kept_run("clinc150-full-s1", folder)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "run": lambda at: write_report(whole_run(at)).with_name("report.html"),
    "suite": lambda at: write_suite_report(whole_suite(at)),
    "real run": lambda at: write_report(real_run(at)).with_name("report.html"),
    "real suite": lambda at: write_suite_report(real_suite(at)),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    return {name: make(root / name.replace(" ", "-")) for name, make in MAKERS.items()}


DRAWN = """
return [...document.querySelectorAll('.panel')].map(node => {
  const svg = node.querySelector('svg'), width = (what) => what.getBoundingClientRect().width;
  return {
    key: node.closest('figure').id, marks: node.querySelectorAll('.mark-symbol path[d], .mark-rect path[d]').length,
    wide: svg ? width(svg) : 0, fits: svg && Math.abs(width(svg) - width(node)) < 1,
    inside: svg && [...svg.querySelectorAll('text')].every(text => {
      const box = text.getBoundingClientRect(), all = svg.getBoundingClientRect();
      return !box.width || text.style.opacity === '0' || text.getAttribute('opacity') === '0' ||
        (box.left > all.left - 1 && box.right < all.right + 1 && box.top > all.top - 1 && box.bottom < all.bottom + 1);
    }),
  };
})
"""


@pytest.mark.parametrize("name", MAKERS)
def test_every_figure_is_drawn_and_nothing_is_fetched(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    drawn = browser.js(DRAWN)
    assert len(drawn) >= 6
    assert [one for one in drawn if not (one["marks"] and one["wide"] > 250 and one["fits"] and one["inside"])] == []
    assert browser.requests() == [pages[name].as_uri()]
    assert browser.complaints() == []
    assert not browser.js("return 'alerted' in window || document.querySelectorAll('main script').length")


def test_the_page_shows_what_was_measured(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    titles = [h.text for h in browser.driver.find_elements(By.CSS_SELECTOR, "h2")]
    assert titles == [
        "Scores",
        "Learning curves",
        "Score by stage",
        "Score against traffic",
        "Sites",
        "Drift by layer",
        "Gates over time",
        "Stability under damage",
        "Retention and generalisation",
        "How it was run",
    ]
    browser.open(pages["suite"])
    titles = [h.text for h in browser.driver.find_elements(By.CSS_SELECTOR, "h3")]
    assert titles == [
        "Scores",
        "Differences",
        "Two by two",
        "Every part alone",
        "Sensitivity",
        "Tasks",
        "Learning curves",
        "Score by stage",
        "Stability under damage",
        "Retention",
        "Traffic",
        "Sites",
        "Drift",
        "Gates",
    ]
    assert ODD in browser.driver.find_element(By.ID, "main").text  # shown as it is, and harmless


def test_hovering_shows_the_number(browser: Browser, pages: dict[str, Path]) -> None:
    """The federated loss after round 2: sites at 2/2 and 2/2 + 0.25, so 1.125, shown with its range."""
    browser.open(pages["run"])
    x, y = browser.js(
        """
        const panel = document.querySelectorAll('#figure-1-plot .panel')[1];
        panel.scrollIntoView({block: 'center', behavior: 'instant'});
        const box = panel.querySelectorAll('.mark-symbol path')[1].getBoundingClientRect();
        return [box.left + box.width / 2, box.top + box.height / 2]
        """
    )
    for event_x, event_y in ((x - 3, y), (x + 4, y + 12)):  # near it is enough
        browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": event_x, "y": event_y})
    assert wait_for_label(browser) == "federated\nround 2: 1.12 (1.00 to 1.25)"
    sizes = browser.js(
        """
        const marks = document.querySelectorAll('#figure-1-plot .panel')[1].querySelectorAll('.mark-symbol path');
        return [...marks].map(one => one.getBoundingClientRect().width)
        """
    )
    assert [size > 9 for size in sizes] == [False, True, False, False]  # the point that is told stands out


def wait_for_label(browser: Browser) -> str:
    script = """
    const done = arguments[0], end = Date.now() + 20000;
    const look = () => {
      const found = document.querySelector('#vg-tooltip-element.visible');
      if (found || Date.now() > end) done(found ? found.textContent : ''); else setTimeout(look, 30);
    };
    look();
    """
    return str(browser.driver.execute_async_script(script))


def test_a_name_is_shown_as_text_where_it_is_pointed_at(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["suite"])
    places = browser.js(
        """
        const panel = document.querySelector('#s1-differences .panel');
        panel.scrollIntoView({block: 'center', behavior: 'instant'});
        const dots = [...panel.querySelectorAll('.mark-symbol')].at(-1).querySelectorAll('path');
        const boxes = [...dots].map(one => one.getBoundingClientRect());
        return boxes.map(box => [box.left + box.width / 2, box.top + box.height / 2])
        """
    )
    x, y = places[3]
    for event_x in (x + 3, x):
        browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": event_x, "y": y})
    told = wait_for_label(browser)
    assert told.startswith(f"methods\n{ODD}: 2.0")
    assert not browser.js("return 'alerted' in window || document.querySelectorAll('#vg-tooltip-element *').length")


CURVES = "return arguments[0].querySelectorAll('.mark-line path[d]').length"


def test_a_click_in_the_legend_hides_a_curve_and_a_double_click_leaves_one(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["suite"])
    plot = browser.driver.find_element(By.CSS_SELECTOR, "#s1-learning .plot")
    buttons = browser.driver.find_elements(By.CSS_SELECTOR, "#s1-learning .legend button")
    assert browser.js(CURVES, plot) == len(buttons) == 6
    assert ODD in [button.text for button in buttons]
    browser.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", buttons[0])
    buttons[0].click()
    assert browser.js(CURVES, plot) == 5
    assert buttons[0].get_attribute("aria-pressed") == "false"
    buttons[0].click()
    assert browser.js(CURVES, plot) == 6
    (odd,) = (button for button in buttons if button.text == ODD)
    webdriver.ActionChains(browser.driver).double_click(odd).perform()
    assert browser.js(CURVES, plot) == 1
    assert [button.get_attribute("aria-pressed") for button in buttons].count("true") == 1
    webdriver.ActionChains(browser.driver).double_click(odd).perform()
    assert browser.js(CURVES, plot) == 6


def test_the_legend_works_without_a_mouse(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["suite"])
    plot = browser.driver.find_element(By.CSS_SELECTOR, "#s1-learning .plot")
    browser.js("document.querySelector('#s1-learning .legend button').focus()")
    webdriver.ActionChains(browser.driver).send_keys(" ").perform()
    assert browser.js(CURVES, plot) == 5
    webdriver.ActionChains(browser.driver).send_keys(" ").perform()
    assert browser.js(CURVES, plot) == 6


def test_figures_follow_the_scheme_and_the_width_of_the_page(browser: Browser, pages: dict[str, Path]) -> None:
    """Light to dark, and a wide window to a narrow one and back; what is hidden stays hidden."""
    browser.open(pages["suite"])
    plot = browser.driver.find_element(By.CSS_SELECTOR, "#s1-learning .plot")
    browser.js("document.querySelector('#s1-learning .legend button').click()")
    seen = "return document.querySelector('#s1-learning .panel svg').style.backgroundColor"
    assert browser.js(seen) == "rgb(255, 255, 255)"
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    assert browser.settled(lambda: browser.js(seen) == "rgb(23, 25, 28)")

    def fits(width: int) -> bool:
        wide = browser.js("return document.documentElement.scrollWidth")
        return bool(wide == width and all(one["fits"] and one["inside"] for one in browser.js(DRAWN)))

    for width in (390, 1280):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert browser.settled(partial(fits, width))
    assert browser.js(CURVES, plot) == 5
    assert browser.complaints() == []


def test_a_page_lets_no_text_run_as_a_script(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    told = browser.driver.execute_async_script(
        """
        const done = arguments[0], script = document.createElement('script'), button = document.createElement('button');
        script.textContent = 'window.ran = 1';
        button.setAttribute('onclick', 'window.ran = 1');
        document.body.append(script, button);
        button.click();
        setTimeout(() => { // later, as what runs in here itself is free of the page's policy
          try { window.ran = new Function('return 1')(); } catch (error) { done([error.name, 'ran' in window]); }
        });
        """
    )
    assert told == ["EvalError", False]


def test_the_heat_map_shows_the_chosen_method(browser: Browser, pages: dict[str, Path]) -> None:
    """`plain` after stage 2: 50 and 70 and the mean of shifts 2 and 4; `full` ten more."""
    browser.open(pages["suite"])
    numbers = "return [...document.querySelectorAll('#s1-stages .mark-text.role-mark text')].map(node => node.textContent)"
    select = browser.driver.find_element(By.CSS_SELECTOR, "#s1-stages select")
    plot = browser.driver.find_element(By.CSS_SELECTOR, "#s1-stages .plot")
    for method, found in (("full", ["80.0", "63.0", "83.0"]), ("plain", ["80.0", "53.0", "73.0"])):
        select.find_element(By.XPATH, f"option[text()='{method}']").click()
        assert [text for text in browser.js(numbers) if text] == found
        assert str(plot.get_attribute("aria-label")).startswith(f"{method}: after the last stage, ")


def test_numbers_unfold_below_a_figure(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["suite"])
    details = browser.driver.find_element(By.CSS_SELECTOR, "#figure-1 details")
    table = details.find_element(By.TAG_NAME, "table")
    assert not table.is_displayed()
    details.find_element(By.TAG_NAME, "summary").click()
    assert table.is_displayed()
    assert "+10.0" in table.text  # full against plain


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Browser, pages: dict[str, Path], name: str, dark: bool) -> None:
    browser.open(pages[name], width=390, dark=dark)
    browser.js("for (const one of document.querySelectorAll('details')) one.open = true")
    assert browser.js("return [document.documentElement.scrollWidth, window.innerWidth]") == [390, 390]
    drawn = browser.js(DRAWN)
    assert [one for one in drawn if not (one["marks"] and one["fits"] and one["inside"] and one["wide"] <= 390)] == []
    paper = browser.js("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (not dark)
    assert browser.complaints() == []


ACCESS = """
const said = [], all = (what) => [...document.querySelectorAll(what)];
const text = (node) => (node?.textContent ?? '').trim();
const ids = all('[id]').map(node => node.id).filter(id => id);
ids.forEach((id, n) => { if (ids.indexOf(id) !== n) said.push('id twice: ' + id); });
if (document.documentElement.lang !== 'en') said.push('no language');
if (!document.title.trim()) said.push('no title');
if (all('h1').length !== 1) said.push('h1: ' + all('h1').length);
let level = 1;
for (const node of all('h1, h2, h3, h4')) {
  const now = Number(node.tagName[1]);
  if (now > level + 1) said.push('heading leaps: ' + text(node));
  if (!text(node)) said.push('empty heading');
  level = now;
}
for (const what of ['header', 'nav[aria-label]', 'main', 'footer']) if (all(what).length !== 1) said.push('landmark ' + what);
for (const node of all('figure')) {
  const plot = node.querySelector('[role=img]');
  if (!plot) { said.push('no image in ' + node.id); continue; }
  if ((plot.getAttribute('aria-label') ?? '').length < 15) said.push('no finding: ' + plot.id);
  const table = document.getElementById(plot.getAttribute('aria-describedby'));
  if (table?.tagName !== 'TABLE' || !node.contains(table)) said.push('no table behind ' + plot.id);
  if (!text(node.querySelector('figcaption'))) said.push('no caption: ' + node.id);
  if (!text(node.querySelector('.source')).includes('commit')) said.push('no source: ' + node.id);
}
for (const node of all('table')) {
  if (!text(node.caption)) said.push('no caption: ' + node.id);
  for (const cell of node.querySelectorAll('thead th')) {
    if (cell.scope !== 'col' || !text(cell)) said.push('column of ' + node.id);
  }
  for (const line of node.querySelectorAll('tbody tr')) {
    const first = line.cells[0];
    if (first.tagName !== 'TH' || first.scope !== 'row' || !text(first)) said.push('line of ' + node.id);
    if (line.cells.length !== node.tHead.rows[0].cells.length) said.push('cells of ' + node.id);
  }
}
for (const node of all('.scroll')) if (node.tabIndex !== 0 || !node.getAttribute('aria-label')) said.push('scrolls unseen');
for (const node of all('button, select')) {
  if (!text(node.tagName === 'SELECT' ? node.labels[0] : node)) said.push('control without a name');
}
for (const node of all('a[href^="#"]')) {
  if (!document.querySelector(node.getAttribute('href'))) said.push('leads nowhere: ' + node.href);
}
const light = (colour) => {
  const shares = colour.match(/[\\d.]+/g).map(v => v / 255);
  const [r, g, b] = shares.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = light(getComputedStyle(document.body).backgroundColor);
const poor = new Set();
for (const node of all('p, h1, h2, h3, td, th, li, summary, caption, figcaption, a:not(.skip), button, small')) {
  const ink = light(getComputedStyle(node).color);
  if ((Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05) < 4.5) poor.add(node.tagName + '.' + node.className);
}
for (const node of all('.plot text')) {
  const ink = light(getComputedStyle(node).fill);
  if ((Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05) < 4.5 && text(node)) poor.add('plot text ' + text(node));
}
return [...said, ...poor].slice(0, 20)
"""


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_used_unseen_and_with_weak_eyes(browser: Browser, pages: dict[str, Path], name: str, dark: bool) -> None:
    browser.open(pages[name], dark=dark)
    assert browser.js(ACCESS) == []


def test_on_paper_everything_is_unfolded_and_on_white(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["suite"], dark=True)
    buttons = browser.driver.find_elements(By.CSS_SELECTOR, "#s1-learning .legend button")
    browser.js("arguments[0].click()", buttons[0])
    seen = """
    return [document.querySelectorAll('details:not([open])').length,
      document.querySelectorAll('#s1-learning .mark-line path[d]').length,
      document.querySelector('#s1-learning .role-axis-label text').getAttribute('fill'),
      document.querySelector('#s1-learning .panel svg').getAttribute('width')]
    """
    browser.js("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.js(seen) == [0, 6, "#6b6b66", "660"]
    browser.js("window.dispatchEvent(new Event('afterprint'))")
    folded, curves, ink, width = browser.js(seen)
    assert folded > 5
    assert curves == 5
    assert ink == "#a5a39b"
    assert float(width) == browser.js("return document.querySelector('#s1-learning .panel').clientWidth")
    pdf = base64.b64decode(browser.driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    assert pdf.startswith(b"%PDF")
    assert browser.complaints() == []
