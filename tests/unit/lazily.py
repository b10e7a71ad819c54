"""Large modules, imported where they are used: each process that collects the tests would import them, and vLLM takes 5 s."""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType
from typing import Any


def imported(name: str) -> ModuleType:
    """Import ``name``, and keep the garbage collector from looking through it again and again (0.3 s each time for vLLM)."""
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


class Lazily:
    """Stands in for the module ``name``, which is imported when its first attribute is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # pytest inspects every name in a test file
            raise AttributeError(attribute)
        return getattr(imported(self._name), attribute)
