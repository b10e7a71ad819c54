"""The Python that has imported vLLM ends with the tests of this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from warm_python import WarmPython

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package", autouse=True)
def end_of_warm_python() -> Iterator[None]:
    yield
    WarmPython.end()
