"""Start a command whose whole process tree ends with this process: the owner's side of ``supervisor.py``."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import supervisor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GRACE_SECONDS = 8.0
_ERROR = re.compile(r"^(\(.*?\) )?(ERROR .*?\] )?([\w. ]+: error|[\w.]*(Error|Exception)): ")
_MARK = "AREAL_VLLM_SUPERVISED"

# Stages of a starting `vllm serve`, by the line that it logs at the beginning of each. If a vLLM words a line differently,
# the stage before is shown instead.
VLLM_STAGES = {
    "Resolved architecture": "starting the engine",
    "Initializing a V1 LLM engine": "starting the worker",
    "Starting to load model": "loading the model",
    "init engine (": "engine is up",
    "Starting vLLM server": "serving",
}


class Supervised:
    """Start ``command`` on construction; once ``poll`` returns an exit code, no process of its tree is left.

    Attributes:
        pid: of the command itself, which leads a session of its own.
        supervisor_pid: of the process that ends the tree.
        log: file with the command's output.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        grace: float = GRACE_SECONDS,
        scratch: Path | None = None,
    ) -> None:
        """Start the command.

        Args:
            command: what to run, with its arguments.
            log: file for the output; an existing one is overwritten.
            env: the whole environment; default: that of this process.
            grace: seconds between SIGTERM and SIGKILL.
            scratch: a folder to remove once the whole tree has ended, or did not start.

        Raises:
            OSError: the command cannot be started.
        """
        self.log = log
        self._grace = grace
        self._scratch = scratch
        self._code: int | None = None
        self._said = b""
        self._mark = f"{_MARK}={secrets.token_hex(8)}"
        try:
            self._start(command, os.environ if env is None else env)
        except BaseException:
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _start(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        with self.log.open("w") as output:
            print("$", *command, file=output, flush=True)
            starter = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, str(self._grace), str(self._scratch or ""), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**env, _MARK: self._mark.partition("=")[2]},
                start_new_session=True,  # Ctrl-C at the terminal is for this process, which ends the others in order
            )
        assert starter.stdin is not None
        assert starter.stdout is not None
        self._life, self._answers = starter.stdin, starter.stdout
        pids = self._answers.readline().split()
        starter.wait()
        if not pids:
            self.close()
            self._answers.close()
            raise OSError(self.last_lines() or f"could not start {command[0]}")
        self.supervisor_pid, self.pid = (int(pid) for pid in pids)
        os.set_blocking(self._answers.fileno(), False)

    def poll(self) -> int | None:
        """Return the exit code, as a shell gives it, once no process of the tree is left; None before."""
        if self._code is None and self._has_ended():
            *noted, last = self._said.decode().split() or [""]
            if not last.isdigit():  # the supervisor was killed before it had finished
                self._kill_all({*noted, last} - {""})
            self._code = int(last) if last.isdigit() else 128 + signal.SIGKILL
            self._answers.close()
        return self._code

    def _has_ended(self) -> bool:
        """Read what the supervisor has said; return whether it has ended."""
        while said := self._answers.read():
            self._said += said
        return said is not None

    def close(self) -> None:
        """Ask the supervisor to end the tree; returns at once. Idempotent."""
        with contextlib.suppress(BrokenPipeError):
            self._life.close()

    def end(self) -> int:
        """End the tree, by force if necessary, and return the exit code."""
        self.close()
        ends = time.monotonic() + self._grace + 10
        while (code := self.poll()) is None:
            if time.monotonic() > ends:  # the supervisor hangs, for example because it is stopped
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.supervisor_pid, signal.SIGKILL)
            time.sleep(0.02)
        return code

    def _kill_all(self, shared: set[str]) -> None:
        """Do the supervisor's work; every process of the tree has the mark in its environment.

        Args:
            shared: the shared memory that the supervisor has noted.
        """
        ends = time.monotonic() + 5
        while time.monotonic() < ends and (alive := _processes_with(self._mark)):
            shared |= supervisor.shared_memory(alive)
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)
        supervisor.remove(shared)

    def last_lines(self, count: int = 15) -> str:
        """Return the last lines of the log."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])
        return ""

    def cause(self) -> str:
        """Return the line that most probably says why the command ended: the first with an error, else the last."""
        lines = [line for line in self.last_lines(400).splitlines() if line.strip()]
        return next((line for line in lines if _ERROR.match(line)), lines[-1] if lines else "")

    def stage(self) -> str:
        """Return how far the start of a ``vllm serve`` is, in a few words."""
        log = self.log.read_text(errors="replace")
        return next((stage for mark, stage in reversed(VLLM_STAGES.items()) if mark in log), "importing vLLM")


def _processes_with(variable: str) -> list[int]:
    """Return the processes with ``NAME=value`` in their environment, which children inherit in any session."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or already gone
            if variable.encode() in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found
