import shutil

import pytest


@pytest.fixture(scope="session")
def browser() -> str:
    """A browser that can run without a screen."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium or Chrome on PATH")
    return program
