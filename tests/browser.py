"""A browser for tests of the status page: Debian's chromium, driven by Playwright, which never brings its own.

A page is opened on the service's own address. What its console says, and every violation of its policy, is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
Scheme: TypeAlias = Literal["light", "dark"]

WAIT_MS = 40_000
"""Bound of every wait; none of them is a measure of anything."""

_NOTE_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", event =>
    window.violations.push(`${event.violatedDirective}: ${event.blockedURI} ${event.sample}`));
"""


def chromium() -> str | None:
    """Where the browser is; None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def running_browser(executable: str) -> Iterator[Browser]:
    """Start the browser, with a profile of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Window:
    """One page in a window of its own, and what went wrong in it."""

    page: Page
    said: list[str] = field(default_factory=list)
    """Warnings and errors of the console, and exceptions of the script."""

    def hear(self, message: ConsoleMessage) -> None:
        """Keep what the console says, if it is a warning or worse."""
        if message.type in {"error", "warning"}:
            self.said.append(message.text)

    def text(self, selector: str) -> str:
        """What stands in the first such element."""
        return self.page.locator(selector).first.inner_text()

    def wait(self, expression: str) -> None:
        """Wait until a JavaScript *expression* is true."""
        self.page.wait_for_function(f"() => {expression}", timeout=WAIT_MS)

    def violations(self) -> list[str]:
        """What the page's policy has refused."""
        found: list[str] = self.page.evaluate("window.violations")
        return found


@contextmanager
def window(
    browser: Browser,
    address: str,
    *,
    width: int = 1280,
    height: int = 900,
    scheme: Scheme = "light",
    script: bool = True,
    **more: Any,
) -> Iterator[Window]:
    """Open *address* in a window."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        java_script_enabled=script,
        locale="en-GB",
        **more,
    )
    try:
        opened = Window(context.new_page())
        opened.page.set_default_timeout(WAIT_MS)
        opened.page.on("console", opened.hear)
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        context.add_init_script(_NOTE_VIOLATIONS)
        opened.page.goto(address, wait_until="domcontentloaded")
        yield opened
    finally:
        context.close()
