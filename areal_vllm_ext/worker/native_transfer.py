"""vLLM's own weight transfer on one worker, step by step, as ``protocol/transfer_steps.py`` names them.

Everything here runs on the worker's own thread, while the engine is paused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..protocol import transfer_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from .live_weights import LiveWeights
    from .residency import Residency


class NativeTransfer:
    """The session of one worker, if any."""

    def __init__(self, worker: Any, live_weights: LiveWeights, residency: Residency) -> None:
        self._worker, self._live_weights, self._residency = worker, live_weights, residency
        self._open = False

    def step(self, method: str) -> Callable[..., Any] | None:
        """Return what carries out the step that ``method`` names; None if it names none."""
        return getattr(self, transfer_steps.name_of(method)) if method in transfer_steps.STEPS else None

    def ready(self) -> str:
        """Return the backend's name.

        Raises:
            RuntimeError: this worker cannot take part.
        """
        from vllm.version import __version__ as vllm_version

        worker = self._worker
        if not hasattr(worker, "start_weight_update"):
            raise RuntimeError(
                f"vLLM {vllm_version} has no sessions of weight transfer: use the trainer engine areal, which needs none"
            )
        if worker.weight_transfer_engine is None:
            raise RuntimeError(
                'the engine was started without --weight-transfer-config \'{"backend": "nccl"}\' or "ipc"'
            )
        if reason := self._residency.asleep_reason():
            raise RuntimeError(reason)
        return str(worker.vllm_config.weight_transfer_config.backend)

    def init(self, init_info: dict[str, Any]) -> None:
        """Meet the trainer."""
        self._worker.init_weight_transfer_engine(init_info)

    def start(self) -> None:
        """Make the live model ready for new weights; from here on it is not whole."""
        self.abandon()
        self._open = True
        self._live_weights.begin_foreign_load()
        self._worker.start_weight_update()

    def update(self, update_info: Any) -> None:
        """Receive and load one piece."""
        from ..transport.native_handles import from_plain

        self._worker.update_weights(from_plain(update_info))

    def finish(self, _version: int | str) -> None:
        """Make the model whole again."""
        from .load.loader import repack_tied_layers

        self._worker.finish_weight_update()
        if self._worker.device.type == "cpu":
            repack_tied_layers(self._worker.get_model())
        self._close()

    def abandon(self) -> None:
        """Give the model the form back in which the next update can load, whatever is in it. Idempotent."""
        if not self._open:
            return
        from .load.loader import leave_reload

        worker = self._worker
        leave_reload(worker.get_model())
        worker.weight_transfer_engine.reset_weight_update_target()
        worker._weight_update_active = False  # noqa: SLF001 - vLLM leaves it set where a session does not finish
        self._close()

    def shutdown(self) -> None:
        """Leave the trainer."""
        self._worker.shutdown_weight_transfer_engine()

    def _close(self) -> None:
        self._open = False
        self._live_weights.end_foreign_load()
