"""``WorkerExtension``: the methods that ``collective_rpc`` reaches. vLLM mixes this class into its worker class."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ..process.collector import no_collection

if TYPE_CHECKING:
    from .receiver import Receiver

from . import startup  # noqa: F401 - it notes the time before vLLM loads the model


class WorkerExtension:
    """A mixin of vLLM's worker, whose attributes (``rank``, ``device``, ``vllm_config``, ...) it uses.

    Names start with ``areal_``, because vLLM refuses an extension that hides a name of the worker's.
    """

    def areal_attach(self: Any, endpoint: str, token: str) -> None:
        """Start the receiver thread, and connect it to this engine's endpoint at ``endpoint`` with ``token``."""
        from ..vllm_versions import set_device
        from .receiver import Receiver

        set_device(self)
        self._areal_receiver = Receiver(self, endpoint, token)

    def areal_free_memory(self: Any) -> int | None:
        """Return the free bytes of this worker's device, or None if it is a CPU."""
        import torch

        return torch.cuda.mem_get_info(self.device)[0] if torch.device(self.device).type == "cuda" else None

    def areal_call(self: Any, method: str, arguments: bytes, longest_answer: int) -> tuple[int, bytes, str, str]:
        """Call a method of the user's extension, see ``user_methods.call``. Runs on the worker's own thread.

        Returns:
            this worker's rank, the answer in msgpack, and the type and message of an exception.
        """
        from . import user_methods

        context = self._areal_receiver.context
        step = context.native_transfer.step(method)
        return context.rank, *user_methods.call(self, method, arguments, longest_answer, step)

    def areal_load_adapter(self: Any, wanted: Any, needed: tuple[int, ...]) -> tuple[int, ...]:
        """Load an adapter of another user, see ``AdapterStore.load_other``. Runs on the worker's own thread."""
        kept: tuple[int, ...] = self._areal_receiver.context.adapters.load_other(self.add_lora, wanted, needed)
        return kept

    def areal_commit_fetched(
        self: Any, fetch: str, update: str, numbers: dict[str, int] | None = None, kept: tuple[int, ...] = ()
    ) -> None:
        """Make live what was fetched from a peer, which ``update`` brought there. Runs while the engine is paused.

        Args:
            fetch: its name.
            update: its id.
            numbers: by which requests ask for the adapters that were fetched.
            kept: the numbers of all adapters that requests may still ask for.

        Raises:
            RuntimeError: it was given up, or the live weights are not what was fetched.
        """
        self._areal_receiver.peers.commit(fetch, update, numbers or {}, kept)

    def areal_read_packed(self: Any, rank: int, fetch: str, layer: str, start: int, count: int) -> None:
        """Read columns of a packed weight for a fetch, on the worker of this rank. Runs on the worker's own thread."""
        self._areal_receiver.peers.read_packed(rank, fetch, layer, start, count)

    def areal_commit(
        self: Any, update: str, weights: bool = True, numbers: dict[str, int] | None = None, kept: tuple[int, ...] = ()
    ) -> tuple[str, str]:
        """Make what is staged of ``update`` live. Runs on the worker's own thread while the engine is paused.

        Args:
            update: its id.
            weights: whether it brings base weights.
            numbers: by which requests ask for the adapters that it brings.
            kept: the numbers of all adapters that requests may still ask for.

        Returns:
            how weights were loaded (``plan``, ``shadow``, or ``reload`` with the reason; empty without weights); and why the
            live weights could not be compared with a fresh load, if they should have been, else empty.

        Raises:
            RuntimeError: the staged weights are not those of ``update``, loading them failed, or the live weights are not
                what a fresh load gives.
        """
        receiver = self._areal_receiver
        receiver.context.native_transfer.abandon()  # left by a trainer that is gone
        try:
            loaded = _commit_weights(receiver, update) if weights else ("", "")
            receiver.context.adapters.commit(receiver.staged(update).adapters.voted, numbers or {}, kept)
            return loaded
        finally:
            receiver.discard(update)


def _commit_weights(receiver: Receiver, update: str) -> tuple[str, str]:
    """Make the staged base weights live. Returns and raises as ``areal_commit``."""
    from .residency import NotResident

    context = receiver.context
    spans, track = receiver.spans(update), f"worker {context.rank}"
    staged = receiver.staged(update)
    weights, run = list(staged.tensors.items()), staged.run
    # An engine can fall asleep between its vote and now. A plan that fits the model knows where each tensor is.
    planned = run is not None and run.complete and context.loader.fits(run)
    shadow = staged.shadow if staged.shadow is not None and context.loader.fits_shadow(staged.shadow) else None
    if reason := context.residency.asleep_reason() if planned or shadow else context.residency.absent_reason():
        raise NotResident(f"worker {context.rank} applied nothing: {reason}")
    staged.draft.check_fits()
    # A reload takes seconds and leaves much to collect; a copy takes milliseconds.
    quiet = no_collection() if planned or shadow else contextlib.nullcontext()
    with quiet, context.live_weights.committing(staged.manifest, update, draft=bool(staged.draft)):
        if staged.draft:
            context.live_weights.set_draft(*staged.draft.commit())
        if shadow is not None and not planned:
            with spans.span(track, "load"):
                context.live_weights.set_written(context.loader.load_shadow(shadow, weights))
                context.live_weights.set_proven((name for name, _ in weights), shadow.digests)
            return "shadow", ""
        with spans.span(track, "load"):
            digests = {name: value for name, (_, value) in staged.manifest.items()}
            written = context.loader.load(weights, run, digests, planned=planned)
            context.live_weights.set_written(written, kept=run.kept if run is not None else ())
        with spans.span(track, "prove"):
            partial = run is not None and run.partial
            unproven: str = context.live_weights.prove(weights, partial=partial)
        staged.confirm_shared()
    why = staged.no_shadow or "the live weights have moved since the vote"
    return "plan" if planned else f"reload: {why}", unproven
