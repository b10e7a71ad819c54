"""An engine in the user's own process: what ``hooks.control_in_process_engines`` puts in the place of vLLM's methods."""

from __future__ import annotations

import functools
import threading
from typing import Any

from ..vllm_patching import is_ours
from .between_steps import calls_between_steps
from .controller import Controller


def start_control(original: Any) -> Any:
    """Give the client's engine a controller; our calls run on a thread of their own, between two steps."""

    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if not is_ours(vllm_config):
            return
        self._areal_aborted = _collect_aborted(self.engine_core)
        self._areal_lock = threading.RLock()
        self._areal_controller = Controller(self.engine_core, calls_between_steps(self._areal_lock))

    return __init__


def stop_control(original: Any) -> Any:
    """Stop the controller before the client shuts down."""

    @functools.wraps(original)
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
        if controller := self.__dict__.pop("_areal_controller", None):
            controller.stop()
        original(self, *args, **kwargs)

    return shutdown


def locked(original: Any) -> Any:
    """Keep our calls out while the method runs."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        lock = getattr(self, "_areal_lock", None)
        if lock is None:
            return original(self, *args, **kwargs)
        with lock:
            return original(self, *args, **kwargs)

    return method


def with_aborted(original: Any) -> Any:
    """Add to the output the requests that a pause has aborted."""
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    @functools.wraps(original)
    def get_output(self: Any) -> Any:
        outputs = original(self)
        if aborted := getattr(self, "_areal_aborted", None):
            outputs.outputs.extend(EngineCoreOutput(name, [], finish_reason=FinishReason.ABORT) for name in aborted)
            aborted.clear()
        return outputs

    return get_output


def _collect_aborted(engine: Any) -> list[str]:
    """Return the list to which each pause of ``engine`` will add the requests that it aborts."""
    from vllm.v1.request import RequestStatus

    aborted: list[str] = []
    original = engine.pause_scheduler

    @functools.wraps(original)
    def pause_scheduler(mode: str = "abort", clear_cache: bool = True) -> Any:
        if mode == "abort":
            ended = engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
            aborted.extend(request.request_id for request in ended)
        return original(mode, clear_cache)

    engine.pause_scheduler = pause_scheduler
    return aborted
