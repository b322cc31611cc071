"""What the tests of pages share: whether everybody can read one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def barriers(browser: Browser, url: str, width: int, scheme: Literal["light", "dark"]) -> list[str]:
    """Return what axe-core finds on a page that keeps people from reading it.

    Args:
        browser: A running browser.
        url: The page.
        width: Of the window, in pixels.
        scheme: The colour scheme that the reader prefers.
    """
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(url)
    found = Axe().run(page).response["violations"]
    page.close()
    return [
        f"{one['id']} ({one['help']}): {node['html'][:200]} {node.get('failureSummary', '')}"
        for one in found
        for node in one["nodes"]
    ]
