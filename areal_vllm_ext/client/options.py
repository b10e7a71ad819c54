"""The options of an update, as users give them and as they are checked. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, get_args

from ..protocol import KVPolicy, PauseMode, StagingKind, Version

if TYPE_CHECKING:
    from collections.abc import Callable

M = TypeVar("M", bound=Mapping[str, Any])
Transport = Literal["auto", "broadcast", "ipc", "shared_memory"]
Senders = Literal["rank0", "partitioned", "colocated"]

# Default timeouts.
READY_SECONDS = 600.0
PAUSE_SECONDS = 60.0
UPDATE_SECONDS = 300.0
VERIFY_SECONDS = 300.0
CALL_SECONDS = 60.0
PAUSE_LEASE_SECONDS = 30.0
# An engine answers a call, a sleep or a wake-up at its deadline; this is how much later the answer may come.
LATE_SECONDS = 0.2
# The longest durations that messages can carry.
MAX_SECONDS = 1e7
MAX_LEASE_SECONDS = 300.0
_MAX_NAME_BYTES = 4096
_MAX_RANK = 2**31 - 1


class UpdateOptions(TypedDict, total=False):
    """The options of ``update`` and ``update_weights``. All have a default.

    Keys:
        transport: how tensors travel. ``broadcast`` uses NCCL between GPUs and TCP otherwise. ``ipc`` reads the trainer's
            CUDA memory (same host). ``shared_memory`` uses host memory (same host). ``auto`` (the default) takes ``ipc`` if
            a worker runs on the trainer's own GPU, or if the only worker's GPU can read the trainer's memory; otherwise it
            takes ``broadcast``. A checkpoint directory is read from disk, whatever the transport.
        mode: how engines pause for the commit, see ``pause``. Default: ``keep``.
        kv: ``recompute`` (the default) drops cached keys and values, because they come from the old weights. With
            ``keep``, requests in flight go on with theirs and so mix both versions, but no later request finds them. With
            ``reuse``, later requests may.
        bucket_mib: size of the buckets in which tensors travel. Default with NCCL: a quarter of the weights, at least 128
            and at most 1024. Default otherwise: 256 from GPUs, 32 from host memory.
        staging: where workers stage the new weights until the commit: on their ``device``, in ``host`` memory, or on the
            device if there is room and in host memory otherwise (``auto``, the default). Staging costs a copy of what a
            worker receives. If there is no room, the update is refused, and the message has the numbers.
        keep_buffers: keep staging memory and send buffers for the next update, which is faster then. Default: False.
        partial: send what was trained only. Every other tensor stays what it is: every engine must have it with the same
            digest, or the update is refused. An engine keeps tensors where a load plan fits, or takes them from the files
            that it was started with. Default: False, so a tensor that is missing is an error.
        drop_lost: go on without engines that are lost already, instead of raising EnginesMissing. A dropped engine that
            comes back is stale: it serves nothing until an update reaches it. Default: False.
        on_phase: called with the name of each phase (``begin``, ``prepare``, ``pause``, ``commit``, ``resume``, ``abort``)
            before its requests go out, on the event loop's thread. Default: None.
        trace: file for a timeline of trainer, engines and workers, also of an update that failed: JSON for
            https://ui.perfetto.dev. Parts that cannot be collected are logged and are no error. Default: None.
    """

    transport: Transport
    mode: PauseMode
    kv: KVPolicy
    bucket_mib: int | None
    staging: StagingKind
    keep_buffers: bool
    partial: bool
    drop_lost: bool
    on_phase: Callable[[str], None] | None
    trace: str | os.PathLike[str] | None


@dataclasses.dataclass(frozen=True)
class Options:
    """``UpdateOptions``, checked, with the default of each."""

    timeout: float = UPDATE_SECONDS
    transport: Transport = "auto"
    mode: PauseMode = "keep"
    kv: KVPolicy = "recompute"
    bucket_bytes: int | None = None
    staging: StagingKind = "auto"
    keep_buffers: bool = False
    partial: bool = False
    drop_lost: bool = False
    on_phase: Callable[[str], None] | None = None
    trace: str | os.PathLike[str] | None = None

    @classmethod
    def of(cls, timeout: float, given: UpdateOptions) -> Options:
        """Check the options of an update.

        Raises:
            TypeError, ValueError: naming the option, and what it may be.
        """
        options: dict[str, Any] = dict(given)
        for name in options:
            if name not in UpdateOptions.__annotations__:
                known = ", ".join(UpdateOptions.__annotations__)
                raise TypeError(f"an update has no option {name!r}; its options are {known}")
        for name, kind in (("transport", Transport), ("mode", PauseMode), ("kv", KVPolicy), ("staging", StagingKind)):
            if name in options:
                check_choice(name, options[name], kind)
        for name in ("keep_buffers", "partial", "drop_lost"):
            if not isinstance(options.get(name, False), bool):
                raise TypeError(f"{name} must be True or False, not {options[name]!r}")
        if (hook := options.get("on_phase")) is not None and not callable(hook):
            raise TypeError(f"on_phase must be a function of the phase's name, not {hook!r}")
        if not isinstance(options.get("trace", ""), (str, os.PathLike, type(None))):
            raise TypeError(f"trace must be a path, not {options['trace']!r}")
        if (mebibytes := options.pop("bucket_mib", None)) is not None:
            options["bucket_bytes"] = checked_count("bucket_mib", mebibytes) << 20
        return cls(timeout=checked_seconds(timeout), **options)


def check_choice(name: str, value: object, literal: object) -> None:
    """Raise ValueError if ``value`` is not one of the choices of a ``Literal``."""
    choices = get_args(literal)
    if value not in choices or isinstance(value, bool):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def checked_seconds(value: float, name: str = "timeout", longest: float = MAX_SECONDS) -> float:
    """Return ``value`` as seconds that a message can carry.

    Raises:
        TypeError: ``value`` is no number.
        ValueError: ``value`` is not above 0 and at most ``longest``.
    """
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}") from None
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if not 0 < seconds <= longest:  # not a number is neither
        raise ValueError(f"{name} must be seconds above 0 and at most {longest:.0f}, not {value!r}")
    return seconds


def checked_count(name: str, value: object) -> int:
    """Return ``value`` as an integer above 0; accepts the integers of numpy.

    Raises:
        TypeError: ``value`` is no integer.
        ValueError: ``value`` is not above 0.
    """
    if (count := _integer(name, value)) <= 0:
        raise ValueError(f"{name} must be above 0, not {value!r}")
    return count


def checked_rank(name: str, value: object) -> int:
    """Return ``value`` as the number of a rank.

    Raises:
        TypeError: ``value`` is no integer.
        ValueError: no rank has this number.
    """
    if not 0 <= (rank := _integer(name, value)) <= _MAX_RANK:
        raise ValueError(f"{name} must be from 0 to {_MAX_RANK}, not {value!r}")
    return rank


def _integer(name: str, value: object) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    return number


def checked_mapping(name: str, value: M) -> M:
    """Return ``value`` if it is a mapping.

    Raises:
        TypeError: it is none.
    """
    given: object = value
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a mapping of names to sources, not {value!r}")
    return value


def checked_path(name: str, value: object) -> str:
    """Return the text of a path.

    Raises:
        TypeError: ``value`` is no path.
    """
    try:
        return os.fsdecode(os.fspath(value))  # type: ignore[call-overload]
    except TypeError:
        raise TypeError(f"{name} must be a path, not {value!r}") from None


def checked_version(value: object) -> Version:
    """Return ``value`` as a version that a message can carry; accepts the integers of numpy.

    Raises:
        TypeError: ``value`` is neither an integer nor a string.
        ValueError: ``value`` does not fit: more than 64 bits, too long, or no valid Unicode.
    """
    if isinstance(value, str):
        try:
            encoded = value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"version must be valid Unicode, not {value!r}") from None
        if not 0 < len(encoded) <= _MAX_NAME_BYTES:
            raise ValueError(f"version must have 1 to {_MAX_NAME_BYTES} bytes, not {len(encoded)}")
        return value
    if isinstance(value, bool):
        raise TypeError(f"version must be an integer or a string, not {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"version must be an integer or a string, not {value!r}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"version must fit in 64 bits, not {value!r}")
    return number
