"""The launcher's actors start without torch, which takes seconds and hundreds of MB in each of them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")
def test_launcher_and_owner_import_no_torch() -> None:
    script = """
import sys
from areal_vllm_ext.launcher import launch
from areal_vllm_ext.launcher.owner import ReplicaOwner
heavy = {"torch", "rich", "vllm", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
