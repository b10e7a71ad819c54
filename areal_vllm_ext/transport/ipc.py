"""CUDA IPC: trainer and workers on one host, the best when on one GPU. Tensors come in one of two ways.

**Lent**, where they live on in the trainer (a module, a state dict) as they are to be sent: the trainer tells of the
allocations that they lie in, and what a worker on that GPU has staged is the trainer's memory. A worker on another GPU copies
it over. The trainer takes its memory back when the update is over, by a stamp that workers look at after they have loaded: one
that is late finds out that what it copied may have changed, and is tainted.

**In slots**, all others: two slots of device memory; the trainer fills one while the workers copy the other, each into staging
of its own. The slots are allocated apart (``cudaMalloc``), not by torch, whose allocations have no handle with expandable
segments: then nothing can be lent either.
"""

from __future__ import annotations

import ctypes
import functools
import secrets
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch

from ..integrity import digest
from ..protocol import Allocation, Bucket, CudaIpc, Segment, TensorMeta
from .base import watch
from .buckets import UnpackedBucket, aligned, digest_and_check_finite_async, nbytes_of, unpack
from .device import device_id, host_id
from .slots import SlotsSink, check_inside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from .base import Work, WorkerSite

_HANDLE_BYTES = 64
_ENABLE_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_STAMP_BYTES = digest.ROW_BYTES
# What a worker keeps open of a trainer is device memory that a trainer's death does not free.
_KEEP_OPEN_SECONDS = 30.0
# In one announcement: the workers look at these while the trainer looks at the next. Two processes take turns on one GPU, and
# a turn takes longer than a look at a thousand small tensors: these are not taken apart.
_LENT_TOGETHER, LENT_BYTES = 4096, 2 << 30
_BUFFER_ID = 7  # CU_POINTER_ATTRIBUTE_BUFFER_ID
_COPY_KIND = 4  # cudaMemcpyDefault: from device to device, wherever each is


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


_FUNCTIONS: dict[str, list[Any]] = {
    "cudaMalloc": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t],
    "cudaFree": [ctypes.c_void_p],
    "cudaIpcGetMemHandle": [ctypes.POINTER(_Handle), ctypes.c_void_p],
    "cudaIpcOpenMemHandle": [ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint],
    "cudaIpcCloseMemHandle": [ctypes.c_void_p],
    "cudaMemcpyAsync": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p],
    "cudaGetLastError": [],
}


class CudaRuntime:
    """The functions of the CUDA runtime that torch does not offer. They work on the current device."""

    def __init__(self, path: str, driver: str = "libcuda.so.1") -> None:
        """
        Args:
            path: the library, or its name where the process has loaded it already.
            driver: that of the driver.

        Raises:
            RuntimeError: it cannot be loaded.
        """
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise RuntimeError(f"the CUDA runtime cannot be loaded ({error}): use transport='shared_memory'") from None
        self._driver = driver
        self._call: dict[str, Any] = {}
        for name, argument_types in _FUNCTIONS.items():
            self._call[name] = library[name]
            self._call[name].argtypes, self._call[name].restype = argument_types, ctypes.c_int
        self._describe = library["cudaGetErrorString"]
        self._describe.argtypes, self._describe.restype = [ctypes.c_int], ctypes.c_char_p

    def allocate(self, nbytes: int) -> Memory:
        """Device memory that can be shared."""
        address = ctypes.c_void_p()
        self._check("cudaMalloc", ctypes.byref(address), nbytes)
        return Memory(address.value or 0, nbytes, functools.partial(self._call["cudaFree"], address))

    def share(self, memory: Memory) -> bytes:
        """The handle by which another process can open ``memory``."""
        handle = _Handle()
        self._check("cudaIpcGetMemHandle", ctypes.byref(handle), memory.address)
        return bytes(handle)

    def open(self, handle: bytes, nbytes: int) -> Memory:
        """Memory of another process."""
        if len(handle) != _HANDLE_BYTES:
            raise ValueError(f"a handle of CUDA memory has {_HANDLE_BYTES} bytes, not {len(handle)}")
        address = ctypes.c_void_p()
        self._check(
            "cudaIpcOpenMemHandle", ctypes.byref(address), _Handle.from_buffer_copy(handle), _ENABLE_PEER_ACCESS
        )
        return Memory(address.value or 0, nbytes, functools.partial(self._call["cudaIpcCloseMemHandle"], address))

    def allocation(self, address: int) -> Memory:
        """All of the allocation that ``address`` lies in. It is not this object's to free."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        if self._address_range(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)):
            raise RuntimeError("cuMemGetAddressRange failed")
        return Memory(base.value, size.value, lambda: None)

    def allocation_id(self, address: int) -> int:
        """Names the allocation at ``address``: no other of this process ever has this number."""
        number = ctypes.c_ulonglong()
        if self._attribute(ctypes.byref(number), _BUFFER_ID, ctypes.c_uint64(address)):
            raise RuntimeError("cuPointerGetAttribute failed")
        return number.value

    @functools.cached_property
    def _address_range(self) -> Any:
        return ctypes.CDLL(self._driver).cuMemGetAddressRange_v2

    @functools.cached_property
    def _attribute(self) -> Any:
        return ctypes.CDLL(self._driver).cuPointerGetAttribute

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Begin to copy, on a CUDA stream."""
        self._check("cudaMemcpyAsync", to, source, nbytes, _COPY_KIND, stream)

    def _check(self, name: str, *arguments: Any) -> None:
        if result := self._call[name](*arguments):
            # Taken, so that torch does not find it at its next call and blame that one.
            self._call["cudaGetLastError"]()
            raise RuntimeError(f"{name}: {self._describe(result).decode(errors='replace')}")


class Memory:
    """Device memory that ends with its last user: this object and the tensors made of it."""

    def __init__(self, address: int, nbytes: int, free: Callable[[], object]) -> None:
        self.address, self.nbytes = address, nbytes
        self._free = free
        # https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 2}

    def __del__(self) -> None:
        self._free()


@functools.cache
def load() -> CudaRuntime:
    """The CUDA runtime that torch uses.

    Raises:
        RuntimeError: there is none.
    """
    if torch.version.cuda is None:
        raise RuntimeError("transport 'ipc' needs a torch for CUDA: use transport='broadcast' or 'shared_memory'")
    return CudaRuntime(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")


# What this process shares, by handle: CUDA refuses to open it here, where a worker of an in-process engine needs it.
_own: dict[bytes, Memory] = {}


class Copying:
    """Copies that were begun."""

    def __init__(self, done: torch.cuda.Event, buffer: torch.Tensor, sources: object) -> None:
        self._done, self._buffer = done, buffer
        self._sources = sources  # open until then

    def wait(self, timeout: float, cancelled: Callable[[], bool]) -> torch.Tensor:
        watch(self._done.query, timeout, cancelled)
        return self._buffer

    def cancel(self) -> None: ...


class CudaIpcSource:
    """The worker's end."""

    reusable = True
    unchecked = False
    nbytes = 0

    def __init__(self, transfer: CudaIpc, site: WorkerSite) -> None:
        """Open the trainer's slots.

        Raises:
            RuntimeError: this worker cannot reach them.
        """
        self.device = site.device
        if self.device.type != "cuda":
            raise RuntimeError(
                f"transport 'ipc' brings weights to GPUs, and this worker runs on {self.device}: use transport='broadcast'"
            )
        if transfer.host != host_id():
            raise RuntimeError("the trainer is on another host: use transport='broadcast'")
        near = transfer.device_id == device_id(self.device)
        if not near:
            _check_peer(self.device, transfer.device_id)
        self.shared = transfer.shared and near
        self._transfer = transfer
        self._runtime = load()
        self._opened: dict[bytes, tuple[Memory, torch.Tensor]] = {}  # and all of it, as one tensor
        # The update that lends, by its stamp, and what it was seen to lend so far.
        self._lender = 0
        self._lent: set[bytes] = set()
        # Of the last update and of this one: what was lent, by the bucket's index.
        self._views: dict[int, UnpackedBucket] = {}
        self._viewed: dict[int, UnpackedBucket] = {}
        self._used = 0.0
        self._closing: threading.Timer | None = None
        with torch.cuda.device(self.device):
            self._stream = torch.cuda.Stream(self.device)
        self._open(transfer.handle, transfer.nbytes)

    def _open(self, handle: bytes, nbytes: int) -> tuple[Memory, torch.Tensor]:
        """The trainer's memory; opened once, and closed when it was not used for a while."""
        self._used = monotonic()
        if self._closing is None:
            self._close_later(_KEEP_OPEN_SECONDS)
        opened = self._opened
        if handle not in opened:
            with torch.cuda.device(self.device):
                try:
                    memory = _own.get(handle) or self._runtime.open(handle, nbytes)
                except RuntimeError as error:
                    raise RuntimeError(
                        f"the trainer's memory on GPU {self._transfer.device_id} cannot be opened ({error}): is the trainer "
                        "gone, in a container of its own, or without peer access? Else use transport='broadcast' or "
                        "'shared_memory'"
                    ) from None
                opened[handle] = memory, torch.as_tensor(memory, device=self.device)
        return opened[handle]

    def _close_later(self, seconds: float) -> None:
        self._closing = threading.Timer(seconds, self._close_unused)
        self._closing.daemon = True
        self._closing.start()

    def _close_unused(self) -> None:
        left = self._used + _KEEP_OPEN_SECONDS - monotonic()
        if left > 0:
            self._close_later(left)
        else:
            self._closing = None
            self._forget()

    def _forget(self) -> None:
        """Close what nobody uses: new ones, since whoever uses an opened memory has it by now."""
        self._opened, self._views, self._viewed = {}, {}, {}

    def start(self, bucket: Bucket, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        memory, _ = self._open(self._transfer.handle, self._transfer.nbytes)
        check_inside(bucket, memory.nbytes, "the trainer's memory")
        return self._copy([(memory, bucket.location, bucket.nbytes)], buffer)

    def views(self, bucket: Bucket) -> UnpackedBucket:
        """Tensors that lie in the trainer's own memory, on this GPU: that memory itself.

        Raises:
            RuntimeError: it cannot be opened. ValueError: a tensor does not lie in it.
        """
        opened = self._lending(bucket)
        piece = self._views.get(bucket.index)
        if piece is None or (piece.segments, piece.memory) != (bucket.segments, bucket.allocations):
            tensors: dict[str, torch.Tensor] = {}
            for segment in bucket.segments:
                tensors.update(unpack([segment], opened[segment.allocation][1]))
            piece = UnpackedBucket(bucket.segments, bucket.allocations, tensors)
        self._viewed[bucket.index] = piece
        return piece

    def start_lent(self, bucket: Bucket, buffer: torch.Tensor) -> Work:
        """Tensors that lie in the trainer's own memory on another GPU: copies in ``buffer``, as ``packed`` has them.

        Raises as ``views`` does.
        """
        opened = self._lending(bucket)
        places = []
        for segment in bucket.segments:
            memory, _ = opened[segment.allocation]
            nbytes = nbytes_of(segment.tensor)
            if segment.offset < 0 or segment.offset + nbytes > memory.nbytes:
                raise ValueError(f"{segment.tensor.name} does not lie inside its allocation")
            places.append((memory, segment.offset, aligned(nbytes)))
        return self._copy(places, buffer)

    def _lending(self, bucket: Bucket) -> list[tuple[Memory, torch.Tensor]]:
        """The bucket's allocations. What the last update did not lend any more, the trainer may have freed: it is not kept."""
        if bucket.stamp != self._lender:
            kept = {self._transfer.handle, *self._lent}
            self._opened = {handle: memory for handle, memory in self._opened.items() if handle in kept}
            self._views, self._viewed = self._viewed, {}
            self._lender, self._lent = bucket.stamp, set()
        self._lent.update(one.handle for one in bucket.allocations)
        return [self._open(one.handle, one.nbytes) for one in bucket.allocations]

    def stamp(self) -> torch.Tensor:
        """Where the trainer shows for how long it lends what it announced: one int64, which it changes when it does not."""
        _, whole = self._open(self._transfer.handle, self._transfer.nbytes)
        return whole[-8:].view(torch.int64)

    def _copy(self, places: Sequence[tuple[Memory, int, int]], buffer: torch.Tensor) -> Work:
        """Begin to copy the bytes at (memory, offset, bytes), one after the other, into ``buffer``."""
        with torch.cuda.device(self.device):
            buffer.record_stream(self._stream)  # an update that is given up frees it while the copy runs
            self._stream.wait_stream(torch.cuda.current_stream())
            to = buffer.data_ptr()
            for memory, offset, nbytes in places:
                self._runtime.copy(
                    to, memory.address + offset, min(nbytes, memory.nbytes - offset), self._stream.cuda_stream
                )
                to += nbytes
            done = torch.cuda.Event()
            done.record(self._stream)
        return Copying(done, buffer, places)

    def load_all(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ()

    def close(self) -> None:
        # Not under a copy that still runs: a GPU that reads memory that is gone is of no use to its engine any more.
        self._stream.synchronize()
        if self._closing is not None:
            self._closing.cancel()
        self._forget()


def _check_peer(device: torch.device, other: str) -> None:
    """Refuse a GPU that ``device`` cannot read. One that is not visible to this process is not known, and tried."""
    for index in range(torch.cuda.device_count()):
        if device_id(torch.device("cuda", index)) == other and not torch.cuda.can_device_access_peer(device, index):
            raise RuntimeError(
                f"this worker's {device} cannot read the memory of the trainer's GPU {other}: use transport='broadcast'"
            )


def _writes(tensor: torch.Tensor) -> int:
    """How often torch has written to a tensor; it does not count for those made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


class CudaIpcSink(SlotsSink):
    """The trainer's end."""

    def __init__(self, engines: int, device: torch.device, bucket_bytes: int, slot_bytes: int) -> None:
        """Allocate the slots; they are kept from one update to the next.

        Args:
            engines: how many engines will be told of them.
            device: the trainer's device.
            bucket_bytes: size of a bucket.
            slot_bytes: the largest bucket, which a large tensor has for itself.

        Raises:
            RuntimeError: the device is no GPU, or has no room.
        """
        if device.type != "cuda":
            raise RuntimeError(
                f"transport 'ipc' sends from a GPU, and these weights are on {device}: use 'shared_memory'"
            )
        super().__init__(bucket_bytes, slot_bytes)
        runtime = load()
        with torch.cuda.device(device):
            torch.cuda.empty_cache()  # what torch keeps in reserve is room too
            try:
                memory = runtime.allocate(self.slots * slot_bytes + _STAMP_BYTES)
            except RuntimeError as error:
                raise RuntimeError(
                    f"{device} has no room for two slots of {slot_bytes >> 20} MiB ({error}): use a smaller bucket_mib"
                ) from None
            self._handle = runtime.share(memory)
            self._memory = torch.as_tensor(memory, device=device)
            self._stream = torch.cuda.Stream(device)
        self._runtime, self._device = runtime, device
        # Until the update is over: these tensors, as they were when they were offered, the allocations that they lie in,
        # and what workers are shown as long as they may read there.
        self._lent: list[tuple[str, torch.Tensor, int]] = []
        self._shown = 0
        # Of these: what is not looked at yet, and what is, in pieces.
        self._offered: list[tuple[TensorMeta, torch.Tensor]] = []
        self._offered_bytes = 0
        self._looked: list[tuple[list[tuple[TensorMeta, torch.Tensor]], Callable[[], list[int]]]] = []
        self._allocations: dict[bytes, Memory] = {}
        self._handles: dict[int, bytes] = {}  # by where an allocation, or a tensor, begins
        self._last: Memory | None = None
        # Allocations that the last update lent, and this one does, by number, with their handles: these cost system calls.
        self._known: dict[int, tuple[Memory, bytes]] = {}
        self._asked: dict[int, tuple[Memory, bytes]] = {}
        _own[self._handle] = memory
        transfer = CudaIpc(host=host_id(), device_id=device_id(device), handle=self._handle, nbytes=memory.nbytes)
        self.transfers = [transfer] * engines

    def meet(self, opening: Future[None]) -> None:
        opening.result()

    def can_lend(self, tensor: torch.Tensor) -> bool:
        """Whether workers can use ``tensor`` where it lies."""
        if tensor.device != self._device or not tensor.is_contiguous() or not tensor.nbytes:
            return False
        address = tensor.data_ptr()
        try:
            memory = self._around(address)
        except (RuntimeError, OSError):
            return False
        if (address - memory.address) % digest.ROW_BYTES:
            return False
        self._handles[address] = self._handles[memory.address]
        return True

    def _around(self, address: int) -> Memory:
        """The allocation that ``address`` lies in, with a handle. Neighbours ask the driver once."""
        last = self._last
        if last is not None and last.address <= address < last.address + last.nbytes:
            return last
        number = self._runtime.allocation_id(address)
        if number not in self._asked:
            if (found := self._known.get(number)) is None:
                with torch.cuda.device(self._device):
                    memory = self._runtime.allocation(address)
                    found = memory, self._runtime.share(memory)
            memory, handle = self._asked[number] = found
            self._handles[memory.address] = handle
            self._allocations[handle] = _own[handle] = memory
        self._last = self._asked[number][0]
        return self._last

    def offer(self, meta: TensorMeta, tensor: torch.Tensor) -> bool:
        """Whether workers can use ``tensor`` where it lies. Then it is lent: it must stay as it is until ``take_back``, and the
        device begins to look at it as soon as there are enough of them.
        """
        if not self.can_lend(tensor):
            return False
        if not self._lent:
            torch.cuda.synchronize(self._device)  # workers read on streams of their own
            self._shown = secrets.randbits(62) | 1
            self._stamp(self._shown)
        if self._offered and (self._offered_bytes + tensor.nbytes > LENT_BYTES or len(self._offered) >= _LENT_TOGETHER):
            self._look()
        self._offered.append((meta, tensor))
        self._offered_bytes += tensor.nbytes
        self._lent.append((meta.name, tensor, _writes(tensor)))
        return True

    def _look(self) -> None:
        together, self._offered, self._offered_bytes = self._offered, [], 0
        self._looked.append(
            (together, digest_and_check_finite_async([(meta.name, tensor) for meta, tensor in together]))
        )

    def lend(self) -> Iterator[Bucket]:
        """Announcements of what is lent.

        Raises:
            InvalidWeights: a tensor holds NaN or infinite values.
        """
        if self._offered:
            self._look()
        looked, self._looked = self._looked, []
        return (self._announcement(together, tuple(digests())) for together, digests in looked)

    def _announcement(self, together: Sequence[tuple[TensorMeta, torch.Tensor]], digests: tuple[int, ...]) -> Bucket:
        numbers: dict[bytes, int] = {}
        segments = []
        for meta, tensor in together:
            handle = self._handles[tensor.data_ptr()]
            number = numbers.setdefault(handle, len(numbers))
            offset = tensor.data_ptr() - self._allocations[handle].address
            segments.append(Segment(meta, offset, number))
        return Bucket(
            epoch=0,
            update="",
            index=0,
            nbytes=sum(tensor.nbytes for _, tensor in together),
            segments=tuple(segments),
            digests=digests,
            allocations=tuple(Allocation(handle, self._allocations[handle].nbytes) for handle in numbers),
            stamp=self._shown,
        )

    def changed(self) -> str:
        """The name of a lent tensor that was written to meanwhile, as far as torch knows; else empty."""
        return next((name for name, tensor, writes in self._lent if _writes(tensor) != writes), "")

    def take_back(self) -> None:
        """The update is over for every engine that has answered: what was lent may change from now on."""
        if self._lent:
            self._stamp(0)
        for handle in self._allocations:
            _own.pop(handle, None)
        self._lent, self._offered, self._offered_bytes, self._looked = [], [], 0, []
        self._allocations, self._handles, self._last = {}, {}, None
        self._known, self._asked = self._asked, {}

    def _stamp(self, value: int) -> None:
        assert self._memory is not None
        with torch.cuda.stream(self._stream):
            self._memory[-8:].view(torch.int64).fill_(value)
        self._stream.synchronize()

    def release(self) -> None:
        """The slots are kept for the next update."""

    def close(self) -> None:
        self.take_back()
        _own.pop(self._handle, None)
        self.filled.clear()
        self._memory = None
