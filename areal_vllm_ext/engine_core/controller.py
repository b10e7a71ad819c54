"""Joins endpoint and engine: starts them together, and runs calls on the engine's own loop, between two steps.

Everything here that touches the engine runs on the thread that steps it. A call of ``Endpoint`` returns at once, and its
outcome is posted back to the endpoint's thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import itertools
import logging
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ..config import Settings, split_address
from ..control.directory_server import DirectoryServer
from ..errors import HookError, SettingsError
from ..process.host_slot import HostSlot
from ..protocol import NO_SLEEP_MODE, CallAnswer, Version, security, timing, transfer_steps
from ..vllm_versions import drop_keys_and_values
from .adapters import Adapters
from .effects import CallPause, CallSleep
from .endpoint import Endpoint
from .foreign_calls import ForeignCalls
from .identity import describe_engine, directory_address, engine_count, worker_ranks
from .native_transfer import version_of
from .prefix_root import PrefixRoot
from .sleep import ALL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vllm.config import VllmConfig
    from vllm.v1.engine.core import EngineCore

    from ..protocol import Units
    from ..protocol.peer_messages import ReadPacked
    from .effects import CallCommit, CallCommitFetched, CallMethod, CallResume, CallWakeUp, Guard

logger = logging.getLogger("vllm.areal_vllm_ext")

_ATTACH_SECONDS = 60.0
_REGISTER_SECONDS = 10.0


def check_settings(config: VllmConfig) -> tuple[Settings, str, security.ClusterKey]:
    """Read and check what an engine needs before its model loads; return settings, own address and key.

    Raises:
        SettingsError: naming the setting that is missing or wrong.
    """
    additional = config.additional_config if isinstance(config.additional_config, dict) else {}
    settings = Settings.load(additional)
    directory_host = split_address(directory_address(settings, config))[0]
    try:
        host = settings.host or security.own_address_toward(directory_host)
    except OSError as error:
        raise SettingsError(f"the directory's host {directory_host} cannot be resolved or reached: {error}") from None
    security.key_for(directory_host, settings.key_file)
    return settings, host, security.key_for(host, settings.key_file)


class Controller:
    """The control side of one EngineCore."""

    def __init__(self, engine: EngineCore, run_on_loop: Callable[[Callable[[], None]], object]) -> None:
        """Bind, attach the workers and register.

        Args:
            engine: the engine, whose model is loaded.
            run_on_loop: runs a function on the engine's thread, between two steps.

        Raises:
            SettingsError: if an address, a key or a port does not work.
        """
        self._engine: Any = engine
        self._run_on_loop = run_on_loop
        self._idle_callback: Callable[..., None] | None = None
        self._calls: dict[int, float] = {}
        self._call_ids = itertools.count()
        self._prefix_root = PrefixRoot(engine)
        config = engine.vllm_config
        self._adapters = Adapters(engine)
        self._foreign = ForeignCalls(
            engine,
            lambda event: self.endpoint.post(lambda: event(self.endpoint.participant)),
            can_wait=hasattr(engine, "output_queue"),  # an in-process engine has none
        )
        settings, host, key = check_settings(config)
        address = directory_address(settings, config)
        self._slot = None if settings.replica or engine_count(config) > 1 else HostSlot("replica")
        if self._slot:
            settings = dataclasses.replace(settings, replica=f"{host}/{self._slot.number}")
        info = describe_engine(config, settings, host)
        self.endpoint = Endpoint(
            info=info,
            host=host,
            directory=address,
            key=key,
            workers=worker_ranks(config),
            version=getattr(engine, "_weight_version", "default"),
            settings=settings,
            engine=self,
        )
        if info.dp_rank == 0:
            self._host_directory(address, key, settings, alone=info.dp_size == 1)
        self.endpoint.start()
        self._attach_workers(info.name)
        if not self.endpoint.wait_attached(_ATTACH_SECONDS):
            raise SettingsError(
                f"not every worker of {info.name} reached its control endpoint {self.endpoint.address} in "
                f"{_ATTACH_SECONDS:.0f} s; do the workers' nodes have the same key file, and reach that address?"
            )
        # Before the first step, because a restarted engine must not serve weights that the others no longer serve.
        while not self.endpoint.wait_registered(_REGISTER_SECONDS):
            if refusal := self.endpoint.directory_refusal:
                self.endpoint.stop()
                raise SettingsError(f"the directory {address} refuses {info.name}: {refusal}")
            logger.warning(
                "%s waits to join: no answer of the directory %s, or a client is at work", info.name, address
            )
        logger.info("%s is under control at %s (directory %s)", info.name, self.endpoint.address, address)

    def _attach_workers(self, name: str) -> None:
        try:
            self._engine.collective_rpc("areal_attach", args=(self.endpoint.address, self.endpoint.attach_token))
        except Exception as error:
            if "areal_attach" not in str(error):
                raise
            self.endpoint.stop()
            raise HookError(
                f"a worker of {name} has not loaded the plugin areal_vllm_ext ({error}): install the package on every node, "
                "and name areal_vllm_ext in VLLM_PLUGINS there, if that is set"
            ) from error

    def _host_directory(self, address: str, key: security.ClusterKey, settings: Settings, *, alone: bool) -> None:
        explicit = settings.directory is not None
        try:
            self.directory = DirectoryServer(
                self.endpoint.context,
                *split_address(address),
                key,
                settle_seconds=0.0 if alone and not explicit else timing.SETTLE_SECONDS,
                resume_orphans=settings.resume_orphans,
            )
        except SettingsError as error:
            cause = getattr(error.__cause__, "errno", None)
            # If the user chose the address, the directory may belong to another replica or run on another node.
            if explicit and cause in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ENODEV):
                logger.info("the directory %s is served elsewhere (%s)", address, error)
                return
            self.endpoint.stop()
            raise SettingsError(
                f"{error}; set AREAL_VLLM_DIRECTORY=tcp://HOST:PORT for these engines and their trainer: the address of the "
                "other engines' directory if one trainer updates them together, else a free port"
            ) from error

    def stop(self, reason: str = "its process ends") -> None:
        self.endpoint.stop(reason)
        if self._slot:
            self._slot.close()

    # Calls of the endpoint

    def pause(self, effect: CallPause) -> None:
        def on_loop() -> None:
            before = list(self._idle_callbacks)
            # Not vLLM's own ``clear_cache``: it also clears one half of the cache of processed inputs.
            with self._foreign.ours():
                result = self._engine.pause_scheduler(mode=effect.mode, clear_cache=False)
            self._idle_callback = next((one for one in self._idle_callbacks if one not in before), self._idle_callback)
            if isinstance(result, Future):
                result.add_done_callback(lambda future: idle(error_of(future.exception())))
            else:
                idle("")

        def idle(error: str) -> None:
            if not error:
                self._foreign.paused = self._foreign.paused or effect.users
                try:
                    self._drop_caches(values=effect.clear_cache, encoders=not effect.users, root=effect.root)
                except Exception as problem:
                    error = error_of(problem)
            report(error)

        def report(error: str) -> None:
            self.endpoint.post(functools.partial(self.endpoint.participant.pauses.pause_done, effect.call, error))

        self._call("pause", on_loop, failed=report)

    def resume(self, effect: CallResume) -> None:
        def on_loop() -> None:
            if effect.lifts:
                self._foreign.paused = False
            if self._foreign.discarded:  # since this resume was decided
                raise RuntimeError(f"not resumed: {self._foreign.discarded}; send an update")
            asleep = bool(getattr(self._engine.model_executor, "sleeping_tags", ()))
            if asleep and effect.asked:
                raise RuntimeError("this engine sleeps (vLLM's sleep mode): wake it up instead")
            stays = self._foreign.paused or asleep
            with self._foreign.ours():
                if not stays:
                    if not self._cancel_pending_pause():
                        self._engine.resume_scheduler()
                elif hasattr(self._engine, "pending_pause"):
                    # The ranks of an MoE group resume together; no step runs before this one pauses again.
                    self._engine.resume_scheduler()
                    self._engine.pause_scheduler(mode="keep", clear_cache=False)
            report("", paused=stays)

        def report(error: str, *, paused: bool = False) -> None:
            resume_done = self.endpoint.participant.pauses.resume_done
            self.endpoint.post(lambda: resume_done(effect.call, error, paused=paused))

        self._call("resume", on_loop, failed=report)

    def guard(self, guard: Guard) -> None:
        """Keep other users of the engine from what ``guard`` names."""
        self._call("guard", lambda: self._foreign.guard(guard), failed=lambda _: None)

    def is_paused(self) -> bool:
        """Return whether the scheduler is paused; read from another thread, so a moment old."""
        return bool(self._engine.is_scheduler_paused())

    def cancel_pause(self, call: int) -> None:
        def report(cancelled: bool) -> None:
            self.endpoint.post(functools.partial(self.endpoint.participant.pauses.cancel_done, call, cancelled))

        self._call(
            "cancel",
            lambda: report(not (self._foreign.paused or self._foreign.discarded) and self._cancel_pending_pause()),
            failed=lambda _: report(False),
        )

    def commit(self, effect: CallCommit) -> None:
        started = time.perf_counter()

        def report(error: str, loaded: str = "", unproven: str = "") -> None:
            seconds = time.perf_counter() - started
            self.endpoint.post(lambda: self.endpoint.participant.commit_done(error, seconds, loaded, unproven))

        def on_loop() -> None:
            self._check_paused()
            units = effect.units
            versions = {one.name: str(effect.version) for one in units.adapters}
            answers = self._commit_on_workers("areal_commit", (effect.update, units.weights), units, versions)
            if units.weights:
                self._foreign.discarded = ""
            loaded, unproven = ("; ".join(filter(None, dict.fromkeys(each))) for each in zip(*answers, strict=True))
            self._set_version(effect.version)
            report("", loaded, unproven)

        self._call("commit", on_loop, failed=report)

    def commit_fetched(self, effect: CallCommitFetched) -> None:
        touched = False

        def report(error: str) -> None:
            committed = self.endpoint.peering.returning.committed
            self.endpoint.post(lambda: committed(error, time.monotonic(), touched=touched))

        def on_loop() -> None:
            nonlocal touched
            self._check_paused()
            if "weights" in self._foreign.asleep:  # another user's call that came to the loop before the guard
                raise RuntimeError("another user has put this engine to sleep")
            touched = True
            units = self._adapters.units_of(effect.adapters)
            versions = {name: str(one.version) for name, one in effect.adapters.items()}
            self._commit_on_workers("areal_commit_fetched", (effect.fetch, effect.update), units, versions)
            self._drop_caches(values=True, encoders=True, root=effect.update)
            self._foreign.discarded = ""
            self._set_version(effect.version)
            report("")

        self._call("commit fetched", on_loop, failed=report)

    def read_packed(self, order: ReadPacked) -> None:
        """Read a part of a packed weight, which no other thread may; the worker that offers it waits."""
        arguments = (order.rank, order.fetch, order.layer, order.start, order.count)

        def on_loop() -> None:
            self._engine.collective_rpc("areal_read_packed", args=arguments)

        self._call("read packed", on_loop, failed=lambda _: None)

    def change_sleep(self, effect: CallSleep | CallWakeUp) -> None:
        def on_loop() -> None:
            if time.monotonic() >= effect.ends:
                raise RuntimeError("its time was over when the engine's loop came to it; nothing was done")
            if not self._engine.vllm_config.model_config.enable_sleep_mode:
                raise RuntimeError(NO_SLEEP_MODE)
            if not self.is_paused():
                raise RuntimeError("the engine runs: another user has resumed it")
            error, free = "", list[int | None]()
            try:
                self._change_sleep(effect)
                free = self._engine.collective_rpc("areal_free_memory")
            except Exception as problem:
                logger.exception("areal_vllm_ext: a worker did not fall asleep or wake up")
                error = error_of(problem)
            self._report_sleep(effect.call, error, min((one for one in free if one is not None), default=None))

        self._call("sleep", on_loop, failed=lambda error: self._report_sleep(effect.call, error, touched=False))

    def _change_sleep(self, effect: CallSleep | CallWakeUp) -> None:
        # The executor's own methods: the engine's also pause and resume, each rank for itself.
        executor = self._engine.model_executor
        if isinstance(effect, CallSleep):
            self._foreign.slept(effect.level)
            try:
                executor.sleep(effect.level)
            finally:
                # vLLM does not note a sleep that failed on one worker. Then it would wake no worker up, and resume the engine.
                executor.sleeping_tags |= ALL
        else:
            executor.wake_up(list(effect.tags))

    def _report_sleep(self, call: int, error: str, free: int | None = None, *, touched: bool = True) -> None:
        sleep_done = self.endpoint.participant.sleep_done
        self.endpoint.post(lambda: sleep_done(call, error, free, touched=touched))

    def call_method(self, effect: CallMethod) -> None:
        """Run a user's method on every worker, as vLLM runs its own: on the worker's thread, between two steps."""

        def report(answers: list[tuple[int, bytes, str, str]], error: str = "") -> None:
            workers = tuple(CallAnswer(*answer) for answer in sorted(answers))
            self.endpoint.post(lambda: self.endpoint.call_done(effect, workers, error))

        def on_loop() -> None:
            if time.monotonic() < effect.ends:  # otherwise its caller has given up
                arguments = (effect.method, effect.arguments, effect.longest_answer)
                answers = self._engine.collective_rpc("areal_call", args=arguments)
                if effect.method == transfer_steps.FINISH and not any(answer[2] for answer in answers):
                    self._foreign.discarded = ""
                    self._set_version(version_of(effect.arguments))
                report(answers)

        self._call("call", on_loop, failed=lambda error: report([], error))

    def oldest_call_seconds(self) -> float:
        """Return for how long the oldest call waits for the engine's loop."""
        oldest = min(self._calls.copy().values(), default=None)
        return 0.0 if oldest is None else time.monotonic() - oldest

    def request_counts(self) -> tuple[int, int]:
        """Return the running and waiting requests; read from another thread, so a moment old."""
        running, waiting = self._engine.scheduler.get_request_counts()
        return running, waiting

    # On the engine's loop

    def _check_paused(self) -> None:
        if not self.is_paused():
            raise RuntimeError("the engine runs: another user has resumed it, past vLLM's own interfaces")

    def _commit_on_workers(
        self, method: str, arguments: tuple[object, ...], units: Units, versions: Mapping[str, str]
    ) -> list[Any]:
        """Have every worker make units live, and requests use their adapters from here on; ``versions``: the adapters'."""
        numbers = self._adapters.numbers_of(units)
        kept = self._adapters.in_use_after(units, numbers)
        answers: list[Any] = self._engine.collective_rpc(method, args=(*arguments, numbers, kept))
        self._adapters.commit(units, numbers, kept, versions)
        return answers

    def _set_version(self, version: Version) -> None:
        """Let outputs carry this version from here on; vLLM 0.28 to 0.31 have no such call."""
        if set_version := getattr(self._engine, "set_weight_version", None):
            with self._foreign.ours():
                set_version(str(version))

    @property
    def _idle_callbacks(self) -> list[Callable[..., None]]:
        callbacks: list[Callable[..., None]] = getattr(self._engine, "_idle_state_callbacks", [])
        return callbacks

    def _drop_caches(self, *, values: bool, encoders: bool, root: str) -> None:
        """Drop what was computed from old weights: keys and values, encoder outputs, and by ``root`` the way to find any."""
        if values and not drop_keys_and_values(self._engine):
            raise RuntimeError("vLLM did not drop its cached keys and values")
        if encoders:
            # vLLM's ``reset_encoder_cache`` does the same, but warns at each update that has frozen requests.
            self._engine.scheduler.reset_encoder_cache()
            self._engine.model_executor.reset_encoder_cache()
        if root:
            self._prefix_root.move(root)

    def _cancel_pending_pause(self) -> bool:
        """Undo a pause that has not completed; return False if none is pending."""
        if self._idle_callback not in self._idle_callbacks:
            return False
        from vllm.v1.core.sched.interface import PauseState

        self._idle_callbacks.remove(self._idle_callback)
        self._idle_callback = None
        # The same as vLLM's resume, but without its barrier over the DP ranks, which a pending pause forbids.
        self._engine.scheduler.set_pause_state(PauseState.UNPAUSED)
        if hasattr(self._engine, "pending_pause"):
            self._engine.pending_pause = False
            self._engine.ignore_start_dp_wave = False
        return True

    def _call(self, name: str, on_loop: Callable[[], None], failed: Callable[[str], None]) -> None:
        number = next(self._call_ids)
        self._calls[number] = time.monotonic()
        spans = self.endpoint.tracing.spans
        spans.start(number, "engine's loop", "wait for the step to end")

        def run() -> None:
            spans.end(number)
            try:
                with spans.span("engine's loop", name):
                    on_loop()
            except Exception as error:
                logger.exception("a call of the control endpoint failed")
                failed(error_of(error))
            finally:
                self._calls.pop(number, None)

        self._run_on_loop(run)


def error_of(error: BaseException | None) -> str:
    """Return one line that names the error; empty for None."""
    return "" if error is None else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def under_control(engine: EngineCore, run_on_loop: Callable[[Callable[[], None]], object]) -> Iterator[Controller]:
    """Keep ``engine`` under control while the body runs."""
    controller = Controller(engine, run_on_loop)
    reason = "its process ends"
    try:
        yield controller
    except BaseException as error:  # vLLM's loop ends with one where a worker was lost
        reason = f"its process ends ({error_of(error)})"
        raise
    finally:
        controller.stop(reason)
