"""A real ``vllm serve`` with the package on it, for tests that need arguments of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def vllm_server(model: Path, port: int, directory: str, *arguments: str) -> Iterator[Path]:
    """Serve ``model`` as ``m`` while the body runs; yield the path of the log. The body waits until it serves."""
    environment = {
        "AREAL_VLLM_DIRECTORY": directory,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_SERVER_DEV_MODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "m"]
    command += ["--enforce-eager", "--max-model-len", "512", "--dtype", "float32", "--enable-prefix-caching"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-extension-cls", "areal_vllm_ext.worker.WorkerExtension", *arguments]
    path = model.parent / f"log-{port}"
    with path.open("w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield path
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
