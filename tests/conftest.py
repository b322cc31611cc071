"""The environment of every test: offline, away from the user's own caches and servers."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_SCRATCH = tempfile.TemporaryDirectory(prefix="fpt-sweep-tests-", ignore_cleanup_errors=True)

# At import, not in a fixture: libraries read these when they are first imported, and processes that
# tests start inherit them.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "FPT_SWEEP_CACHE": f"{_SCRATCH.name}/cache",
        # What Ray does without it depends on a file in the home folder that another Ray left.
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
)
for _name in ("FPT_SWEEP_RESULTS", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data sets that the variable FPT_SWEEP_DATA names."""
    folder = os.environ.get("FPT_SWEEP_DATA")
    if not folder:
        pytest.skip("FPT_SWEEP_DATA names no folder of real data")
    return Path(folder)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A headless Chromium, the one that is installed."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
