"""Work beside generation: on threads that the end of the process waits for, and on CUDA streams of their own."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_THREAD_NAME = "areal-background"
_AT_EXIT_SECONDS = 5.0


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def on_side_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Run the body's device work on a stream of its own, so that it and the engine's steps do not wait for each other."""
    return torch.cuda.stream(_stream(device)) if device.type == "cuda" else contextlib.nullcontext()


def run(function: Callable[..., object], *arguments: Any) -> None:
    """Call ``function`` on a thread of its own."""
    threading.Thread(target=function, args=arguments, name=_THREAD_NAME, daemon=True).start()


def run_later(seconds: float, function: Callable[..., object], *arguments: Any) -> None:
    """Call ``function`` on a thread of its own, in ``seconds``. The end of the process drops the call."""
    timer = threading.Timer(seconds, function, arguments)
    timer.name, timer.daemon = _THREAD_NAME, True
    timer.start()


@atexit.register
def _end_threads() -> None:
    """End these threads: one inside torch at the interpreter's exit aborts the process (``terminate called ...``)."""
    threads = [thread for thread in threading.enumerate() if thread.name == _THREAD_NAME]
    for thread in threads:
        if isinstance(thread, threading.Timer):
            thread.cancel()
        # Reading many tensors may take longer than the wait below. The thread leaves before its next operator.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
    for thread in threads:
        thread.join(_AT_EXIT_SECONDS)
