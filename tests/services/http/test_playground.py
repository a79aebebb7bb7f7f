"""The playground in a headless browser, against a gateway over a scripted pair. Skipped where there
is no Chromium (apt-get install chromium)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from s2t_shared.decode.scripted import ScriptedSelector
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.live import LiveVersions
from s2t_shared.versions.registry import Registry
from tests.helpers.chromium import chromium, needs_chromium, new_page
from tests.helpers.serving import (
    LLM_TEXT,
    SLM_TEXT,
    FixedVersions,
    http_gateway,
    local_selector,
    proposer_service,
    scripted_slm,
    slow_slm,
)
from tests.helpers.versions import publish

pytestmark = needs_chromium
expect.set_options(timeout=30_000)  # of a busy machine; what holds is seen at once
TOKEN = "a-token-of-enough-bytes"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with new_page(browser) as found:
        yield found


@pytest.fixture
def phone(browser: Browser) -> Iterator[Page]:
    with new_page(browser, **PHONE) as found:
        yield found


def ask(page: Page, url: str, **settings: str) -> None:
    """Ask, and wait for both answers."""
    page.goto(url)
    expect(page.locator("#model")).to_have_text("bundled")
    page.fill("#prompt", "a prompt")
    for name, value in settings.items():
        page.fill(f"#{name}", value)
    page.click("#go")
    expect(page.locator("article[aria-busy=false]")).to_have_count(2)


def test_two_modes_answer_side_by_side(page: Page, url: str) -> None:
    """Each its own text and counters; what the LLM changed is marked, and only there."""
    ask(page, url)
    greedy, s2t = page.locator("article").all()
    assert (greedy.locator(".text").text_content(), s2t.locator(".text").text_content()) == (
        SLM_TEXT,
        LLM_TEXT,
    )
    expect(greedy.locator(".token")).to_have_count(0)
    expect(s2t.locator(".token.flipped")).to_have_text(["other", "other"])
    expect(s2t.locator(".asked")).to_have_text("2, 2")
    expect(s2t.locator(".tokens")).to_have_text("9")
    expect(s2t.locator(".forwards")).to_have_text("0.222")
    expect(greedy.locator(".forwards")).to_have_text("0.000")


def test_a_marked_token_says_what_it_could_have_been(page: Page, url: str) -> None:
    """By mouse and by keyboard, for a screen reader too; Escape closes it."""
    ask(page, url)
    token, tip = page.locator(".answers .token").first, page.locator("#tip")
    expect(tip).to_be_hidden()
    token.hover()
    expect(tip).to_be_visible()
    page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    page.locator("article").nth(1).locator("select").focus()
    page.keyboard.press("Tab")
    expect(token).to_be_focused()
    expect(tip).to_contain_text("Chosen by the large model")
    expect(tip.locator("tbody tr")).to_have_count(2)
    expect(tip.locator("tbody tr").first).to_contain_text("50.0 %")
    expect(tip.locator("tr.chosen")).to_contain_text("99.0 %")
    assert token.get_attribute("aria-describedby") == "tip"
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_the_local_selectors_choice_and_its_score(page: Page, tmp_path: Path) -> None:
    service = proposer_service(versions=FixedVersions(live=local_selector("v1")))
    with http_gateway(tmp_path, service) as url:
        page.goto(url)
        expect(page.locator("#service")).to_contain_text("version v1")
        page.locator(".mode").nth(0).select_option("s2t_local")
        page.fill("#prompt", "a prompt")
        page.click("#go")
        expect(page.locator("article[aria-busy=false]")).to_have_count(2)
        page.locator("article").first.locator(".token").first.focus()
        expect(page.locator("#tip")).to_contain_text("Chosen by the local selector")
        expect(page.locator("#tip thead")).to_contain_text("Local score")


def test_a_screen_reader_hears_the_beginning_and_the_end(page: Page, url: str) -> None:
    """Not each token: the answers are busy while they are written, and said once they are there."""
    ask(page, url)
    status = page.get_by_role("status").filter(has_text="greedy: 9 tokens")
    expect(status).to_contain_text(LLM_TEXT.strip())
    assert page.locator(".text[aria-live]").count() == 0
    expect(page.get_by_role("textbox", name="Question")).to_be_visible()
    expect(page.get_by_role("combobox", name="Trigger")).to_be_visible()
    for name in ("Budget, % of steps", "Candidates", "Tokens at most"):
        expect(page.get_by_role("spinbutton", name=name)).to_be_visible()
    for number in (1, 2):
        article = page.get_by_role("article", name=f"Answer {number}")
        expect(article.get_by_role("combobox", name="Mode")).to_be_visible()


def test_degraded_steps_are_marked_as_such(page: Page, tmp_path: Path) -> None:
    slm = scripted_slm()
    service = proposer_service(slm, ScriptedSelector(available=False))
    with http_gateway(tmp_path, service) as url:
        ask(page, url)
        expect(page.locator("article .token.degraded")).to_have_text(["five", "seven"])
        expect(page.locator("#service")).to_contain_text("no LLM")


def test_stop_ends_the_answers(page: Page, tmp_path: Path) -> None:
    service = proposer_service(slow_slm())
    with http_gateway(tmp_path, service) as url:
        page.goto(url)
        page.fill("#prompt", "a prompt")
        page.fill("#max-tokens", "4000")
        page.locator("#prompt").press("Control+Enter")
        expect(page.locator(".text").first).to_contain_text("word")
        page.click("#stop")
        expect(page.locator(".state")).to_have_text(["stopped", "stopped"])
        expect(page.locator("#stop")).to_be_disabled()


def test_an_error_is_said_where_it_happened(page: Page, url: str) -> None:
    page.goto(url)
    page.locator(".mode").nth(0).select_option("s2t_local")
    page.fill("#prompt", "a prompt")
    page.click("#go")
    expect(page.locator("article .refused")).to_contain_text("no local selector is live")
    expect(page.locator(".text").nth(1)).to_have_text(LLM_TEXT.strip())


def test_local_sufficiency_of_own_answers(page: Page, url: str) -> None:
    """The LLM's choice was the SLM's second, both times."""
    ask(page, url)
    page.click("nav >> text=Local sufficiency")
    rows = page.locator("#sufficiency-table tbody tr")
    expect(rows.nth(0)).to_contain_text("0.0 %")
    expect(rows.nth(1)).to_contain_text("100.0 %")
    expect(page.locator("caption")).to_have_text("2 steps")


def test_versions_with_the_gates_verdict(page: Page, tmp_path: Path, url: str) -> None:
    page.goto(f"{url}/#versions")
    expect(page.locator("#versions-table")).to_contain_text("None is published yet")
    registry = Registry(tmp_path / "versions")
    live = LiveVersions(registry.root)
    runtime = ModelRuntime.load("bundled", "float32", "cpu", 1 << 26)
    old, new = (publish(registry, runtime, seed=seed) for seed in (1, 2))
    live.promote(old)
    live.record("gate", new, passed=False, reasons=["Agree@1 fell"], figures={})
    with http_gateway(tmp_path, proposer_service()) as found:
        page.goto(f"{found}/#versions")
        rows = page.locator("#versions-table .versions > li")
        expect(rows).to_have_count(2)
        first, second = rows.all()
        expect(first).to_contain_text(new)
        expect(first).to_contain_text("Agree@1 fell")
        expect(first.locator(".refused")).to_have_text("refused")
        expect(second.locator(".badge")).to_have_text("live, 100 % of the requests")


def test_a_secured_service_asks_for_the_token(page: Page, tmp_path: Path) -> None:
    """A wrong one is said to be wrong; the right one is kept for this tab only."""
    file = tmp_path / "token"
    file.write_text(TOKEN)
    settings = {"security.token_file": str(file)}
    with http_gateway(tmp_path, proposer_service(), **settings) as url:
        page.goto(url)
        expect(page.locator("#alert")).to_contain_text("no valid token")
        page.get_by_label("Token, kept").fill("wrong")
        page.click("text=Use it")
        expect(page.locator("#alert")).to_contain_text("no valid token")
        page.get_by_label("Token, kept").fill(TOKEN)
        page.click("text=Use it")
        ask(page, url)
        expect(page.locator(".text").nth(1)).to_have_text(LLM_TEXT.strip())
        assert page.evaluate("localStorage.length") == 0


def test_on_a_phone_nothing_is_cut_off(phone: Page, url: str) -> None:
    """No sideways scrolling on any page; a token is not under its own explanation."""
    ask(phone, url)
    for name in ("ask", "versions", "sufficiency"):
        phone.goto(f"{url}/#{name}")
        wide = phone.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, name
    ask(phone, url)
    token = phone.locator(".answers .token").first
    token.tap()
    tip = phone.locator("#tip")
    expect(tip).to_be_visible()
    below, above = tip.bounding_box(), token.bounding_box()
    assert below is not None and above is not None
    assert above["y"] + above["height"] <= below["y"]


def test_a_mouse_in_a_narrow_window(browser: Browser, url: str) -> None:
    """The page scrolled from under the mouse, so that what it pointed at came and went for ever."""
    with new_page(browser, viewport={"width": 390, "height": 844}) as page:
        ask(page, url)
        token, tip = page.locator(".answers .token").first, page.locator("#tip")
        token.hover(timeout=10_000)
        expect(tip).to_be_hidden()
        token.click()
        expect(tip).to_be_visible()


def test_dark_and_light_have_enough_contrast(browser: Browser, url: str) -> None:
    """WCAG's 4.5 for text, on every token's own ground too."""
    for scheme in ("light", "dark"):
        with new_page(browser, color_scheme=scheme) as page:
            ask(page, url)
            for selector in (
                "h1",
                ".hint",
                "dt",
                ".answers .token.flipped",
                "#go",
                "nav a",
                "label",
            ):
                ratio = page.evaluate(CONTRAST, selector)
                assert ratio >= 4.5, f"{selector} in {scheme}: {ratio:.2f}"


CONTRAST = """selector => {
  const part = (n) => (n /= 255) <= 0.03928 ? n / 12.92 : ((n + 0.055) / 1.055) ** 2.4;
  const light = (c) => {
    const [r, g, b] = c.match(/[\\d.]+/g).map(Number);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const text = document.querySelector(selector);
  let ground = text;
  while (/, 0\\)|transparent/.test(getComputedStyle(ground).backgroundColor)) {
    ground = ground.parentElement;
  }
  const a = light(getComputedStyle(text).color);
  const b = light(getComputedStyle(ground).backgroundColor);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
