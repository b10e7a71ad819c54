"""``OutputVersions``: the version in the outputs of requests that finish on an adapter's earlier version.

vLLM stamps all outputs of a step with the engine's version. A request whose adapter was replaced while it ran goes on with the
version of the adapter that it began with, so its outputs carry the engine's version of before that update.
"""

from __future__ import annotations

import collections
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection


class OutputVersions:
    """The versions of requests that differ from their engine's. Runs on the engine's loop."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._versions: dict[str, str] = {}
        attach = getattr(engine, "_attach_weight_version", None)
        # An in-process engine has no queue of outputs, and an earlier vLLM stamps none.
        if attach is None or not hasattr(engine, "output_queue"):
            return

        @functools.wraps(attach)
        def attach_weight_version(outputs: dict[int, Any]) -> None:
            attach(outputs)
            if self._versions:
                self._split(outputs)

        engine._attach_weight_version = attach_weight_version  # noqa: SLF001

    def keep(self, version: str, replaced: Collection[str]) -> None:
        """Have the requests that run on the ``replaced`` versions of adapters carry ``version`` to their end."""
        requests = self._engine.scheduler.requests
        self._versions = {name: one for name, one in self._versions.items() if name in requests}
        for name, request in requests.items():
            adapter = request.lora_request
            if adapter is not None and adapter.lora_name in replaced:
                self._versions.setdefault(name, version)

    def _split(self, outputs: dict[int, Any]) -> None:
        """Send the outputs of these requests in a batch of their own."""
        for client, batch in outputs.items():
            earlier: dict[str, list[Any]] = collections.defaultdict(list)
            others: list[Any] = []
            for output in batch.outputs:
                version = self._versions.get(output.request_id)
                (others if version is None else earlier[version]).append(output)
                if output.finish_reason is not None:
                    self._versions.pop(output.request_id, None)
            batch.outputs = others
            for version, own in earlier.items():
                self._engine.output_queue.put_nowait((client, type(batch)(outputs=own, weight_version=version)))
