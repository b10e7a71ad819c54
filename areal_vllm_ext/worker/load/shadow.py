"""Shadows: new weights in the format that kernels read, built beside generation before the vote.

A shadow is a second model that vLLM's own loader loads and processes, as it does at an engine's start. All that can fail
happens to it. The commit copies its tensors into those that kernels and CUDA graphs hold, and assigns what is packed beside.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...integrity import digest
from ...observability import fault_points
from ...transport.base import Cancelled
from ..memory import free_bytes
from . import apart
from .copying import Copies, view_of
from .drafter import DrafterWorker
from .pairing import BeforeLoad, Pairs
from .plan import LoadPlan, ModelFingerprint
from .proof import readable, tie_as
from .recorder import observe_packing
from .shadow_recorder import ShadowRecorder
from .strides import in_memory_order, storage_key
from .tape import NotTaped, TapeRecorder
from .targets import NotPlanned
from .twins import Leaf, NotTwins, tensors_in
from .unloaded import described

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.multiprocessing.reductions import StorageWeakRef

    from ...integrity.digest import Contents
    from .replay import Tape
    from .written import Written

logger = logging.getLogger("vllm.areal_vllm_ext")

# Device memory that a shadow leaves free for others, besides what its loading needs for a moment.
_DEVICE_RESERVE = 512 << 20
# Room for a shadow and for the temporary memory of its loading, as a multiple of the live model's size.
_ROOM_FACTOR = 1.15
# Operators of these kinds wait for other ranks, which build at other times.
_COLLECTIVES = ("c10d", "_c10d_functional", "symm_mem")


class NoShadow(Exception):
    """No shadow can be built, whatever the values of the weights are; the message says why. A reload in the pause may do.

    Attributes:
        lasts: whether the same tensors will have none in later updates either.
    """

    def __init__(self, reason: str, *, lasts: bool = False) -> None:
        """
        Args:
            reason: why there is none.
            lasts: whether later updates of the same tensors will have none either.
        """
        super().__init__(reason)
        self.lasts = lasts


class Refused(Exception):
    """The model does not take these weights; the message says why."""


class BuildOptions(NamedTuple):
    """How a shadow is built.

    Attributes:
        step: called often while it is built; it raises if the update is given up.
        timeout: seconds to wait for another build in this process.
        access: a context that keeps the live weights in memory while they are read.
        memory: a context whose device memory is apart from the engine's.
        recorded: whether to make a load plan of it, or a tape.
        taped: the tape of an earlier load, to be proven.
    """

    step: Callable[[], None] = lambda: None
    timeout: float = -1
    access: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    memory: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    recorded: bool = True
    taped: TapedShadow | None = None


class Shadow:
    """New weights of one worker, complete.

    Attributes:
        digests: of the live model's parameters and buffers after the commit.
        plan: how a later update of the same names, dtypes and shapes is loaded without a shadow; None if it cannot be.
        written: the live memory that the commit writes, by incoming tensor, if the plan knows it.
        taped: how a later update makes its shadow without a model; None if it cannot.
        made: paths of attributes, besides parameters and buffers, that the load made of weights.
    """

    def __init__(self, fingerprint: ModelFingerprint, model: torch.nn.Module | None = None) -> None:
        """
        Args:
            fingerprint: of the live model.
            model: the second model, if these weights lie in one.
        """
        self._fingerprint, self._model = fingerprint, model
        self._copies = Copies()
        self._assigned: list[Leaf] = []
        self._replaced: list[Any] = []
        self.digests: dict[str, int] = {}
        self.plan: LoadPlan | None = None
        self.written: Written | None = None
        self.taped: TapedShadow | None = None
        self.made: tuple[str, ...] = ()

    def set_work(
        self,
        copies: Iterable[tuple[torch.Tensor, torch.Tensor]],
        digests: dict[str, int],
        assigned: Sequence[Leaf] = (),
    ) -> None:
        """Say what the commit must do.

        Args:
            copies: live tensors, each with the one whose bytes it gets.
            digests: of the live parameters and buffers after the commit.
            assigned: objects that take the place of the live model's.
        """
        self.digests, self._assigned = digests, list(assigned)
        self._copies = Copies(copies)

    def fits(self, live: torch.nn.Module) -> bool:
        """Return whether ``live`` still has the tensors that the shadow was built for, at the same addresses."""
        return self._fingerprint.matches(live)

    def warm(self) -> None:
        """Have the device load the kernels that ``copy`` launches."""
        self._copies.warm()

    def copy(self) -> None:
        """Make the live model serve these weights. The device may not have finished when this method returns."""
        self._copies.run()
        for leaf in self._assigned:
            self._replaced.append(leaf.other)  # freed later than in the pause
            setattr(leaf.owner, leaf.key, leaf.value)

    def free(self) -> None:
        """Free the memory. Modules hold each other in circles, so it would otherwise wait for the garbage collector."""
        used = {storage_key(tensor) for leaf in self._assigned for tensor in tensors_in(leaf.value)}
        if self._model is not None:
            used |= self._fingerprint.storages()
            for tensor in (*readable(self._model).values(), *self._copies.sources()):
                if storage_key(tensor) not in used:
                    with contextlib.suppress(RuntimeError):  # memory that is not torch's own
                        tensor.untyped_storage().resize_(0)
        self._copies, self._assigned, self._replaced = Copies(), [], []


class TapedShadow:
    """Makes the shadows of one worker without a model, by the tape of a load.

    Attributes:
        proven: whether it gave the bytes of a load by vLLM twice, of different weights.
    """

    def __init__(self, tape: Tape, pairs: Pairs, fingerprint: ModelFingerprint) -> None:
        """
        Args:
            tape: it makes the sources of the copies of ``pairs``.
            pairs: of the recorded load.
            fingerprint: of the live model.
        """
        self._tape, self._fingerprint = tape, fingerprint
        self._targets = [view_of(target) for target, _ in pairs.copies]
        self._digests, self._places = pairs.digests, pairs.places
        self._made = tuple(pairs.aside)
        self._proofs: set[tuple[int, ...]] = set()

    @property
    def proven(self) -> bool:
        return len(self._proofs) > 1

    def fits(self, live: torch.nn.Module) -> bool:
        """Return whether ``live`` still has the tensors that the tape was recorded for, at the same addresses."""
        return self._fingerprint.matches(live)

    def prove(self, weights: Mapping[str, torch.Tensor], pairs: Pairs, step: Callable[[], None]) -> bool:
        """Compare a replay with a load of the same weights by vLLM. Returns whether it gave the same bytes."""
        made = tuple(digest.digests_of(map(in_memory_order, self._tape.replay(weights, step))))
        if made != tuple(digest.digests_of(in_memory_order(source) for _, source in pairs.copies)):
            return False
        self._proofs.add(made)
        return True

    def shadow(self, weights: Mapping[str, torch.Tensor], options: BuildOptions) -> Shadow:
        """Make a shadow."""
        shadow = Shadow(self._fingerprint)
        with torch.no_grad(), options.memory():
            self._reserve()
            sources = self._tape.replay(weights, options.step)
            values = digest.digests_of(map(in_memory_order, sources))
            digests = self._digests | {name: values[place] for name, place in self._places.items()}
            shadow.set_work(zip(self._targets, sources, strict=True), digests)
            if sources and sources[0].device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        shadow.taped, shadow.made = self, self._made
        return shadow

    def _reserve(self) -> None:
        """Take the memory of a replay from the device at once, because each call of the driver takes long."""
        if self._targets and (device := self._targets[0].device).type == "cuda":
            with contextlib.suppress(torch.OutOfMemoryError):  # in smaller pieces it may be there
                torch.empty(self._tape.nbytes, dtype=torch.uint8, device=device)


def room(worker: Any, weights: Sequence[tuple[str, torch.Tensor]] = ()) -> int:
    """Return the bytes that must be free on the worker's device to build a shadow."""
    size = sum(tensor.nbytes for tensor in _by_storage(readable(worker.get_model())).values())
    if worker.device.type == "cpu":  # packed weights are in no tensor
        size = max(size, sum(tensor.nbytes for _, tensor in weights))
    return int(_ROOM_FACTOR * size) + (_DEVICE_RESERVE if worker.device.type == "cuda" else 0)


def obstacle(worker: Any, weights: Sequence[tuple[str, torch.Tensor]]) -> str:
    """Return why no shadow of ``weights`` can be built for ``worker`` now; empty if one can."""
    config = worker.vllm_config
    parallel = config.parallel_config
    if parallel.enable_eplb:
        return "experts move between the ranks (EPLB), so a fresh load has others"
    if parallel.enable_expert_parallel and parallel.data_parallel_size > 1 and worker.device.type == "cuda":
        return "experts of several DP ranks set up their communication together while they are loaded"
    quantization = apart.model_config_of(config).quantization
    if config.quant_config is not None and quantization in ("bitsandbytes", "gguf"):
        return f"vLLM loads {quantization} by another loader"
    if reason := _offloads(config):
        return reason
    needed = fault_points.reach("shadow", room(worker, weights))
    free = free_bytes(worker.device)
    if needed > free:
        return f"no room on {worker.device} beside the old weights: {needed >> 20} MiB needed, {free >> 20} MiB free"
    return ""


def build(
    worker: Any, weights: Sequence[tuple[str, torch.Tensor]], contents: Contents, options: BuildOptions
) -> Shadow:
    """Build a shadow of the live model with ``weights``. Safe on any thread, beside generation.

    Args:
        worker: vLLM's worker.
        weights: (name, tensor) in checkpoint format, complete.
        contents: their digests, by name.
        options: how.

    Raises:
        NoShadow: this model cannot be shadowed, or there is no room.
        Refused: the model does not take these weights.
    """
    if reason := obstacle(worker, weights):
        raise NoShadow(reason)
    live, staged = worker.get_model(), dict(weights)
    fingerprint = ModelFingerprint(live)
    with contextlib.ExitStack() as unfinished:
        try:
            with apart.apart(worker.vllm_config, options.step, options.timeout) as config, options.memory():
                model = _new_model(config, worker.device)
                tie_as(model, live)
                shadow = Shadow(fingerprint, model)
                unfinished.callback(shadow.free)
                before = BeforeLoad(model)
                recorders = (
                    (ShadowRecorder(model, staged), TapeRecorder(readable(model).values(), staged))
                    if options.recorded
                    else None
                )
                _load(model, config, worker, weights, before, recorders)
                with options.access():
                    pairs = Pairs(model, live, before)
                    shadow.set_work(pairs.copies, pairs.digests, pairs.assigned)
                    shadow.made = tuple(pairs.aside)
                    if recorders is not None:
                        shadow.plan = _plan(recorders[0], live, pairs.aside)
                if shadow.plan is None:
                    taped = _tape(recorders[1], pairs, fingerprint) if recorders is not None else options.taped
                    shadow.taped = _proven(taped, staged, pairs, worker, options)
            if shadow.plan is not None and (copies := shadow.plan.copies_of(staged)):
                shadow.written = copies.written({name: value for name, (_, value) in contents.items()})
            if worker.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        except NotTwins as reason:
            raise NoShadow(str(reason), lasts=True) from None
        except torch.OutOfMemoryError as error:
            _collect(error)
            raise NoShadow(f"the memory for new weights beside the old ones ran out: {error}") from None
        except MemoryError as error:
            _collect(error)
            raise Refused(f"the host's memory for the new weights ran out: {error}") from None
        unfinished.pop_all()
    return shadow


def _new_model(config: Any, device: torch.device) -> torch.nn.Module:
    try:
        return apart.new_model(config, device)
    except Exception as error:
        _raise_again(error)
        logger.warning("areal_vllm_ext: no second model can be built beside the live one", exc_info=True)
        raise NoShadow(f"vLLM cannot build a second model ({type(error).__name__}: {error})", lasts=True) from None


def _load(
    model: torch.nn.Module,
    config: Any,
    worker: Any,
    weights: Sequence[tuple[str, torch.Tensor]],
    before: BeforeLoad,
    recorders: tuple[ShadowRecorder, TapeRecorder] | None,
) -> None:
    """Load the weights, and refuse those that the model does not take, or that leave parameters without weights."""
    unloaded: list[str] = []
    device, drafter = worker.device, worker if isinstance(worker, DrafterWorker) else None

    def load(one: Any) -> None:
        one.load_weights(_fed(weights))
        if drafter is not None:
            drafter.take_shared_off(one)
        unloaded.extend(before.writes.unloaded())

    try:
        with contextlib.ExitStack() as watching:
            watching.enter_context(_NoCollectives())
            watching.enter_context(before.writes)
            for recorder in recorders or ():
                watching.enter_context(recorder)
            if recorders and device.type == "cpu":
                watching.enter_context(observe_packing(recorders[0]))
            apart.load_into(model, config, device, load)
        if drafter is not None:
            drafter.put_shared_on(model)
    except Exception as error:
        _raise_again(error)
        logger.info("areal_vllm_ext: the new weights cannot be loaded", exc_info=True)
        raise Refused(f"the model does not take these weights: {type(error).__name__}: {error}") from None
    missing = [name for name in unloaded if name in readable(model)]
    if missing and apart.model_config_of(config).quantization is None:
        raise Refused(f"{described(missing)}; send all weights")


def _plan(recorder: ShadowRecorder, live: torch.nn.Module, aside: Sequence[str]) -> LoadPlan | None:
    try:
        plan = recorder.plan_for(live, aside)
    except NotPlanned as reason:
        logger.info("areal_vllm_ext: no load plan, so each update is loaded beside the live weights: %s", reason)
        return None
    except Exception as error:
        _raise_again(error)
        logger.warning("areal_vllm_ext: no load plan could be made", exc_info=True)
        return None
    logger.info("areal_vllm_ext: further updates are copied as planned, %d MiB", plan.nbytes >> 20)
    return plan


def _tape(recorder: TapeRecorder, pairs: Pairs, fingerprint: ModelFingerprint) -> TapedShadow | None:
    if pairs.assigned:
        return None  # packed functions are no tensors
    try:
        return TapedShadow(recorder.tape(source for _, source in pairs.copies), pairs, fingerprint)
    except NotTaped as reason:
        logger.info("areal_vllm_ext: each update is loaded by vLLM's loader: %s", reason)
    except Exception as error:
        _raise_again(error)
        logger.warning("areal_vllm_ext: the load could not be taped", exc_info=True)
    return None


def _proven(
    taped: TapedShadow | None, staged: Mapping[str, torch.Tensor], pairs: Pairs, worker: Any, options: BuildOptions
) -> TapedShadow | None:
    """Return the tape after a proof, or without one if there is no room for it; None if the tape is wrong."""
    if taped is None or obstacle(worker, list(staged.items())):
        return taped
    try:
        if taped.prove(staged, pairs, options.step):
            if taped.proven:
                logger.info("areal_vllm_ext: further updates are made by the tape of a load")
            return taped
        logger.info("areal_vllm_ext: each update is loaded by vLLM's loader: a tape of it gives other bytes")
    except (Cancelled, TimeoutError):
        raise
    except Exception:
        logger.warning("areal_vllm_ext: the tape of a load cannot be replayed", exc_info=True)
    return None


class _NoCollectives(TorchDispatchMode):
    """Refuses operators that wait for other ranks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _COLLECTIVES:
            raise NoShadow(f"{func} waits for other ranks while the model is loaded", lasts=True)
        return func(*args, **(kwargs or {}))


def _fed(weights: Sequence[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        fault_points.reach("shadow", tensor.nbytes)
        yield name, tensor


def _offloads(config: Any) -> str:
    offload = getattr(config, "offload_config", None)
    if offload is not None and getattr(getattr(offload, "uva", None), "cpu_offload_gb", None):
        return "a part of the weights is kept on the host (cpu_offload_gb)"
    return ""


def _raise_again(error: Exception) -> None:
    """Raise ``error`` if it says nothing about the weights: the update is given up, or memory ran out."""
    if isinstance(error, (Cancelled, TimeoutError, NoShadow, torch.OutOfMemoryError, MemoryError)):
        raise error
    if "can't allocate memory" in str(error):  # torch's way to say so on a CPU
        raise MemoryError(str(error)) from None


def _collect(error: Exception) -> None:
    """Free what the failed build still holds, because memory is short."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()


def _by_storage(tensors: Mapping[str, torch.Tensor]) -> dict[StorageWeakRef, torch.Tensor]:
    return {storage_key(tensor): tensor for tensor in tensors.values()}
