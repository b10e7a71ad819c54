"""The methods of the user's own worker extension, for ``group.call``."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

import msgspec

from ..protocol import method_names

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("vllm.areal_vllm_ext")

_LONGEST_ERROR = 4096


def call(
    worker: Any, method: str, arguments: bytes, longest_answer: int, own: Callable[..., Any] | None = None
) -> tuple[bytes, str, str]:
    """Call a method of the user's extension.

    Args:
        worker: vLLM's worker.
        method: its name.
        arguments: a msgpack array.
        longest_answer: bytes that the answer may have.
        own: what is called instead, if ``method`` is not the user's but this package's.

    Returns:
        the answer in msgpack, or the type and the message of an exception.
    """
    try:
        value = (own or _own_method(worker, method))(*msgspec.msgpack.decode(arguments))
    except (Exception, SystemExit) as error:  # a method that exits must not end the engine
        logger.warning("areal_vllm_ext: a call of %s failed", method, exc_info=True)
        return b"", type(error).__name__, _one_message(error)
    try:
        answer = msgspec.msgpack.encode(value)
    except Exception as error:
        return b"", "TypeError", f"msgpack cannot carry what {method} returned: {_one_message(error)}"
    if len(answer) > longest_answer:
        problem = (
            f"the answer of {method} has {len(answer) / 2**20:.1f} MiB, and {longest_answer / 2**20:.1f} is the most: return "
            "less, or raise AREAL_VLLM_MAX_MESSAGE_MIB"
        )
        return b"", "ValueError", problem
    return answer, "", ""


def own_methods(extension: type) -> set[str]:
    """Return the names of the methods that a user's extension brings."""
    return {
        name for name in dir(extension) if callable(getattr(extension, name, None)) and not method_names.refusal(name)
    }


def _own_method(worker: Any, method: str) -> Callable[..., Any]:
    """Return the method, which the user's extension must define: no other method of vLLM's worker can be reached.

    Raises:
        LookupError: it does not, with what to do.
    """
    if problem := method_names.refusal(method):
        raise LookupError(problem)
    module, _, name = (worker.vllm_config.parallel_config.worker_extension_cls or "").rpartition(".")
    if not name:
        raise LookupError(
            f"there is no method {method}, because the engines have no worker extension: define it in a class, and start the "
            "engines with --worker-extension-cls naming that"
        )
    extension = getattr(import_module(module), name)
    known = own_methods(extension)
    if method not in known:
        names = f"its methods are {', '.join(sorted(known))}" if known else "it has no methods of your own"
        raise LookupError(
            f"{extension.__name__} has no method {method} ({names}): define it in the class that "
            "--worker-extension-cls names"
        )
    found: Callable[..., Any] = getattr(worker, method)
    return found


def _one_message(error: BaseException) -> str:
    """Return the message of ``error`` as text that can travel."""
    try:
        text = str(error)
    except Exception:
        text = "its message cannot be read"
    return text.encode("utf-8", "backslashreplace").decode()[:_LONGEST_ERROR]
