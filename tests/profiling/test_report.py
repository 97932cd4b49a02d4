"""The HTML report in a browser: no error, no request, the pictures are there, nothing is cut."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastattn.profiling import Case, Profile, profile, write_html
from fastattn.profiling.plots import panels
from fastattn.profiling.report import render_html

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--window-size=1280,900")  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.fail("the report is tested in Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def found() -> Profile:
    from fastattn.profiling.presets import PRESETS
    from tests.profiling.tiny import TINY

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny llama", TINY["llama"])
        return profile(random="tiny llama", cases=[Case(2, 9, 4), Case(1, 9, 4)], repeats=1)


def visit(browser: Any, path: Path) -> tuple[list[str], list[str]]:
    """Messages on the console, and what was requested beside the page itself."""
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())
    messages = [entry["message"] for entry in browser.get_log("browser")]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    return messages, [url for url in requests if url != path.as_uri() and url != "data:,"]


def test_it_opens_without_errors_and_requests(browser: Any, found: Profile, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(found, path)
    messages, requests = visit(browser, path)
    assert messages == [] and requests == []
    figures = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(svg => {"
        " const box = svg.getBoundingClientRect();"
        " return [box.width, box.height, svg.querySelectorAll('path').length] })"
    )
    assert len(figures) == len(panels(found)) >= 8
    assert all(width > 300 and height > 150 and paths > 15 for width, height, paths in figures)
    assert browser.execute_script("return document.querySelectorAll('table tbody tr').length") > 20


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(
    browser: Any, found: Profile, tmp_path: Path, width: int
) -> None:
    path = tmp_path / "report.html"
    write_html(found, path)
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    visit(browser, path)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_browser_would_tell(browser: Any, tmp_path: Path) -> None:
    """That a script's error, and a picture from elsewhere, are seen by the test above."""
    path = tmp_path / "bad.html"
    path.write_text("<script>nothing.at.all</script><img src='missing.png'>", encoding="utf-8")
    messages, requests = visit(browser, path)
    assert any("nothing is not defined" in message for message in messages)
    assert [url.rpartition("/")[2] for url in requests] == ["missing.png"]


def test_names_are_escaped_and_ids_are_unique(found: Profile) -> None:
    page = render_html(replace(found, model="<b>&", notes=("a < b",)))
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page and "a &lt; b" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 20
    used = {*re.findall(r'href="#([^"]+)"', page), *re.findall(r"url\(#([^)]+)\)", page)}
    assert used <= set(ids)


def test_an_error_stands_in_place_of_figures(found: Profile) -> None:
    row = replace(
        found.rows[0], prefill=None, decode=None, memory=None, shares=(), error="wrong outputs: X"
    )
    page = render_html(replace(found, rows=(row, *found.rows[1:])))
    assert '<td class="bad">wrong outputs: X</td>' in page
    alone = render_html(replace(found, rows=(row,)))
    assert "<svg" not in alone and "wrong outputs: X" in alone
