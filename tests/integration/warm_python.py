"""Run scripts that start an engine in their own process, each in a fork of a Python that has imported vLLM already.

The import takes more time than the engine: 7 of 12 seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

IMPORTS = ("torch", "transformers.models.auto.modeling_auto", "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker")

START = """
import json, os, sys, threading
import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

folder = sys.argv[1]
SETTINGS = dict(enforce_eager=True, max_model_len=512, dtype="float32", kv_cache_memory_bytes=1 << 26,
                worker_extension_cls="areal_vllm_ext.worker.WorkerExtension")
llm = LLM(folder, **SETTINGS)
"""

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Threads of OpenMP do not survive a fork.
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` with ``folder`` as its argument; fail after 200 seconds."""
    # Imported here, so that the Python that runs the scripts has not imported the package.
    from areal_vllm_ext.demo.deployment import free_ports

    directory = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    # vLLM leaves the sockets of a process that ends, and their paths have 107 characters at most.
    with tempfile.TemporaryDirectory() as sockets:
        settings = {**SETTINGS, "AREAL_VLLM_DIRECTORY": directory, "VLLM_RPC_BASE_PATH": sockets}
        return WarmPython.get().run(script, folder, {**os.environ, **settings, **environment}, timeout=200)


class WarmPython:
    """The Python that forks itself; it ends with this process."""

    _one: WarmPython | None = None

    @classmethod
    def get(cls) -> WarmPython:
        """Return the one of this process; start it where none runs."""
        if cls._one is None or cls._one._process.poll() is not None:
            cls._one = cls()
        return cls._one

    @classmethod
    def end(cls) -> None:
        """End the one of this process, if any."""
        if cls._one is not None:
            cls._one.close()
            cls._one = None

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **SETTINGS},
            start_new_session=True,
        )

    def run(
        self, script: str, folder: Path, environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        output, errors = folder / "script.out", folder / "script.err"
        job = {"script": script, "argument": str(folder), "environment": environment}
        _stream(self._process.stdin).write(json.dumps({**job, "output": str(output), "errors": str(errors)}) + "\n")
        _stream(self._process.stdin).flush()
        too_late = threading.Timer(timeout, self.close)
        too_late.start()
        code = _stream(self._process.stdout).readline()
        too_late.cancel()
        said = [file.read_text(errors="replace") if file.exists() else "" for file in (output, errors)]
        assert code, f"the script did not end within {timeout:.0f} s; it wrote: {said[1][-3000:]}"
        return subprocess.CompletedProcess([script], int(code), *said)

    def close(self) -> None:
        """End it, and the script that it runs, if any."""
        with contextlib.suppress(BrokenPipeError):
            _stream(self._process.stdin).close()
        self._process.wait()
        _stream(self._process.stdout).close()


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _next_job() -> dict[str, Any]:
    """Return in a fork for each job that comes on standard input; the first process ends with it."""
    while line := sys.stdin.readline():
        if (pid := os.fork()) == 0:
            os.setsid()
            return dict(json.loads(line))
        ended = os.pidfd_open(pid)
        # Nothing is written while a job runs, so standard input is ready only at its end.
        if ended not in select.select([ended, 0], [], [])[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        os.close(ended)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()
    os._exit(0)


def main() -> None:
    for module in IMPORTS:
        importlib.import_module(module)
    job = _next_job()
    for number, (path, mode) in enumerate(((os.devnull, "r"), (job["output"], "w"), (job["errors"], "w"))):
        with Path(path).open(mode) as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv[:] = ["-c", job["argument"]]
    exec(compile(job["script"], "<script>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
