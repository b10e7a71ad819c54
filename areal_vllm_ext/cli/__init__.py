"""The command ``areal-vllm``: runs one command, and turns errors and signals into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from ..errors import ArealError, LaunchError

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which undoes what was begun just as Ctrl-C does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; without ``arguments``, that of this process's command line."""
    own_process = arguments is None
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before this process began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - for as long as the process lives
    try:
        if own_process:
            signal.signal(signal.SIGTERM, _terminate)
        from .parser import build

        options = build().parse_args(arguments)
        _import_messages()
        code: int = options.run(options)
        sys.stdout.flush()  # here, so that a closed pipe is noticed here
    except KeyboardInterrupt as interrupt:
        code = 128 + (signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT)
        if own_process:
            # Everything is undone. A further signal while the interpreter ends must not print a traceback.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, _: os._exit(128 + number))
        _say("interrupted")
    except BrokenPipeError:  # standard output was closed, for example by `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except LaunchError as error:  # the cause in the first line, then the end of a log
        code = _say(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__.partition(".")[0]):
            raise
        code = _say(f"{error.name} is not installed; run: pip install 'areal-vllm-ext[vllm]' (or [ray], for launch)")
    except (ArealError, OSError, ValueError) as error:
        code = _say(" ".join(str(error).split()))
    return code


def _import_messages() -> None:
    """Import what nearly all commands need, and let a signal wait until then.

    A signal that comes while msgspec makes a decoder may end the process (SIGSEGV).
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        from .. import protocol  # noqa: F401
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say(message: str) -> int:
    print(f"areal-vllm: {message}", file=sys.stderr)
    return 1


def _terminate(_number: int, _frame: object) -> NoReturn:
    raise _Terminated


__all__ = ["main"]
