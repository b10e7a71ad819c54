"""What takes the place of SkyRL's ``build_trainer_engine``: vLLM's trainer engine ``areal``, with what SkyRL asks of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skyrl.backends.skyrl_train.weight_sync import get_transfer_strategy
from skyrl.backends.skyrl_train.weight_sync.weight_senders import SkyrlTrainerCapabilities
from skyrl.train.utils.utils import str_to_torch_dtype

from ..syncs import warn_unless_tested
from ..vllm.trainer import ArealTrainerEngine, ArealTrainerInitInfo

if TYPE_CHECKING:
    from collections.abc import Callable

_REPLACED = ("nccl", "ipc")


class SkyRLTrainerEngine(SkyrlTrainerCapabilities, ArealTrainerEngine):  # type: ignore[misc]
    """Updates every engine that the directory knows: all of them move, or none does."""

    # An update drops the caches of the old weights itself, as its option kv says.
    skyrl_handles_prefix_cache_reset = True

    def skyrl_set_reset_prefix_cache(self, reset: bool) -> None:
        """Whether requests in flight compute their keys and values again (SkyRL's clear_kv_cache_on_weight_sync)."""
        self._info.options["kv"] = "recompute" if reset else "keep"


def builder(settings: dict[str, Any]) -> Callable[..., SkyRLTrainerEngine]:
    """Return the function that SkyRL calls on every trainer rank.

    Args:
        settings: see ``ArealTrainerInitInfo``.
    """
    warn_unless_tested("skyrl", "0.4.0")

    def build_trainer_engine(
        *, ie_cfg: Any, colocate_all: bool, rank: int, source_factory: Callable[..., Any], **_: Any
    ) -> SkyRLTrainerEngine:
        """Return this rank's engine. It meets no worker: engines are found through the directory.

        Raises:
            ValueError: SkyRL's configuration asks for what this engine does not send.
        """
        backend = get_transfer_strategy(ie_cfg.weight_sync_backend, colocate_all)
        if backend not in _REPLACED:
            raise ValueError(
                f"weight_sync_backend={ie_cfg.weight_sync_backend}: areal-vllm-ext takes the place of nccl; set "
                "generator.inference_engine.weight_sync_backend=nccl"
            )
        for name in ("speculative_config", "fp8_weight_sync_mode"):
            if getattr(ie_cfg, name, None) is not None:
                raise ValueError(
                    f"{name} is set: areal-vllm-ext does not sync that from SkyRL; unset it, or do without areal-vllm-ext"
                )
        source = source_factory(str_to_torch_dtype(ie_cfg.model_dtype), backend)
        info = ArealTrainerInitInfo(rank=rank, **settings)
        return SkyRLTrainerEngine.trainer_init(info, client=None, source=source)

    return build_trainer_engine
