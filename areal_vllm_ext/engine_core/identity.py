"""Who an engine is: its replica, its rank, its workers, and where its directory is."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

from ..config import DEFAULT_DIRECTORY_PORT
from ..control.directory import new_incarnation
from ..protocol import EngineInfo
from .launch_facts import launch_facts

# Ways to draft that need no model.
_WITHOUT_MODEL = ("ngram", "suffix", "custom", "extract_hidden_states")

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ..config import Settings


def is_launched_externally(config: VllmConfig) -> bool:
    """Return whether torchrun or the like started one engine of one worker for each rank, which all run in lockstep."""
    return bool(config.parallel_config.distributed_executor_backend == "external_launcher")


def directory_address(settings: Settings, config: VllmConfig) -> str:
    """Return the address of this engine's directory: the setting, or the default port of the data-parallel head."""
    head = config.parallel_config.data_parallel_master_ip
    if is_launched_externally(config):
        head = os.environ["MASTER_ADDR"]
    return settings.directory or f"tcp://{head}:{DEFAULT_DIRECTORY_PORT}"


def engine_count(config: VllmConfig) -> int:
    """Return how many engines the replica has: its DP ranks, or the ranks of an external launcher."""
    if is_launched_externally(config):
        return int(os.environ["WORLD_SIZE"])
    # vLLM tells a rank of a dense model that it is alone.
    return max(int(config.parallel_config.data_parallel_size), launch_facts().data_parallel_size)


def worker_ranks(config: VllmConfig) -> frozenset[int]:
    """Return the ranks of this engine's workers."""
    if is_launched_externally(config):
        return frozenset({int(os.environ["RANK"])})
    return frozenset(range(config.parallel_config.world_size))


def describe_engine(config: VllmConfig, settings: Settings, host: str) -> EngineInfo:
    """Return who this engine is; its address and workers are added when they are known."""
    parallel = config.parallel_config
    replica, rank = (
        f"{parallel.data_parallel_master_ip}:{parallel.data_parallel_rpc_port}",
        parallel.data_parallel_index,
    )
    if is_launched_externally(config):
        replica, rank = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", int(os.environ["RANK"])
    return EngineInfo(
        replica=settings.replica or replica,
        dp_rank=rank,
        dp_size=engine_count(config),
        headless=launch_facts().headless,
        node=f"{socket.gethostname()}/{host}",
        pid=os.getpid(),
        incarnation=new_incarnation(time.time()),
        address="",
        # vLLM tells a rank of a dense model that it is alone.
        lockstep=parallel.data_parallel_size > 1 or is_launched_externally(config),
        sleep_mode=bool(getattr(config.model_config, "enable_sleep_mode", False)),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        drafter=_drafter(config),
    )


def _drafter(config: VllmConfig) -> str:
    """Return how this engine drafts with a model; empty if it does not."""
    method = getattr(config.speculative_config, "method", None) or ""
    return "" if str(method).startswith(_WITHOUT_MODEL) else str(method)
