"""vLLM's own calls that pause, resume, sleep or reload an engine. Whoever makes them, they pass here.

Front ends, other clients and people reach an engine by vLLM's own interfaces (``/pause``, ``/resume``, ``/sleep``,
``/collective_rpc``, ...). Those calls run on the engine's loop, as ours do. ``ForeignCalls`` replaces these methods on the
engine object. While the participant's guard says so, a call waits or is refused; each one that runs is reported to the
participant. Everything here runs on the engine's loop.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from . import elsewhere
from .effects import Guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..protocol import SleepTag
    from .effects import Effect
    from .participant import Participant

    Report = Callable[[Callable[[Participant], list[Effect]]], None]

# The methods of workers that change weights; ``collective_rpc`` reaches them by name.
_WEIGHT_CALLS = frozenset(
    {
        "finish_weight_update",
        "load_model",
        "reload_weights",
        "reset_weights",
        "start_draft_weight_update",
        "start_weight_update",
        "update_weights",
    }
)


class ForeignCalls:
    """The calls of other users on one engine.

    Attributes:
        paused: a user's own pause stands, whether through this package or through vLLM.
        discarded: why there are no weights since a sleep of level 2, which the guard tells only a moment later; else empty.
    """

    def __init__(self, engine: Any, report: Report, *, can_wait: bool) -> None:
        """Replace the methods of ``engine``.

        Args:
            engine: vLLM's EngineCore.
            report: has the endpoint's thread tell the participant what happened.
            can_wait: a call may return a Future; otherwise one that would have to wait is refused.
        """
        self.paused = False
        self.discarded = ""
        self._engine = engine
        self._report = report
        self._can_wait = can_wait
        self._guard = Guard()
        self._ours = False
        self._waking = False
        self._waiting: collections.deque[tuple[Future[Any], Callable[[], Any]]] = collections.deque()
        for name, replacement in (
            ("pause_scheduler", self._pause),
            ("resume_scheduler", self._resume),
            ("sleep", self._sleep),
            ("wake_up", self._wake_up),
            ("collective_rpc", self._collective_rpc),
            ("set_weight_version", self._set_weight_version),
        ):
            if original := getattr(engine, name, None):  # vLLM 0.28 to 0.31 have no set_weight_version
                setattr(engine, name, self._replace(original, replacement))

    def _replace(self, original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)  # vLLM reads the signature
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if self._ours:
                return original(*args, **kwargs)
            return replacement(original, *args, **kwargs)

        return replaced

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """Let the calls of the body through: they are this package's."""
        before, self._ours = self._ours, True
        try:
            yield
        finally:
            self._ours = before

    def guard(self, guard: Guard) -> None:
        """Set the guard; once no update needs the engine, run the calls that waited, in order."""
        self._guard = guard
        while self._waiting and not self._guard.update:
            future, call = self._waiting.popleft()
            try:
                result = call()
            except Exception as error:
                future.set_exception(error)
            else:
                _pass_on(result, future)

    @property
    def asleep(self) -> frozenset[SleepTag]:
        """What sleep mode took from the device."""
        return frozenset(getattr(self._engine.model_executor, "sleeping_tags", ()))

    def _after_update(self, route: str, call: Callable[[], Any]) -> Any:
        """Run ``call`` now, or when the update that needs the engine has ended. ``route`` names it for people."""
        if not self._guard.update:
            return call()
        if not self._can_wait:
            raise RuntimeError(f"refused: {self._guard.update}; call again when that has ended")
        future: Future[Any] = Future()
        self._waiting.append((future, lambda: self._after_update(route, call)))
        self._report(lambda participant: elsewhere.waits(participant, route))
        return future

    def _pause(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            result = original(*args, **kwargs)
            self.paused = True
            self._report(lambda participant: participant.pauses.paused_elsewhere())
            return result

        return self._after_update("/pause", call)

    def _resume(self, original: Callable[..., Any]) -> Any:
        # On an engine that runs there is nothing to do, and vLLM's barrier over the DP ranks would wait for the others.
        if self._waking:
            if not self._unfit and self._engine.is_scheduler_paused():
                original()
            return None

        def call() -> None:
            if self.asleep:
                raise RuntimeError("not resumed: this engine sleeps (vLLM's sleep mode); wake it up")
            if self._unfit:
                self._report(lambda participant: participant.pauses.resume_refused_elsewhere())
                raise RuntimeError(f"not resumed: {self._unfit}; send an update through areal_vllm_ext")
            if self._engine.is_scheduler_paused():
                original()
                self._resumed()

        return self._after_update("/resume", call)

    @property
    def _unfit(self) -> str:
        return self._guard.weights or self.discarded

    def slept(self, level: int) -> None:
        """Note a sleep: at level 2 vLLM discards the weights."""
        if level > 1:
            self.discarded = "vLLM's sleep level 2 discarded its weights"

    def _resumed(self) -> None:
        self.paused = False
        self._report(elsewhere.resumed)

    def _sleep(self, original: Callable[..., Any], level: int = 1, mode: str = "abort") -> Any:
        def call() -> Any:
            ran = not self._engine.is_scheduler_paused()

            def asleep(_: object = None) -> None:
                if tags := self.asleep:
                    self._report(lambda participant: elsewhere.slept(participant, tags, level, ran=ran))

            with self.ours():
                result = original(level, mode)
            self.paused = True
            self.slept(level)
            self._report(lambda participant: participant.pauses.paused_elsewhere())
            if isinstance(result, Future):
                result.add_done_callback(asleep)
            else:
                asleep()
            return result

        return self._after_update("/sleep", call)

    def _wake_up(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            self._waking = True
            try:
                awake = original(*args, **kwargs)
            finally:
                self._waking = False
                asleep = self.asleep
                self._report(lambda participant: elsewhere.woke(participant, asleep))
            if awake is not False:  # vLLM 0.28 to 0.31 return nothing
                self._resumed()
            return awake

        return self._after_update("/wake_up", call)

    def _collective_rpc(self, original: Callable[..., Any], method: Any, *args: Any, **kwargs: Any) -> Any:
        if method not in _WEIGHT_CALLS:
            return original(method, *args, **kwargs)
        call = functools.partial(original, method, *args, **kwargs)
        return self._after_update(f"/collective_rpc {method}", lambda: self._change_weights(method, call))

    def _set_weight_version(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(original, *args, **kwargs)
        return self._after_update("/update_weight_version", lambda: self._change_weights("update_weight_version", call))

    def _change_weights(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        finally:
            self._report(lambda participant: elsewhere.weights_changed(participant, name))


def _pass_on(result: Any, future: Future[Any]) -> None:
    """Give ``future`` the result, also where that is a Future itself."""
    if not isinstance(result, Future):
        future.set_result(result)
        return

    def done(inner: Future[Any]) -> None:
        if error := inner.exception():
            future.set_exception(error)
        else:
            future.set_result(inner.result())

    result.add_done_callback(done)
