"""A real Chromium without a window, driven through chromedriver.

Debian's packages are chromium and chromium-driver. Nothing but loopback is ever asked: the
browser's options keep it quiet, and Selenium looks for no driver by itself.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

from tests.servers.ports import find_program

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--hide-scrollbars --lang=en-GB"
).split()

#: Seconds that a page may take to become what a test waits for, on a busy machine.
PATIENCE = 60


class Browser:
    """One window."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def resize(self, width: int, height: int = 900) -> None:
        """Give pages this many CSS pixels."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def prefer(self, scheme: str) -> None:
        """Say that its user prefers "light" or "dark"."""
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )

    def wait_for(self, condition: Any) -> Any:
        """Return what ``condition(driver)`` gives once that is true."""
        return WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05).until(condition)

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns."""
        return self.driver.execute_script(script, *arguments)

    @property
    def complaints(self) -> list[str]:
        """What the page has written to its console since this was asked last."""
        return [str(line["message"]) for line in self.driver.get_log("browser")]


@contextlib.contextmanager
def browser(*, javascript: bool = True) -> Iterator[Browser]:
    """Start a Chromium that knows nothing, for a ``with`` block."""
    options = Options()
    options.binary_location = find_program("chromium", "google-chrome", package="chromium")
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if not javascript:
        options.add_experimental_option(
            "prefs", {"profile.managed_default_content_settings.javascript": 2}
        )
    service = Service(find_program("chromedriver", package="chromium-driver"))
    # Helpers of the browser may still write there while it is removed.
    profile = tempfile.mkdtemp(prefix="chromium-")
    options.add_argument(f"--user-data-dir={profile}")
    try:
        driver = webdriver.Chrome(options, service)
        try:
            yield Browser(driver)
        finally:
            driver.quit()
    finally:
        shutil.rmtree(profile, ignore_errors=True)
