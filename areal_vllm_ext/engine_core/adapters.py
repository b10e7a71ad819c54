"""``Adapters``: which LoRA adapter a request means. A request names one, and its engine knows the name's current version.

vLLM takes two requests for adapters as equal if their names are, so each version has a name of its own in the engine, made of
its name and its manifest. The name is also part of the keys of cached keys and values. A request keeps the version that it
began with. Nothing reads the path.
"""

from __future__ import annotations

import functools
import itertools
import logging
from typing import TYPE_CHECKING, Any

from ..protocol import Adapter, Units
from .output_versions import OutputVersions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vllm.lora.request import LoRARequest

    from ..protocol import ServedAdapter

logger = logging.getLogger("vllm.areal_vllm_ext")

# Above every number that vLLM's front ends give, and within 31 bits.
_FIRST_NUMBER = 1 << 30
# The path in requests of front ends, which know names only; and the path of a version.
BY_NAME, BY_VERSION = "areal-vllm-ext:by-name", "areal-vllm-ext:by-version"


class UnknownAdapter(ValueError):
    """No update has brought the adapter that a request names, or one has removed it."""


class Adapters:
    """The adapters of one engine. Everything but ``resolve`` runs on the engine's loop.

    Attributes:
        versions: what each name means now, as the version of the update that brought it.
    """

    def __init__(self, engine: Any) -> None:
        """Have ``engine`` resolve the adapter of each request that it gets."""
        self.versions: dict[str, str] = {}
        self._engine = engine
        self._current: dict[str, LoRARequest] = {}
        self._next_number = itertools.count(_FIRST_NUMBER)
        # Of all versions that requests may still ask for, by the name that the version has in the engine.
        self._numbers: dict[str, int] = {}
        self._outputs = OutputVersions(engine)
        config = engine.vllm_config.lora_config
        # Adapters of other users that every worker keeps in host memory, whatever vLLM drops, until the next one is loaded.
        self._kept: set[int] = set()
        if config is not None:
            engine.add_lora = self._loading(engine.add_lora)
            engine.preprocess_add_request = self._before(engine.preprocess_add_request)
            engine.add_request = self._adding(engine.add_request)
        engine.areal_adapters = lambda: dict(self.versions)  # for front ends, by vLLM's utility calls

    def units_of(self, served: Mapping[str, ServedAdapter]) -> Units:
        """Return the change after which exactly the adapters ``served`` are here."""
        brought = tuple(Adapter(name, "", one.manifest) for name, one in served.items())
        return Units(adapters=brought, removed=tuple(name for name in self._current if name not in served))

    def numbers_of(self, units: Units) -> dict[str, int]:
        """Return a number for each adapter that an update brings."""
        return {unit.name: self._numbers.get(_version_of(unit)) or next(self._next_number) for unit in units.adapters}

    def in_use_after(self, units: Units, numbers: dict[str, int]) -> tuple[int, ...]:
        """Return the numbers that requests may still ask for once ``units`` are committed."""
        changed = {*units.removed, *numbers}
        current = {one.lora_int_id for name, one in self._current.items() if name not in changed}
        running = {
            request.lora_request.lora_int_id
            for request in self._engine.scheduler.requests.values()
            if request.lora_request is not None
        }
        return tuple(current | running | set(numbers.values()))

    def commit(self, units: Units, numbers: dict[str, int], kept: tuple[int, ...], versions: Mapping[str, str]) -> None:
        """Let requests that come from now on use what every worker has committed; ``versions`` by the adapters' names."""
        from vllm.lora.request import LoRARequest

        before = {one.lora_name for one in self._current.values()}
        for name in units.removed:
            self._current.pop(name, None)
            self.versions.pop(name, None)
        for unit in units.adapters:
            own = _version_of(unit)
            self._numbers[own] = numbers[unit.name]
            self._current[unit.name] = LoRARequest(own, numbers[unit.name], BY_VERSION)
            self.versions[unit.name] = versions[unit.name]
        self._numbers = {own: number for own, number in self._numbers.items() if number in kept}
        replaced = before - {one.lora_name for one in self._current.values()}
        self._outputs.keep(str(getattr(self._engine, "_weight_version", "")), replaced)

    def resolve(self, wanted: LoRARequest) -> LoRARequest:
        """Return the request of the current version of an adapter; adapters of other users stay as they are.

        Raises:
            UnknownAdapter: there is no such adapter.
        """
        resolved = wanted.lora_path == BY_VERSION
        name = wanted.lora_name.rpartition(":")[0] if resolved else wanted.lora_name
        if (current := self._current.get(name)) is not None:
            return current
        if resolved or wanted.lora_path == BY_NAME:
            raise UnknownAdapter(f"this engine has no adapter {name}: an update has removed it")
        return wanted

    # On the thread that reads requests

    def _before(self, preprocess: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def preprocess_add_request(request: Any) -> Any:
            # Before the blocks of its prompt are hashed. An error here is an answer to this request only.
            if request.lora_request is not None:
                request.lora_request = self.resolve(request.lora_request)
            return preprocess(request)

        return preprocess_add_request

    # On the loop

    def _adding(self, add: Callable[..., Any]) -> Callable[..., Any]:
        def add_request(request: Any, request_wave: int = 0) -> Any:
            if request.lora_request is not None and not self._is_ready(request):
                self._answer_error(request)
                return None
            return add(request, request_wave)

        return add_request

    def _is_ready(self, request: Any) -> bool:
        """Make the workers ready for the adapter of ``request``; return False if they cannot serve it."""
        try:
            current = self.resolve(request.lora_request)
            if current is not request.lora_request:  # an update was committed while the request waited in the queue
                request.lora_request = current
                request.block_hashes = []
                request.update_block_hashes()
            # Now, where a failure is this request's only. Later it would end the engine.
            number = current.lora_int_id
            if number < _FIRST_NUMBER and (number not in self._kept or current.load_inplace):
                self._load(current)
        except Exception as error:
            logger.warning("areal_vllm_ext: request %s cannot be served: %s", request.request_id, error)
            return False
        return True

    def _load(self, wanted: LoRARequest) -> bool:
        """Have the workers load an adapter of another user, and keep those that requests which wait or run may need."""
        needed = {wanted.lora_int_id} | {
            request.lora_request.lora_int_id
            for request in self._engine.scheduler.requests.values()
            if request.lora_request is not None
        }
        self._kept = set()  # where one worker fails, others may have dropped some
        kept = self._engine.model_executor.collective_rpc("areal_load_adapter", args=(wanted, tuple(needed)))
        self._kept = set.intersection(*map(set, kept))
        return True

    def _loading(self, add: Callable[[LoRARequest], bool]) -> Callable[[LoRARequest], bool]:
        @functools.wraps(add)  # vLLM reads the signature
        def add_lora(lora_request: LoRARequest) -> bool:
            if lora_request.lora_name in self._current:
                raise ValueError(belongs_to_the_group(lora_request.lora_name))
            return self._load(lora_request)

        return add_lora

    def _answer_error(self, request: Any) -> None:
        if send := getattr(self._engine, "_send_error_outputs_to_client", None):
            send([request.request_id], request.client_index)
            return
        raise UnknownAdapter(f"adapter {request.lora_request.lora_name} cannot be served, see the log")


def belongs_to_the_group(name: str) -> str:
    """Return why another user cannot load or unload an adapter of this name."""
    return (
        f"adapter {name} belongs to the group, because an update brought it to every engine: replace or remove it by an "
        f'update (adapters={{"{name}": ...}})'
    )


def _version_of(unit: Adapter) -> str:
    """Return the name in the engine of the version of an adapter that ``unit`` brings."""
    return f"{unit.name}:{unit.manifest}"
