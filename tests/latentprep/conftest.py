"""Shared by the tests of latentprep: a small folder of images, and the assets where they exist."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pictures import make_folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "images")


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real images and weights, or a skip where this machine has none."""
    folder = os.environ.get("LATENTPREP_ASSETS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LATENTPREP_ASSETS does not name the folder of real images and weights")
    return Path(folder)
