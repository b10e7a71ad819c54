"""``AdapterStore``: the adapters that a worker serves, in host memory. vLLM asks it whenever it needs one.

vLLM knows an adapter by a number and a path, reads the path again whenever its cache has lost the adapter, and drops all
adapters when base weights change. If the path is gone then, the request that needs it ends the engine. So the store answers
for the numbers that the engine gave to the group's adapters, and adapters that other users have loaded outlast an update.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from .loading import Unusable, fresh, load, shape_in

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import torch

    from ...integrity.digest import Contents
    from ...protocol import Adapter
    from ..load.intake import Intake

logger = logging.getLogger("vllm.areal_vllm_ext")


class StoredAdapter(NamedTuple):
    """An adapter as it came, which a peer can be given, and as vLLM serves it.

    Attributes:
        unit: what it is.
        contents: what each of peft's tensors is, and its digest.
        tensors: peft's tensors, which nothing writes to.
        model: vLLM's ``LoRAModel`` of it.
    """

    unit: Adapter
    contents: Contents
    tensors: dict[str, torch.Tensor]
    model: Any


class AdapterStore:
    """The adapters of one worker. Everything but ``load`` and ``find`` runs on the worker's own thread."""

    def __init__(self, worker: Any) -> None:
        runner: Any = getattr(worker, "model_runner", None)
        # None if the engine was started without --enable-lora.
        self._manager: Any = getattr(runner, "lora_manager", None)
        self._stored: dict[int, StoredAdapter] = {}
        # Of other users' adapters, what vLLM has read from a path, by number: those that vLLM or a request still needs.
        self._others: dict[int, Any] = {}
        if self._manager is None:
            return
        self._load_from_path = self._manager._load_adapter  # noqa: SLF001
        self._manager._load_adapter = self._load_for_request  # noqa: SLF001
        if reset := getattr(runner, "reset_lora_state", None):
            runner.reset_lora_state = functools.wraps(reset)(functools.partial(self._keep_over, reset))

    def load(self, config: str, tensors: dict[str, torch.Tensor], intake: Intake) -> Any:
        """Make vLLM's model of an adapter. Safe on any thread.

        Args:
            config: peft's configuration, in JSON.
            tensors: peft's tensors, which stay as they are.
            intake: what the base model takes.

        Raises:
            Unusable: this worker cannot serve it.
        """
        if self._manager is None:
            raise Unusable("this engine was started without --enable-lora")
        return load(self._manager, config, tensors, shape_in(intake.known, intake.find))

    def find(self, wanted: Mapping[str, str]) -> list[StoredAdapter]:
        """Return the adapters with these manifests, by name. Safe on any thread.

        Raises:
            RuntimeError: one of them is not here.
        """
        here = {(one.unit.name, one.unit.manifest): one for one in list(self._stored.values())}
        if missing := [name for name, manifest in wanted.items() if (name, manifest) not in here]:
            raise RuntimeError(f"it does not have adapter {missing[0]}")
        return [here[key] for key in wanted.items()]

    def commit(self, adapters: Mapping[str, StoredAdapter], numbers: Mapping[str, int], kept: Collection[int]) -> None:
        """Serve adapters from now on. This cannot fail.

        Args:
            adapters: by name.
            numbers: by which the engine's requests will ask for them.
            kept: all numbers that requests may still ask for; other adapters are dropped.
        """
        for name, adapter in adapters.items():
            self._stored[numbers[name]] = adapter
        for number in [one for one in self._stored if one not in kept]:
            del self._stored[number]
            self._manager.remove_adapter(number)

    def load_other(self, add: Callable[[Any], object], wanted: Any, needed: Collection[int]) -> tuple[int, ...]:
        """Load an adapter of another user now, where a failure ends nothing.

        It is kept in host memory like all that vLLM's cache has or requests need, whatever becomes of their directories. The
        others are dropped.

        Args:
            add: vLLM's ``add_lora``.
            wanted: names the adapter and its path.
            needed: the numbers of all that requests of this engine may still ask for.

        Returns:
            the numbers of those that are kept, until this is called again.

        Raises:
            Exception: vLLM's own; the adapter cannot be read or served.
        """
        before = self._others.pop(wanted.lora_int_id, None) if wanted.load_inplace else None
        try:
            add(wanted)
        except Exception:
            if before is not None:
                self._others[wanted.lora_int_id] = before
            raise
        here = {*needed, *self._manager.list_adapters()}
        self._others = {number: model for number, model in self._others.items() if number in here}
        return tuple(self._others)

    def forget_device(self) -> None:
        """Have vLLM copy each adapter to the device again before it is used: the device's memory was discarded."""
        if self._manager is not None:
            for number in list(self._manager.list_adapters()):
                self._manager._adapter_manager.deactivate_adapter(number)  # noqa: SLF001

    def _load_for_request(self, request: Any) -> Any:
        stored = self._stored.get(request.lora_int_id)
        if stored is not None:
            return fresh(stored.model, request.lora_int_id)
        if request.lora_int_id not in self._others:
            model = self._others[request.lora_int_id] = self._load_from_path(request)
            for layer in model.loras.values():
                layer.optimize()  # as in ``load``
        return fresh(self._others[request.lora_int_id], request.lora_int_id)

    def _keep_over(self, reset: Any) -> None:
        """Run vLLM's ``reset_lora_state``, which drops all adapters because base weights were replaced, and keep them."""
        adapters = self._manager._adapter_manager  # noqa: SLF001
        registered = adapters._registered_adapters  # noqa: SLF001
        kept, pinned = dict(registered.cache), set(registered.pinned_items)
        reset()
        for number, model in kept.items():
            registered[number] = model
        for number in pinned:
            adapters.pin_adapter(number)
