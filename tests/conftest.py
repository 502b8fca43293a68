from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and published weights; tests that need it skip where it is missing."""
    root = Path(os.environ.get("EXCITE_SHARED", Path(__file__).parents[1] / ".." / "shared"))
    if (root / "data").is_dir():
        return root / "data"
    if os.environ.get("EXCITE_REQUIRE_SHARED") == "1":
        pytest.fail(f"no folder {root / 'data'}, and EXCITE_REQUIRE_SHARED=1 says that there must be one")
    pytest.skip(f"no folder {root / 'data'}: set EXCITE_SHARED to the folder that holds data/")
