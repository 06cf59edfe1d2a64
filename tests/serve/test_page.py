"""The page, in headless Chromium."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.running_server import RunningServer

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested in Chromium")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
SECONDS = 60_000  # milliseconds, for a busy machine

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield launched
        launched.close()


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, server: RunningServer) -> Iterator[Any]:
    """The page; it must not report an error, nor ask another host for anything."""
    context = browser.new_context(
        color_scheme=request.param, viewport={"width": 1280, "height": 900}
    )
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.on(
        "request",
        lambda sent: (
            None if sent.url.startswith((server.url, "data:")) else problems.append(sent.url)
        ),
    )
    page.goto(server.url)
    page.locator("#model option").nth(1).wait_for(state="attached")
    yield page
    assert problems == []
    context.close()


def slide(page: Any, name: str, value: str) -> None:
    """Move a slider, as a hand or a key does."""
    page.locator(f"#{name}").evaluate(
        "(slider, value) => { slider.value = value;"
        " slider.dispatchEvent(new Event('input', { bubbles: true })); }",
        value,
    )


def ask(page: Any, text: str, tokens: int = 24) -> None:
    """Send `text` with the keyboard and wait for the answer."""
    page.locator("#tokens").fill(str(tokens))
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    page.locator("#status", has_text="Answered").wait_for()


def layers(page: Any) -> list[int]:
    found = page.locator(".assistant .token").evaluate_all(
        "spans => spans.map(s => s.dataset.layer)"
    )
    return [int(layer) for layer in found]


def shot(page: Any, name: str, directory: Path) -> None:
    page.screenshot(path=directory / f"{name}.png", full_page=True)


def test_tokens_are_coloured_by_their_layers(page: Any, tmp_path: Path) -> None:
    slide(page, "mode", "2")
    assert page.locator("#mode-value").inner_text() == "exit"
    page.locator("#compare").check()
    ask(page, "class Stack:\n    def push(self, item):\n")
    assert len(set(layers(page))) > 1
    colours = page.locator(".assistant .token").evaluate_all(
        "spans => [...new Set(spans.map(s => getComputedStyle(s).backgroundColor))]"
    )
    assert len(colours) > 1
    measurements = page.locator("#measurements").inner_text()
    for words in ("Speed", "Mean exit layer", "Like full depth", "of 24 tokens"):
        assert words in measurements
    page.locator("details summary").click()
    counted = page.locator("#histogram tbody td:nth-child(2)").all_inner_texts()
    assert sum(map(int, counted)) == 24
    shot(page, "layers", tmp_path)


def test_lossless_is_like_full_depth(page: Any, tmp_path: Path) -> None:
    page.locator("#compare").check()
    page.get_by_label("accepted draft", exact=True).check()
    ask(page, "x = 1\n" * 20, 40)
    assert "40 of 40 tokens" in page.locator("#measurements").inner_text()
    assert page.locator(".token.differs").count() == 0
    shot(page, "drafts", tmp_path)


def test_the_threshold_moves_the_exits(page: Any) -> None:
    slide(page, "mode", "2")
    means = []
    for tau in ("0.5", "1"):
        page.locator("#clear").click()
        page.locator("#own-threshold").check()
        slide(page, "threshold", tau)
        ask(page, "def main():\n")
        means.append(sum(layers(page)) / len(layers(page)))
    assert means[0] < means[1] == 12


def test_a_model_without_a_chat_template_continues_text(page: Any) -> None:
    page.locator("#model").select_option("bundle")
    assert page.locator("#prompt-label").inner_text() == "Text to continue"
    ask(page, "import os\n")
    assert len(layers(page)) == 24


def test_escape_stops_an_answer(page: Any) -> None:
    page.locator("#tokens").fill("900")
    slide(page, "mode", "0")
    page.locator("#prompt").fill("def main():\n")
    page.locator("#prompt").press("Enter")
    page.locator(".assistant .token").first.wait_for(state="attached")
    page.keyboard.press("Escape")
    page.locator("#status", has_text="Stopped.").wait_for()
    assert 0 < len(layers(page)) < 900
    assert page.locator("#send").is_enabled()


def test_everything_can_be_reached_with_the_keyboard_and_has_a_name(page: Any) -> None:
    page.locator("body").focus()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    wanted = {"model", "key", "log", "prompt", "send", "clear", "mode", "temperature", "tokens"}
    assert wanted <= reached
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button')]"
        ".filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_texts_have_contrast(page: Any) -> None:
    """WCAG AA: 4.5 to 1, also on coloured tokens."""
    slide(page, "mode", "2")
    ask(page, "class Stack:\n    def push(self, item):\n")
    worst = page.evaluate(CONTRAST)
    assert worst >= 4.5


CONTRAST = """
() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const [r, g, b] = rgba(colour).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return rgba(colour)[3] || !element.parentElement ? colour : ground(element.parentElement);
  };
  const texts = [...document.querySelectorAll('body *')].filter(
    (e) => !e.matches(':disabled')
      && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())
  );
  return Math.min(...texts.map((element) => {
    const [a, b] = [getComputedStyle(element).color, ground(element)].map(luminance);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
}
"""
