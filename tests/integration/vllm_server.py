"""A real ``vllm serve`` with the package on it, for tests that need arguments of their own."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from areal_vllm_ext.process.leftovers import SCRATCH_PREFIX
from areal_vllm_ext.process.supervised import Supervised
from harness.cpu_vllm import ONE_PROCESS

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def vllm_server(model: Path, port: int, directory: str, *arguments: str) -> Iterator[Path]:
    """Serve ``model`` as ``m`` while the body runs; yield the path of the log. The body waits until it serves."""
    environment = {
        "AREAL_VLLM_DIRECTORY": directory,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "m"]
    command += ["--enforce-eager", "--max-model-len", "512", "--dtype", "float32", "--enable-prefix-caching"]
    command += ["--kv-cache-memory-bytes", str(1 << 27), *ONE_PROCESS]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-extension-cls", "areal_vllm_ext.worker.WorkerExtension", *arguments]
    path = model.parent / f"log-{port}"
    # For vLLM's sockets, which it leaves. Their paths have 107 characters at most, so not in pytest's folder.
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX))
    environment["VLLM_RPC_BASE_PATH"] = str(scratch)
    server = Supervised(command, log=path, env={**os.environ, **environment}, grace=20, scratch=scratch)
    try:
        yield path
    finally:
        server.end()
