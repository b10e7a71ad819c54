"""``AsyncUpdate``: the asynchronous face of an update."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn

from .options import checked_mapping
from .transaction import CANNOT_PICKLE

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import torch

    from ..protocol import Version
    from .drafts import DraftSource
    from .lora import AdapterSource
    from .state import UpdateResult
    from .transaction import Transaction
    from .weights import WeightSource


class AsyncUpdate:
    """An update in progress; made by ``AsyncEngineGroup.update``."""

    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction  # for this package's own use
        self._sending: asyncio.Future[None] | None = None

    @property
    def version(self) -> Version:
        """Names the new weights."""
        return self.transaction.version

    @property
    def result(self) -> UpdateResult:
        """What the update took; set when its block has been left."""
        return self.transaction.result

    async def send(
        self,
        weights: WeightSource | str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        draft: DraftSource | None = None,
    ) -> None:
        """Bring new weights to every engine's staging. The engines generate meanwhile.

        Change the weights after the update's block only: by CUDA IPC, engines read them in place until then.

        Args:
            weights: an ``nn.Module``, a state dict, an iterable of (name, tensor), or the path of a Hugging Face
                checkpoint directory that every engine can read.
            dtype: the dtype in which floating-point tensors are sent. By default, a tensor that is wider than in the
                engines' checkpoint is cast to the checkpoint's dtype. ``"auto"`` casts every tensor to its dtype in the
                checkpoint. A dtype (``"bfloat16"``) casts all tensors to it, except those that the checkpoint keeps wider.
            draft: the weights of the model with which the engines draft (EAGLE, a draft model), as ``weights``; a path is
                read by this process. A drafter whose tensors are in the base model's checkpoint (MTP) moves with ``weights``
                where they hold these tensors. Without either, the drafter stays as it is, which is logged once.

        Raises:
            InvalidWeights: the weights do not fit the engines' model; nothing changed.
            UpdateAborted: an engine failed or the time is over; nothing changed.
        """
        self._sending = asyncio.ensure_future(asyncio.to_thread(self.transaction.send, weights, dtype, draft))
        # If this call is cancelled, its thread goes on until it notices. The end of the block waits for it.
        self._sending.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(self._sending)

    async def prepare(self) -> None:
        """Ask every engine for its vote now, and hold the update. Leaving the block commits.

        Without this call, leaving the block asks for the votes and commits. Use it where something else must succeed between
        the two, such as another group's votes. Engines generate with their old weights meanwhile.

        Raises:
            UpdateAborted: an engine voted no or did not answer; nothing changed.
        """
        await self.transaction.prepare()

    async def send_adapter(self, name: str, source: AdapterSource) -> None:
        """Bring a LoRA adapter to every engine: a new one, or the next version of one that they serve.

        It is copied into host memory now, so the trainer may go on to change it. It is committed together with all else that
        this update brings, when its block is left. Requests give ``name`` as their model. Requests in flight finish on the
        version that they began with, or end, as the update's ``mode`` says.

        Args:
            name: the adapter's name for requests.
            source: a PeftModel (its adapter of that name, else its active one), a directory that ``save_pretrained`` wrote and
                that this process can read, or ``(get_peft_model_state_dict(model), LoraConfig or dict)``.

        Raises:
            InvalidWeights: it is no adapter, or holds NaN or infinite values; nothing changed.
        """
        await asyncio.to_thread(self.transaction.add_adapter, name, source)

    async def remove_adapter(self, name: str) -> None:
        """Have every engine serve the adapter no longer, once this update is committed. Requests in flight finish on it.

        An adapter that no engine has is no error.
        """
        self.transaction.remove_adapter(name)

    async def change_adapters(self, adapters: Mapping[str, AdapterSource | None]) -> None:
        """Send or, where the source is None, remove several adapters; see ``send_adapter``."""
        for name, source in checked_mapping("adapters", adapters).items():
            await (self.remove_adapter(name) if source is None else self.send_adapter(name, source))

    async def __aenter__(self) -> AsyncUpdate:
        self.transaction.start(asyncio.get_running_loop())
        await self.transaction.open()
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        await self.transaction.close(error, self._sending)

    def __reduce__(self) -> NoReturn:
        raise TypeError(CANNOT_PICKLE)
