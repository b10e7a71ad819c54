"""The server of test_verl.py, a Ray actor. It imports nothing, so it is there at once."""

from __future__ import annotations

from typing import Any


class Server:
    """In the place of verl's vLLM server, which needs a GPU. It has no method that loads weights."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, Any]] = []

    def set_global_steps(self, steps: int) -> None:
        self._calls.append(("set_global_steps", steps))

    def abort_all_requests(self, reject_request: bool) -> None:
        self._calls.append(("abort_all_requests", reject_request))

    def resume_generation(self) -> None:
        self._calls.append(("resume_generation", None))

    def release_kv_cache(self) -> None:
        self._calls.append(("release_kv_cache", None))

    def resume_kv_cache(self) -> None:
        self._calls.append(("resume_kv_cache", None))

    def take_calls(self) -> list[tuple[str, Any]]:
        calls, self._calls = self._calls, []
        return calls
