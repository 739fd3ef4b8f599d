"""The experts' part of the status page in headless Chromium, where this machine has one."""

from typing import Any

import pytest

from tests.support.gateway import HOSTILE, Parrot, gateway, peer, sample_status

pytestmark = pytest.mark.asyncio(loop_scope="module")


def hosted() -> dict[str, Any]:
    common = {"start": 0, "end": 12, "pair_seconds": 0.0002, "dtype": "fp32", "going": "", "coming": ""}
    version = [{"id": "ab" * 32, "number": "1.0.1"}]
    return {
        "hosts": [1, 2, 2, 0],
        "asked": [1.5, 80.0, 3.25, 0.0],
        "leases": [
            {**common, "peer": peer("A"), "experts": "0-2", "asked": 44.75, "versions": version},
            {**common, "peer": peer("B"), "experts": "1-2", "asked": None, "versions": version, "dtype": HOSTILE}
            | {"going": "2", "coming": "3"},
        ],
    }


def shares() -> dict[str, Any]:
    rows = [{"text": "law.txt", "shares": [0.91, 0.09]}, {"text": HOSTILE, "shares": [0.0, 1.0]}]
    return {"number": "1.1.0", "names": ["law", "none"], "rows": rows}


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_hosts_and_shares_are_shown(browser: Any, scheme: str) -> None:
    status = sample_status() | {"experts": {"hosted": hosted(), "shares": shares()}}
    async with gateway(Parrot(), status=status) as running:
        page = await (await browser.new_context(color_scheme=scheme)).new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        await page.goto(f"{running.url}/")
        await page.get_by_text("nobody hosts expert 3").wait_for()
        card = page.locator("#experts-card")
        said = await card.inner_text()
        assert "1-2 (exchanging 2 for 3)" in said
        assert HOSTILE in said
        assert await card.locator(".covered").count() == 3
        assert await card.locator(".uncovered").count() == 1
        assert await card.locator("table").first.locator("tbody tr").count() == 2
        assert await card.get_by_text("91 %").count() == 1
        assert await page.locator("main img").count() == 0
        assert await page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert not wrong


async def test_without_any_there_is_no_card(browser: Any) -> None:
    async with gateway(Parrot(), status=sample_status()) as running:
        page = await browser.new_page()
        await page.goto(f"{running.url}/")
        await page.get_by_text("12 of 12").wait_for()
        assert not await page.locator("#experts-card").is_visible()
