"""Each page of the built site opens in a browser without errors, and its search finds an estimator."""

import functools
import http.server
import threading
from pathlib import Path

import pytest
from helpers.browser import errors_said, open_browser

SITE = Path(__file__).resolve().parents[2] / "docs" / "_build" / "html"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts)

PICTURES = "return [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
FORMULAS = """return [document.querySelectorAll('.math').length, document.querySelectorAll('mjx-container').length,
    document.querySelectorAll('mjx-merror').length]"""
TYPESET = "const done = arguments[0]; window.MathJax?.startup?.promise ? MathJax.startup.promise.then(done) : done()"
LOAD_PICTURES = """const done = arguments[0]; document.querySelectorAll('img').forEach(i => i.loading = 'eager');
    Promise.all([...document.images].map(i => i.decode().catch(() => 0))).then(done)"""

pytestmark = pytest.mark.slow


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A handler that prints no line for each request."""

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    if not PAGES:
        pytest.skip("the site is not built; run make docs")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as driver:
        yield driver


PHONE = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}


def width_on_a_phone(browser):
    """How many pixels wide the page is, where 390 are shown."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    width = browser.execute_script("return document.documentElement.scrollWidth")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    return width


def faults(browser, address, page):
    """What is wrong with a page: errors of the console, images, formulas, and the width on a phone."""
    browser.get(f"{address}/{page}")
    browser.execute_async_script(TYPESET)
    browser.execute_async_script(LOAD_PICTURES)
    formulas, rendered, failed = browser.execute_script(FORMULAS)
    found = errors_said(browser)
    found += [f"image not loaded: {source}" for source in browser.execute_script(PICTURES)]
    if failed or rendered < formulas:
        found.append(f"{rendered} of {formulas} formulas rendered, {failed} with an error")
    if (width := width_on_a_phone(browser)) > PHONE["width"]:
        found.append(f"{width} pixels wide on a phone")
    return found


def test_every_page_opens_without_a_fault(browser, address):
    wrong = {page: found for page in PAGES if (found := faults(browser, address, page))}
    assert not wrong


ANY_ARGUMENTS = ["callbacks.Callback", "Conditional", "priors.Prior"]
"""Base classes without a constructor of their own."""


def test_every_class_shows_the_arguments_of_its_constructor():
    found = []
    for page in (page for page in PAGES if page.startswith("api/generated/")):
        head = (SITE / page).read_text(encoding="utf-8").partition('<dt class="sig')[2].partition("</dt>")[0]
        if ">class<" in head and ">args<" in head:
            found.append(page)
    assert {page.removeprefix("api/generated/pyro_vae.").removesuffix(".html") for page in found} <= {*ANY_ARGUMENTS}


def test_search_finds_an_estimator(browser, address):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{address}/search.html?q=IWAE")
    links = "return [...document.querySelectorAll('#search-results li a')].map(a => a.href).join()"
    for place in ("pyro_vae.elbo.IWAE", "theory/importance_weighted"):
        WebDriverWait(browser, 20).until(lambda page, place=place: place in page.execute_script(links))


def test_a_missing_image_and_a_broken_formula_are_seen(browser, address, monkeypatch):
    page = SITE / "planted.html"
    head = (SITE / "theory" / "equations.html").read_text(encoding="utf-8").replace("../_static", "_static")
    page.write_text(head.replace("</article>", '<img src="none.png"><div class="math">\\(\\frac\\)</div></article>'))
    try:
        found = " ".join(faults(browser, address, page.name))
    finally:
        page.unlink()
    assert "none.png" in found
    assert "with an error" in found
