"""The report pages in a real browser: figures drawn, nothing fetched, nothing complained about, usable on a phone and unseen.

Chromium and its driver are looked for under /usr/bin and on the path; without them these tests are skipped.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium with chromedriver here: the pages are not tried in a browser"
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--hide-scrollbars",
)  # fmt: skip


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

    def js(self, script: str, *given: Any) -> Any:
        return self.driver.execute_script(script, *given)

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
return [...document.querySelectorAll('.plot')].map(node => ({
  key: node.id, marks: node.querySelectorAll('.scatterlayer path, .heatmaplayer image, .heatmaplayer rect').length,
  wide: node.getBoundingClientRect().width, svg: node.querySelectorAll('svg.main-svg').length,
}))
"""


@pytest.mark.parametrize("name", MAKERS)
def test_every_figure_is_drawn_and_nothing_is_fetched(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    drawn = browser.js(DRAWN)
    assert len(drawn) >= 6
    assert [one for one in drawn if not (one["svg"] and one["marks"] and one["wide"] > 300)] == []
    assert browser.requests() == [pages[name].as_uri()]
    assert browser.complaints() == []
    assert not browser.js("return 'alerted' in window || document.querySelectorAll('main script').length")


def test_the_page_shows_what_was_measured(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    titles = [h.text for h in browser.driver.find_elements(By.CSS_SELECTOR, "h2")]
    assert titles == [
        "Scores", "Learning curves", "Score by stage", "Score against traffic", "Sites", "Drift by layer", "Gates over time",
        "Stability under damage", "Retention and generalisation", "How it was run",
    ]  # fmt: skip
    browser.open(pages["suite"])
    titles = [h.text for h in browser.driver.find_elements(By.CSS_SELECTOR, "h3")]
    assert titles == [
        "Scores", "Differences", "Two by two", "Every part alone", "Sensitivity", "Tasks", "Learning curves", "Score by stage",
        "Stability under damage", "Retention", "Traffic", "Sites", "Drift", "Gates",
    ]  # fmt: skip
    assert ODD in browser.driver.find_element(By.ID, "main").text  # shown as it is, and harmless


def test_hovering_shows_the_number(browser: Browser, pages: dict[str, Path]) -> None:
    """The federated loss after round 2: sites at 2/2 and 2/2 + 0.25, so 1.125, shown with its range."""
    browser.open(pages["run"])
    x, y = browser.js(
        """
        const node = document.getElementById('figure-1-plot'), drags = [...node.querySelectorAll('.nsewdrag')];
        node.scrollIntoView({block: 'center', behavior: 'instant'});
        const box = drags[1].getBoundingClientRect(), layout = node._fullLayout;
        return [box.left + layout.xaxis2.c2p(2), box.top + layout.yaxis2.c2p(1.125)]
        """
    )
    for event_x in (x - 3, x):
        browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": event_x, "y": y})
    assert "round 2: 1.12 (1.00 to 1.25)" in wait_for_label(browser, "figure-1-plot")


def wait_for_label(browser: Browser, key: str) -> str:
    script = """
    const [key, done] = arguments, node = document.getElementById(key), end = Date.now() + 20000;
    const look = () => {
      const found = node.querySelector('.hoverlayer .hovertext');
      if (found || Date.now() > end) done(found ? found.textContent : ''); else setTimeout(look, 30);
    };
    look();
    """
    return str(browser.driver.execute_async_script(script, key))


def test_a_click_in_the_legend_hides_a_curve_and_a_double_click_leaves_one(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["suite"])
    plot = browser.driver.find_element(By.CSS_SELECTOR, "#s1-learning .plot")
    buttons = browser.driver.find_elements(By.CSS_SELECTOR, "#s1-learning .legend button")
    shown = "return arguments[0].querySelectorAll('.scatterlayer .trace').length"
    assert browser.js(shown, plot) == len(buttons) == 6
    assert ODD in [button.text for button in buttons]
    browser.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", buttons[0])
    buttons[0].click()
    assert browser.js(shown, plot) == 5
    assert buttons[0].get_attribute("aria-pressed") == "false"
    buttons[0].click()
    assert browser.js(shown, plot) == 6
    webdriver.ActionChains(browser.driver).double_click(buttons[1]).perform()
    assert browser.js(shown, plot) == 1
    webdriver.ActionChains(browser.driver).double_click(buttons[1]).perform()
    assert browser.js(shown, plot) == 6


def test_the_heat_map_shows_the_chosen_method(browser: Browser, pages: dict[str, Path]) -> None:
    """`plain` after stage 2: 50 and 70 and the mean of shifts 2 and 4; `full` ten more."""
    browser.open(pages["suite"])
    numbers = "return [...document.querySelectorAll('#s1-stages .annotation-text')].map(node => node.textContent)"
    select = browser.driver.find_element(By.CSS_SELECTOR, "#s1-stages select")
    plot = browser.driver.find_element(By.CSS_SELECTOR, "#s1-stages .plot")
    for method, found in (("full", ["80.0", "63.0", "83.0"]), ("plain", ["80.0", "53.0", "73.0"])):
        select.find_element(By.XPATH, f"option[text()='{method}']").click()
        assert browser.js(numbers) == found
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
    assert [one for one in drawn if not (one["marks"] and one["wide"] <= 390)] == []
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
      document.querySelectorAll('#s1-learning .scatterlayer .trace').length,
      document.querySelector('#s1-learning .xaxislayer-above text').style.fill]
    """
    browser.js("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.js(seen) == [0, 6, "rgb(107, 107, 102)"]
    browser.js("window.dispatchEvent(new Event('afterprint'))")
    folded, curves, _ = browser.js(seen)
    assert folded > 5
    assert curves == 5
    pdf = base64.b64decode(browser.driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    assert pdf.startswith(b"%PDF")
    assert browser.complaints() == []
