"""The pages in headless Chromium, where this machine has one.

axe-core (npm) looks at them too where AXE_CORE names its axe.min.js, or the environment has it (scripts/ci-packages),
or npm's global folder.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from p2pmodel.gateway import feed
from p2pmodel.gateway.access import Keys
from tests.support.gateway import HOSTILE, WORDS, Parrot, gateway, peer, sample_status

AXE = [
    Path(os.environ.get("AXE_CORE", "/none")),
    *(
        Path(folder, "node_modules/axe-core/axe.min.js")
        for folder in (f"{sys.prefix}/npm", "/usr/local/lib", "/usr/lib")
    ),
]
PHONE = {"width": 360, "height": 740}
KEY = "a-key-of-this-test-0001"

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def opened(browser: Any, url: str, **options: Any) -> tuple[Any, list[str]]:
    """A page, and what went wrong on it: errors, refused scripts, requests to elsewhere."""
    page = await (await browser.new_context(**options)).new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(url[:20]) else None)
    await page.goto(url)
    return page, wrong


async def overflow(page: Any) -> int:
    return int(await page.evaluate("document.documentElement.scrollWidth - innerWidth"))


async def test_the_status_page_shows_the_model_and_takes_no_string_for_html(browser: Any) -> None:
    async with gateway(Parrot(), status=sample_status()) as running:
        page, wrong = await opened(browser, f"{running.url}/", viewport={"width": 1280, "height": 900})
        await page.get_by_text("12 of 12").wait_for()
        assert await page.locator("#connection").inner_text() == "live"
        assert await page.locator("#layers .bar:not(.moving)").count() == 5
        assert await page.locator("#versions details").count() == 6
        assert await page.locator("#curves polyline").count() == 3
        assert await page.get_by_text("voting: maintainers examine").count() == 1
        assert HOSTILE in await page.locator("main").inner_text()
        assert await page.locator("main img").count() == 0
        assert await page.locator("#join").inner_text() == sample_status()["join"]
        assert await overflow(page) <= 0
        assert not wrong


async def test_what_changes_is_shown_and_said(browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "EVERY_SECONDS", 0.1)
    status = sample_status()
    async with gateway(Parrot(), status=status) as running:
        page, wrong = await opened(browser, f"{running.url}/")
        await page.get_by_text("12 of 12").wait_for()
        await page.locator("#versions summary").nth(1).click()
        status["leases"] = [lease for lease in status["leases"] if lease["peer"] != peer("C")]
        status["coverage"] = [2, 2, 2, 2, 0, 0, 1, 1, 2, 2, 2, 2]
        await page.get_by_text("10 of 12").wait_for()
        assert await page.locator("#layers .uncovered").count() == 2
        assert "not usable" in await page.locator("#summary").inner_text()
        assert "Host …CCCCCCCC has gone." in (await page.locator("#news").text_content() or "")
        assert await page.locator("#versions details[open]").count() == 1
        assert not wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_is_usable_on_a_phone_by_keyboard_and_in_the_dark(browser: Any, scheme: str) -> None:
    async with gateway(Parrot(), status=sample_status()) as running:
        page, wrong = await opened(browser, f"{running.url}/", viewport=PHONE, color_scheme=scheme)
        await page.get_by_text("12 of 12").wait_for()
        assert await overflow(page) <= 0
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.textContent") == "Skip to the status"
        await page.locator("#versions summary").first.focus()
        await page.keyboard.press("Enter")
        assert await page.locator("#versions details[open]").count() == 1
        assert await overflow(page) <= 0
        assert not wrong


async def test_a_chat(browser: Any) -> None:
    parrot = Parrot()
    async with gateway(parrot, keys=Keys([KEY])) as running:
        page, _ = await opened(browser, f"{running.url}/chat", viewport=PHONE)
        await page.fill("#key", KEY)
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#model option", state="attached")
        for _ in range(2):
            await page.fill("#prompt", HOSTILE)
            await page.press("#prompt", "Enter")
            await page.get_by_text("The answer is complete.").wait_for()
            await page.evaluate("document.getElementById('state').textContent = ''")
        assert "".join(WORDS) in await page.locator("#turns").inner_text()
        assert HOSTILE in await page.locator("#turns").inner_text()
        assert await page.locator("#turns img").count() == 0
        assert [m["role"] for m in parrot.requests[-1].messages or ()] == ["user", "assistant", "user"]
        assert await overflow(page) <= 0


async def test_without_a_chat_template_it_completes_and_an_answer_can_be_stopped(browser: Any) -> None:
    parrot, gate = Parrot(chat=False), asyncio.Semaphore(2)
    parrot.step = gate.acquire
    async with gateway(parrot) as running:
        page, wrong = await opened(browser, f"{running.url}/chat")
        await page.get_by_text("no chat template").wait_for()
        await page.fill("#prompt", "zero ")
        await page.get_by_role("button", name="Continue").click()
        await page.get_by_text("zero one two").wait_for()
        await page.get_by_role("button", name="Stop").click()
        await page.get_by_text("Stopped.").wait_for()
        for _ in range(100):
            if not parrot.open:
                break
            await asyncio.sleep(0.05)
        assert parrot.open == 0
        assert parrot.requests[-1].prompts == ("zero ",)
        assert not wrong


@pytest.mark.parametrize("path", ["/", "/chat"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing(browser: Any, path: str, scheme: str) -> None:
    axe = next((file for file in AXE if file.is_file()), None)
    if axe is None:
        pytest.skip("axe-core is not installed: scripts/ci-packages, or AXE_CORE=…/axe.min.js")
    async with gateway(Parrot(), status=sample_status()) as running:
        page, _ = await opened(browser, running.url + path, color_scheme=scheme, bypass_csp=True)
        await page.wait_for_selector("#versions details" if path == "/" else "#model option", state="attached")
        if path == "/":
            await page.evaluate("for (const node of document.querySelectorAll('details')) node.open = true")
        else:
            await page.fill("#prompt", "hi")
            await page.press("#prompt", "Enter")
            await page.get_by_text("The answer is complete.").wait_for()
        await page.add_script_tag(path=str(axe))
        found = await page.evaluate("axe.run()")
        assert [(x["id"], [node["html"] for node in x["nodes"]]) for x in found["violations"]] == []
