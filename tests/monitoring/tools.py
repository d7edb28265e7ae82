"""Prometheus' own programs, of Debian's packages; `make tools` puts them into .tools."""

import os
import shutil

import pytest

from tests.conftest import ROOT

PLACES = f"{ROOT / '.tools' / 'usr' / 'bin'}:{os.environ['PATH']}"


def tool(name: str) -> str:
    """Its path; the test is skipped where it is not there."""
    found = shutil.which(name, path=PLACES)
    if found is None:
        pytest.skip(f"there is no {name} here: `make tools` gets it")
    return found
