"""The page's pictures for the README: `python -m tests.screenshots` draws, edits and asks in Chromium and writes
docs/pictures/app-*.png. The same clicks on the same release give the same pictures."""

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page

from tests import browser

RELEASE = Path("assets/world/release")
OUT = Path("docs/pictures")
PROMPT = "a red circle left of a blue square"
SEED = "1"


def main() -> None:
    """Writes the three pictures."""
    with browser.served(RELEASE) as url, browser.browsing(url) as page:
        draw(page)
        edit(page)
        chat(page)


def draw(page: Page) -> None:
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_role("spinbutton", name="Seed").first.fill(SEED)
    page.click("#draw")
    page.wait_for_function("document.querySelector('#draw-note').innerText.includes(' in ')")
    shoot(page, "draw")


def edit(page: Page) -> None:
    picture = page.request.get(page.locator(".pictures img").first.get_attribute("src") or "").body()
    page.get_by_role("tab", name="Edit").click()
    page.set_input_files("#before input[type=file]", {"name": "drawn.png", "mimeType": "image/png", "buffer": picture})
    page.wait_for_selector("#before img")
    page.get_by_label("Instruction").fill("change the colour of the circle to yellow")
    page.click("#edit")
    page.wait_for_function("document.querySelector('#edit-note').innerText.includes(' in ')")
    shoot(page, "edit")


def chat(page: Page) -> None:
    page.get_by_role("tab", name="Chat").click()
    entry = page.locator("#entry textarea")
    entry.fill("/draw a yellow star above a red square")
    entry.press("Enter")
    page.wait_for_selector(".chat .bot img")
    page.wait_for_function("!document.querySelector('.chat').innerText.includes('Step')")
    entry.fill("what colour is the square?")
    entry.press("Enter")
    page.wait_for_function("document.querySelectorAll('.chat .bot').length == 2")
    shoot(page, "chat")


def shoot(page: Page, name: str) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # until what moves stands still
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        path = OUT / f"app-{name}.png"
        shot.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, f"{path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    sys.exit(main())
