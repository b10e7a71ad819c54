"""The server of test_verl.py, a Ray actor. It imports nothing, so it is there at once."""

from __future__ import annotations

from typing import Any


class Server:
    """In the place of verl's vLLM server, which needs a GPU. It has no method that loads weights."""

    def __init__(self) -> None:
        self._calls: list[str] = []
        self._steps: int | None = None

    def set_global_steps(self, steps: int) -> None:
        self._note("set_global_steps")
        self._steps = steps

    def abort_all_requests(self, reject_request: bool) -> dict[str, Any]:
        self._note("abort_all_requests")
        return {"aborted_count": 0, "request_ids": []}

    def wait_for_requests_to_drain(self) -> None:
        self._note("wait_for_requests_to_drain")

    def release_kv_cache(self) -> None:
        self._note("release_kv_cache")

    def resume_kv_cache(self) -> None:
        self._note("resume_kv_cache")

    def resume_engine_generation(self) -> None:
        self._note("resume_engine_generation")

    def open_submission_gate(self) -> None:
        self._note("open_submission_gate")

    def take_calls(self) -> tuple[list[str], int | None]:
        calls, self._calls = self._calls, []
        return calls, self._steps

    def _note(self, call: str) -> None:
        self._calls.append(call)
