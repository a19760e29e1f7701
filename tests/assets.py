"""Optional assets: a test that needs one skips with a sentence, or fails where `DISTILL_REQUIRE_ASSETS=1`."""

import os

import pytest


def need(condition: object, how: str) -> None:
    """Go on where `condition` holds; else skip with `how` (how to get it), or fail where assets are required."""
    if condition:
        return
    if os.environ.get("DISTILL_REQUIRE_ASSETS") == "1":
        pytest.fail(how)
    pytest.skip(how)
