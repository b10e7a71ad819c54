"""An import finder that puts ``server.py`` in the place of AReaL's own vLLM server, whose name is written in AReaL's code.

``python -m areal_vllm_ext.integrations.areal.stand_in`` installs it in this environment, once. It acts in processes that have
AREAL_VLLM_STAND_IN=1. Every start of Python reads the installed line, so this file imports little.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

REPLACED = "areal.engine.vllm_ext.areal_vllm_server"
VARIABLE = "AREAL_VLLM_STAND_IN"
# Guarded, because an environment without this package must still start Python.
_LINE = (
    f"import os; exec('try:\\n import {__package__}.stand_in as s; s.put_in_place()\\nexcept ImportError: pass') "
    f"if os.environ.get('{VARIABLE}') == '1' else None\n"
)


class Finder(MetaPathFinder):
    """Finds our server under the name of AReaL's."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != REPLACED:
            return None
        file = str(Path(__file__).with_name("server.py"))
        return spec_from_file_location(fullname, file, loader=SourceFileLoader(fullname, file))


def put_in_place() -> None:
    """Replace AReaL's server in this process, if AREAL_VLLM_STAND_IN is 1."""
    if os.environ.get(VARIABLE) == "1" and not any(isinstance(one, Finder) for one in sys.meta_path):
        sys.meta_path.insert(0, Finder())


def install(folder: Path | None = None) -> Path:
    """Write the line that Python reads at its start. Returns the file.

    Args:
        folder: default: this environment's site-packages.
    """
    file = (folder or Path(sysconfig.get_path("purelib"))) / "areal_vllm_stand_in.pth"
    file.write_text(_LINE)
    return file


if __name__ == "__main__":
    sys.stdout.write(f"{install()} is written; set {VARIABLE}=1 where AReaL starts its servers\n")
