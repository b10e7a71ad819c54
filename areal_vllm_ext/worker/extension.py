"""``WorkerExtension``: the methods that ``collective_rpc`` reaches. vLLM mixes this class into its worker class."""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """Mixed into vLLM's worker, whose attributes (``rank``, ``device``, ``vllm_config``, ...) it uses.

    Names start with ``areal_``: vLLM refuses an extension that hides a name of the worker's.
    """

    def areal_attach(self: Any, endpoint: str, token: str) -> None:
        """Start the receiver thread and connect it to this engine's endpoint at ``endpoint``, which knows it by ``token``."""
        from .receiver import Receiver

        self._areal_receiver = Receiver(self, endpoint, token)

    def areal_commit(self: Any, update: str) -> str:
        """Switch to the staged weights of ``update``. Runs on the worker's own thread, while the engine is paused.

        Returns:
            why the new weights could not be compared with a fresh load, where they should have been; else empty.

        Raises:
            RuntimeError: where the staged weights are not those of ``update``, or loading them failed, or they are not what
                a fresh load gives.
        """
        receiver = self._areal_receiver
        spans, track = receiver.spans(update), f"worker {receiver.rank}"
        try:
            weights, bound = receiver.staged(update), receiver.bound(update)
            with receiver.served.switching(receiver.contents(update), update):
                with spans.span(track, "load"):
                    receiver.served.copied = receiver.loader.load(weights, bound)
                with spans.span(track, "prove"):
                    part = bound is not None and bound.partial
                    unproven: str = receiver.served.prove(weights, part=part)
                receiver.confirm(update)
            return unproven
        finally:
            receiver.discard(update)
