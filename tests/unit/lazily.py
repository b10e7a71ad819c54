"""Modules that are imported where they are used: importing vLLM takes ten seconds, in each process that collects the tests."""

from __future__ import annotations

import importlib
from typing import Any


class Lazily:
    """Stands in for the module ``name``, which is imported with the first attribute that is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # pytest looks at all names of a file of tests
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)
