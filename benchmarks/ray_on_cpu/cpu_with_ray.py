"""The platform: see ray_on_cpu.py."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class CpuWithRay(CpuPlatform):
    ray_device_key = "GPU"
