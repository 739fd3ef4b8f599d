"""Integration tests fork their nodes, see tests/support/forked.py; and what several of them start from."""

import os
import shutil
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
import torch

from p2pmodel.cli import localswarm
from tests.support import forked


@pytest.fixture(autouse=True, scope="session")
def nodes_are_forked() -> None:
    localswarm.launch = forked.launch  # type: ignore[assignment]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    """Headless Chromium: CHROMIUM names it, or it is on the path; where there is none, the test is skipped."""
    playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        await browser.close()
