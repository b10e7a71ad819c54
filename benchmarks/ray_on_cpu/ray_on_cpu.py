"""A vLLM platform plugin for dry runs: its Ray executor on CPU, with what ``ray start --num-gpus`` calls GPUs as devices.

Found when this folder is on PYTHONPATH. vLLM's own CPU platform names no device of Ray's; else all would be there.
"""

from __future__ import annotations


def register() -> str:
    return "cpu_with_ray.CpuWithRay"
