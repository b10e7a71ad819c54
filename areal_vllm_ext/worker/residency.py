"""Whether the live weights are in memory that may be read and written.

vLLM's sleep mode unmaps them. Access to unmapped memory is an illegal memory access, which ends the worker. An unfinished
reload leaves parameters on the meta device, and others free a storage or move weights to the host.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_KV_CACHE = "kv_cache"  # the tag of memory that no weight is in
_WAKE_FIRST = "the engine sleeps, so its weights have no memory: wake it up (/wake_up), then send again"


class NotResident(RuntimeError):
    """The live weights are not in memory that may be read or written; the message says why."""


class Residency:
    """Tells whether the live weights of one worker are in memory.

    Attributes:
        on_sleep: called with the level before vLLM's sleep mode takes the weights' memory.
    """

    def __init__(self, worker: Any) -> None:
        """Watch vLLM's ``sleep`` and ``wake_up`` of ``worker``, whose model is loaded."""
        self.on_sleep: Callable[[int], None] = lambda _level: None
        self._worker = worker
        self._asleep = False
        self._access = threading.RLock()
        # A quantisation method may leave parameters on the meta device for good.
        self._always_absent = frozenset(_absent_names(worker.get_model()))
        self._watch("sleep", self._sleep)
        self._watch("wake_up", self._wake_up)

    @contextlib.contextmanager
    def access(self) -> Iterator[None]:
        """Keep the weights in memory while the body reads or writes them: a ``sleep`` waits until its end.

        Raises:
            NotResident: they are not in memory.
        """
        with self._access:
            if reason := self.asleep_reason():
                raise NotResident(reason)
            yield

    def asleep_reason(self) -> str | None:
        """Return why vLLM's sleep mode forbids access, if it does. Takes microseconds."""
        return _WAKE_FIRST if self._asleep or _has_unmapped_memory() else None

    def absent_reason(self) -> str | None:
        """Return why the weights cannot be read or written, if they cannot. Looks at every tensor of the model."""
        if reason := self.asleep_reason():
            return reason
        if _prefetches(self._worker.vllm_config):
            return (
                "the engine moves weights between host and device while it computes (offload_group_size), so they have no "
                "lasting place: start it without this offloading"
            )
        for name in _absent_names(self._worker.get_model()):
            if name not in self._always_absent:
                return (
                    f"{name} of the live model has no memory: a reload by someone else did not finish; let it finish, or "
                    "restart the engine"
                )
        return None

    def _watch(self, name: str, replacement: Callable[..., Any]) -> None:
        if (original := getattr(self._worker, name, None)) is not None:
            setattr(self._worker, name, functools.wraps(original)(functools.partial(replacement, original)))

    def _sleep(self, original: Callable[..., Any], level: int = 1) -> Any:
        with self._access:
            self._asleep = True  # also if it fails midway
            self.on_sleep(level)
            return original(level)

    def _wake_up(self, original: Callable[..., Any], tags: list[str] | None = None) -> Any:
        with self._access:
            result = original(tags)
            if tags is None or "weights" in tags:
                self._asleep = False
            return result


def _absent_names(model: torch.nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        for kind in (module._parameters, module._buffers):  # noqa: SLF001
            yield from (f"{name}.{key}".lstrip(".") for key, tensor in kind.items() if _is_absent(tensor))


def _is_absent(tensor: torch.Tensor | None) -> bool:
    """Return whether a tensor has elements but no memory."""
    if tensor is None or isinstance(tensor, torch.nn.UninitializedParameter):
        return False
    return tensor.is_meta or (tensor.numel() > 0 and tensor.untyped_storage().nbytes() < tensor.element_size())


def _has_unmapped_memory() -> bool:
    """Return whether vLLM's allocator has unmapped memory of this process other than that of the KV cache."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    allocator = getattr(getattr(module, "CuMemAllocator", None), "instance", None)
    allocations = list(getattr(allocator, "pointer_to_data", {}).values())
    return any(getattr(one, "is_asleep", False) and one.tag != _KV_CACHE for one in allocations)


def _prefetches(config: Any) -> bool:
    """Return whether vLLM copies weights of the host to a shared device buffer before each use."""
    offload = getattr(config, "offload_config", None)
    if offload is None or offload.offload_backend == "uva":
        return False
    return bool(offload.prefetch.offload_group_size > 0)
