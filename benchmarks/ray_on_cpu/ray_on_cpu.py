"""A vLLM plugin for dry runs: its Ray executor on CPU, with what Ray calls GPUs (``ray start --num-gpus``) as devices.

Found as a plugin when this folder is on PYTHONPATH. vLLM's CPU platform names no device of Ray's, else all would be there.
"""

from __future__ import annotations


def register() -> None:
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"
