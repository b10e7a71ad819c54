"""The trainer's device memory, opened by a worker and kept open for the next update."""

from __future__ import annotations

import threading
from time import monotonic
from typing import TYPE_CHECKING

import torch

from . import cuda_runtime
from .base import watch

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

    from .base import Work
    from .cuda_runtime import Memory

# An open handle keeps the trainer's device memory allocated, even after the trainer has died. So unused memory is closed.
_IDLE_SECONDS = 30.0

# Memory that this process itself shares, by handle. CUDA refuses to open it in the process that made it, but the worker of
# an in-process engine needs it.
own: dict[bytes, Memory] = {}


class CopyWork:
    """Copies in flight on a CUDA stream."""

    def __init__(self, done: torch.cuda.Event, buffer: torch.Tensor, sources: object) -> None:
        self._done, self._buffer = done, buffer
        self._sources = sources  # keeps them open until the copies are done

    def wait(self, timeout: float, cancelled: Callable[[], bool]) -> torch.Tensor:
        late = f"{self._buffer.numel()} bytes were not copied from the trainer's GPU"
        watch(self._done.query, timeout, cancelled, late)
        return self._buffer

    def cancel(self) -> None: ...


class OpenedMemory:
    """A cache of one trainer's opened memory, by handle. It closes itself when it was not used for a while."""

    def __init__(self, device: torch.device, trainer_gpu: str) -> None:
        """
        Args:
            device: the worker's device.
            trainer_gpu: ``device_id`` of the trainer's device, for messages.
        """
        self._device, self._trainer_gpu = device, trainer_gpu
        self._runtime = cuda_runtime.load()
        self._opened: dict[bytes, tuple[Memory, torch.Tensor]] = {}
        self._used = 0.0
        self._timer: threading.Timer | None = None
        # Called when memory is closed, so that tensors made of it are dropped too.
        self.on_close: Callable[[], None] = lambda: None
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)

    def open(self, handle: bytes, nbytes: int) -> tuple[Memory, torch.Tensor]:
        """Return the trainer's memory, and all of it as one tensor of bytes.

        Raises:
            RuntimeError: it cannot be opened.
        """
        self._used = monotonic()
        if self._timer is None:
            self._close_after(_IDLE_SECONDS)
        opened = self._opened  # the timer replaces it
        if handle not in opened:
            with torch.cuda.device(self._device):
                try:
                    memory = own.get(handle) or self._runtime.open(handle, nbytes)
                except RuntimeError as error:
                    raise RuntimeError(
                        f"the trainer's memory on GPU {self._trainer_gpu} cannot be opened ({error}): is the trainer "
                        "gone, in a container of its own, or without peer access? Else use transport='broadcast' or "
                        "'shared_memory'"
                    ) from None
                opened[handle] = memory, torch.as_tensor(memory, device=self._device)
        return opened[handle]

    def keep_only(self, handles: Container[bytes]) -> None:
        """Close all other memory: the trainer may have freed it."""
        self._opened = {handle: memory for handle, memory in self._opened.items() if handle in handles}

    def copy(self, slices: Sequence[tuple[Memory, int, int]], buffer: torch.Tensor) -> Work:
        """Start to copy slices (memory, offset, bytes) into ``buffer``, one after the other."""
        with torch.cuda.device(self._device):
            buffer.record_stream(self._stream)  # a cancelled update frees the buffer while the copy runs
            self._stream.wait_stream(torch.cuda.current_stream())
            to = buffer.data_ptr()
            for memory, offset, nbytes in slices:
                length = min(nbytes, memory.nbytes - offset)
                self._runtime.copy(to, memory.address + offset, length, self._stream.cuda_stream)
                to += nbytes
            done = torch.cuda.Event()
            done.record(self._stream)
        return CopyWork(done, buffer, slices)

    def close(self) -> None:
        """Close all memory."""
        # Wait for pending copies: unmapping memory that the GPU still reads leaves a sticky CUDA error.
        self._stream.synchronize()
        if self._timer is not None:
            self._timer.cancel()
        self._close_all()

    def _close_after(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._close_idle)
        self._timer.daemon = True
        self._timer.start()

    def _close_idle(self) -> None:
        left = self._used + _IDLE_SECONDS - monotonic()
        if left > 0:
            self._close_after(left)
        else:
            self._timer = None
            self._close_all()

    def _close_all(self) -> None:
        # A new dict, because another thread may be reading the old one. Tensors in use keep their memory open.
        self._opened = {}
        self.on_close()
