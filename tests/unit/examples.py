"""How many examples hypothesis tries: few in each run, many in ``make test-deep``."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def examples(count: int, **options: Any) -> settings:
    """Try ``count`` examples, and 40 times as many in ``make test-deep``, as the profiles do by default."""
    return settings(max_examples=40 * count if NIGHTLY else count, **options)
