"""The page in headless Chromium: what it shows, asks, and does when the line is cut."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from anabranch.server.coordinator.folder import Federation
from tests.browser import Browser, Page
from tests.page_cases import (
    add_run,
    add_site,
    example,
    make,
    report,
    serving,
    write_reports,
)
from tests.runs import table_text

READY = "document.body.dataset.ready === 'yes'"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(autouse=True)
def closed_afterwards(browser: Browser) -> Iterator[None]:
    yield
    browser.close_pages()


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return example(tmp_path_factory.mktemp("page") / "heart", time.time())


@pytest.fixture(scope="module")
def address(federation: Federation) -> Iterator[str]:
    with serving(federation) as found:
        yield found


def opened(browser: Browser, address: str, federation: Federation, *size: int) -> Page:
    page = browser.page(*size)
    page.open(f"{address}/?token={federation.page_token()}")
    page.until(READY)
    return page


@pytest.mark.parametrize("size", [(360, 740), (390, 844), (768, 1024), (1280, 900)])
def test_the_page_fits_asks_nobody_else_and_complains_of_nothing(
    browser: Browser, address: str, federation: Federation, size: tuple[int, int]
) -> None:
    page = opened(browser, address, federation, *size)
    page.value("for (const one of document.querySelectorAll('details')) one.open = true")

    assert page.complaints == []
    assert {urlsplit(url).netloc for url in page.requests} == {urlsplit(address).netloc}
    assert page.value("document.documentElement.scrollWidth") <= size[0]
    outside = page.value(
        "[...document.querySelectorAll('body *')].filter((one) => !one.closest('.scroll')"
        " && !one.closest('.skip') && one.getBoundingClientRect().right > innerWidth + 1)"
        ".map((one) => one.outerHTML.slice(0, 200))"
    )
    assert outside == []
    assert federation.page_token() not in page.value("location.href")


def test_every_wait_shows_who_since_until_why_and_then_without_scrolling(
    browser: Browser, address: str, federation: Federation
) -> None:
    page = opened(browser, address, federation, 1280, 900)

    names = page.value("[...document.querySelectorAll('.wait dt')].map((one) => one.textContent)")
    said = page.value("document.querySelector('.wait').textContent")

    assert names == ["Waits for", "Why", "Since", "Until", "Then"]
    assert "bergen, delft" in said
    assert "their deltas of round 13; 3 are needed" in said
    assert "(in 2" in said
    assert page.value("document.querySelector('.wait').getBoundingClientRect().bottom") < 900


def test_states_are_words_and_everything_shown_is_there(
    browser: Browser, address: str, federation: Federation
) -> None:
    write_reports(federation, "heart-disease-3f9c21d07a44", time.time())  # some time has passed
    page = opened(browser, address, federation, 390, 844)

    text = page.value("document.body.innerText")

    for said in (
        "Problem: delft: no report from it",
        "Notice: heart-disease-3f9c21d07a44: its process was restarted 2 times",
        "training, step 40 of 200, round 13",
        "round 13 of 20: training, 2 of 4 sites have answered",
        "train, round 13: sent",
        "11 counted, 1 failed",
        "4.87 of 8.00",
        "esbjerg is invited",
        "failed after 0 of 8 rounds",
    ):
        assert said in text
    states = page.value("[...document.querySelectorAll('#sites .chip')].map((o) => o.textContent)")
    assert states == ["idle", "training", "idle", "silent"]


def test_what_is_drawn_is_also_said(browser: Browser, address: str, federation: Federation) -> None:
    page = opened(browser, address, federation, 1280, 900)

    labels = page.value(
        "[...document.querySelectorAll('.run:not(.past) svg[role=img]')]"
        ".map((one) => one.getAttribute('aria-label'))"
    )
    unnamed = page.value(
        "[...document.querySelectorAll('progress, meter, [role=group], section, nav')]"
        ".filter((one) => !one.getAttribute('aria-label')).length"
    )

    assert [label.split(" by round")[0] for label in labels] == ["accuracy", "loss", "ε spent"]
    assert labels[0].endswith("coordinator: 0.560 in round 1, 0.800 in round 12.")
    assert unnamed == 0
    assert page.value("document.getElementById('alerts').getAttribute('aria-live')") == "polite"
    assert page.value("document.documentElement.lang") == "en"


CONTRAST = """
(() => {
  const lit = (c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * lit(r) + 0.7152 * lit(g) + 0.0722 * lit(b);
  const behind = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const color = parts(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const one of document.querySelectorAll("body *")) {
    if (one.closest("svg") && one.tagName !== "text") continue;
    if (![...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const style = getComputedStyle(one);
    const [a, b] = [light(parts(one.tagName === "text" ? style.fill : style.color)),
      light(behind(one))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${one.tagName}.${one.className} ${ratio}`);
  }
  return poor;
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_has_the_contrast_that_wcag_asks_for(
    browser: Browser, address: str, federation: Federation, dark: bool
) -> None:
    page = browser.page(1280, 900, dark=dark)
    page.open(f"{address}/?token={federation.page_token()}")
    page.until(READY)

    assert page.value(CONTRAST) == []
    light = page.value("getComputedStyle(document.body).backgroundColor") == "rgb(246, 248, 249)"
    assert light != dark


def test_a_change_is_shown_without_losing_what_the_reader_opened(
    browser: Browser, tmp_path: Path
) -> None:
    federation = example(tmp_path / "heart", time.time())
    with serving(federation) as address:
        page = opened(browser, address, federation, 390, 844)
        page.value("document.querySelector('.rounds').open = true")
        page.value("document.querySelector('.rounds .scroll').scrollLeft = 40")
        shifts = "window.moved = 0; new PerformanceObserver((list) => { for (const one of "
        page.value(
            shifts + "list.getEntries()) window.moved += one.value })"
            ".observe({ type: 'layout-shift', buffered: false })"
        )
        report(
            federation,
            "bergen",
            time.time(),
            activity="training",
            step=41,
            steps=200,
            round=13,
            run="heart-disease-3f9c21d07a44",
        )
        page.until("document.body.innerText.includes('step 41 of 200')")

        assert page.value("document.querySelector('.rounds').open")
        assert page.value("document.querySelector('.rounds .scroll').scrollLeft") == 40
        assert page.value("window.moved") < 0.1
        assert page.complaints == []


def test_what_a_site_says_is_text_and_never_markup(browser: Browser, tmp_path: Path) -> None:
    federation = make(tmp_path / "heart")
    attack = "<img src=x onerror=\"document.title='in'\"><script>document.title='in'</script>\u202e"
    add_site(federation, "aarhus", version=attack[:100])
    report(federation, "aarhus", time.time(), activity="waiting", reason=attack, version=attack)
    add_run(federation, "tiny-1", table_text(), state="running", detail=attack)
    with serving(federation) as address:
        page = opened(browser, address, federation, 390, 844)

        assert "<img src=x onerror=" in page.value("document.body.innerText")
        assert "\u202e" not in page.value("document.body.innerText")
        assert page.value("document.querySelectorAll('img, main script').length") == 0
        assert page.value("document.title") == "heart: Anabranch"
        assert page.complaints == []


def test_a_lost_connection_is_said_with_its_time_and_taken_up_again(
    browser: Browser, tmp_path: Path
) -> None:
    federation = make(tmp_path / "heart")
    with serving(federation) as address:
        page = opened(browser, address, federation, 390, 844)
        page.until("document.getElementById('link').textContent === 'live'")
        port = int(address.rpartition(":")[2])
    page.until("/connection lost, since \\d\\d:\\d\\d:\\d\\d/.test(document.body.innerText)")
    assert "heart" in page.value("document.body.innerText")  # what was known is still shown
    add_site(federation, "aarhus")

    with serving(federation, port=port):
        page.until("document.getElementById('link').textContent === 'live'")
        page.until("document.body.innerText.includes('aarhus')")


def test_without_a_token_the_browser_is_told_how_to_get_in(browser: Browser, address: str) -> None:
    page = browser.page(390, 844)
    page.send("Network.clearBrowserCookies")
    page.open(address)
    page.until("document.querySelector('h1')?.textContent === 'Not signed in'")

    assert "aarhus" not in page.value("document.body.innerText")


def test_the_picture_in_the_document_is_one_of_the_page_and_small() -> None:
    picture = (ROOT / "docs" / "images" / "coordinator_page.png").read_bytes()

    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (1280, 900)
    assert len(picture) <= 150_000
