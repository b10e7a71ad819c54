"""Engines on a CPU in processes of their own, one after the other, which are forked from one that has imported vLLM."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
from typing import TYPE_CHECKING, Any

from areal_vllm_ext.demo.deployment import free_ports

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def import_once() -> None:
    """Import what every process needs, once: the processes are forked, and importing takes ten seconds."""
    import transformers  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.v1.engine.core
    import vllm.v1.engine.llm_engine  # noqa: F401


def apart(function: Callable[[], dict[str, Any]], folder: Path, timeout: float) -> dict[str, Any]:
    """Call ``function`` in a process of its own. Returns what it returns, or ``{"error": why not}``."""
    answer, log = folder / "answer.json", folder / "log.txt"
    answer.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_answer, args=(function, answer, log))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return {"error": f"it took more than {timeout:.0f} s", "stage": "hang"}
    if answer.exists():
        found: dict[str, Any] = json.loads(answer.read_text())
        return found
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return {"error": f"the process ended with {process.exitcode}: {' '.join(last)}", "stage": "crash"}


def _answer(function: Callable[[], dict[str, Any]], answer: Path, log: Path) -> None:
    os.setpgrp()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["VLLM_RPC_BASE_PATH"] = str(answer.parent)  # vLLM leaves the sockets of a process that ends
    os.environ["AREAL_VLLM_DIRECTORY"] = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    try:
        found = function()
    except BaseException as error:
        found = {"error": f"{type(error).__name__}: {error}"[:2000], "stage": getattr(error, "stage", "trial")}
        import traceback

        traceback.print_exc()
    partial = answer.with_suffix(".part")
    partial.write_text(json.dumps(found))
    partial.rename(answer)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(0)  # vLLM's end takes seconds, and nothing is left to lose
