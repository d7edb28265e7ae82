"""Prometheus' own programs and a browser, of Debian's packages; `make tools` installs them."""

import shutil

import pytest


def tool(name: str) -> str:
    """Its path; the test is skipped where it is not there."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name} here: `make tools` installs it")
    return found
