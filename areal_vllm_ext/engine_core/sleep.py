"""What of an engine is on its device: vLLM's sleep mode, the third axis beside generation and update. No I/O, no clock.

    AWAKE ──Sleep──▶ ASLEEP (1: weights kept aside, 2: discarded) ──WakeUp weights──▶ WEIGHTS ONLY ──WakeUp kv_cache──▶ AWAKE

The participant decides whether a step is allowed, because that depends on generation and update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..protocol import Ack, Answer, Error
from .effects import CallSleep, CallWakeUp, Effect, Reply

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..protocol import Sleep, SleepLevel, SleepState, SleepTag, WakeUp
    from ..protocol.server import ReplyTo

ALL: frozenset[SleepTag] = frozenset(("weights", "kv_cache"))


class SleepMachine:
    """What one engine has on its device.

    Attributes:
        level: of the last sleep; 0 before the first.
        free_memory: bytes that were free on the device after the last step; None if that is not known.
        problem: why a worker may not have fallen asleep with the others; empty if all have, or all are awake.
    """

    def __init__(self) -> None:
        self.level = 0
        self.free_memory: int | None = None
        self.problem = ""
        self._asleep: frozenset[SleepTag] = frozenset()
        self._doing: CallSleep | CallWakeUp | None = None
        self._call = 0
        self._waiting: dict[ReplyTo, float] = {}  # and until when each waits

    @property
    def state(self) -> SleepState:
        """What is on the device, as far as it is certain."""
        if not self._asleep:
            return "awake"
        if "weights" not in self._asleep:
            return "weights_only"
        return "asleep_1" if self.level == 1 else "asleep_2"

    @property
    def is_awake(self) -> bool:
        """Whether all is on the device and stays there."""
        return not self._asleep and self._doing is None

    @property
    def reason(self) -> str:
        """Why the weights must not be read or written; empty if they may."""
        if "weights" in self._asleep:
            return (
                f"this engine sleeps (vLLM's sleep mode, level {self.level}), so its weights are not in memory: call "
                'group.wake_up(tags=["weights"]) or POST /wake_up, and send the update again'
            )
        return "" if self._doing is None else "this engine is falling asleep or waking up: try again"

    def sleep(self, caller: ReplyTo, message: Sleep, now: float) -> list[Effect]:
        """Fall asleep; ``caller`` is answered when the memory has been given back."""
        if isinstance(self._doing, CallSleep) and self._doing.level == message.level:
            self._waiting[caller] = now + message.timeout
            return []
        if self._doing is not None:
            return [Reply(caller, Error(kind="busy", message=self.reason))]
        if "weights" in self._asleep:
            return [Reply(caller, self._asleep_already(message.level))]
        return self._do(caller, CallSleep(self._call + 1, message.level, now + message.timeout))

    def wake_up(self, caller: ReplyTo, message: WakeUp, now: float) -> list[Effect]:
        """Wake up; ``caller`` is answered when the memory is there again."""
        wanted = self._asleep & (frozenset(message.tags) or ALL)
        if isinstance(self._doing, CallWakeUp) and frozenset(self._doing.tags) == wanted:
            self._waiting[caller] = now + message.timeout
            return []
        if self._doing is not None:
            return [Reply(caller, Error(kind="busy", message=self.reason))]
        if not wanted:
            return [Reply(caller, Ack())]
        if "weights" in self._asleep - wanted:
            return [Reply(caller, Error(kind="state", message="wake the weights up before the KV cache"))]
        return self._do(caller, CallWakeUp(self._call + 1, tuple(sorted(wanted, reverse=True)), now + message.timeout))

    def done(
        self, call: int, error: str, free_memory: int | None, *, touched: bool
    ) -> tuple[SleepLevel | None, list[Effect]]:
        """Take the outcome of a call.

        Args:
            call: its number.
            error: why it failed; empty if it did not.
            free_memory: bytes that are free on the device now; None if that is not known.
            touched: whether any worker may have begun.

        Returns:
            the level of a sleep that took the weights, or may have; the answers to those who waited.
        """
        if (doing := self._doing) is None or doing.call != call:
            return None, []
        self._doing, slept = None, None
        if isinstance(doing, CallSleep) and touched:
            # Also where a worker failed: another may have given its memory back. Waking up is right in both cases.
            self.level, self._asleep, slept, self.problem = doing.level, ALL, doing.level, error
        elif isinstance(doing, CallWakeUp) and not error:
            self._asleep -= frozenset(doing.tags)
            self.problem = ""
        self.free_memory = free_memory if touched else self.free_memory
        return slept, self._answer(Error(kind="failed", message=error) if error else Ack())

    def tick(self, now: float) -> list[Effect]:
        """Answer those whose time is over. The call goes on, because vLLM cannot cancel it; the state says what came of it."""
        late = [caller for caller, ends in self._waiting.items() if now >= ends]
        for caller in late:
            del self._waiting[caller]
        what = "fall asleep" if isinstance(self._doing, CallSleep) else "wake up"
        error = Error(kind="timeout", message=f"the engine did not {what} in time; it may do so later")
        return [Reply(caller, error) for caller in late]

    # Calls of other users, through vLLM's own interfaces

    def moved_elsewhere(self, asleep: Iterable[SleepTag], level: int = 0) -> None:
        """Another user has put the engine to sleep or woken it up; ``asleep``: what is not on the device now."""
        self._asleep = frozenset(asleep)
        self.problem = ""
        self.level = level or self.level
        self.free_memory = None

    def _do(self, caller: ReplyTo, call: CallSleep | CallWakeUp) -> list[Effect]:
        self._doing, self._call = call, call.call
        self._waiting = {caller: call.ends}
        return [call]

    def _asleep_already(self, level: int) -> Answer:
        if self.problem:
            problem = f"not every worker of this engine fell asleep ({self.problem}): wake it up before it sleeps again"
        elif self.level != level:
            problem = f"this engine sleeps at level {self.level}: wake it up before it sleeps at level {level}"
        else:
            return Ack()
        return Error(kind="state", message=problem)

    def _answer(self, answer: Answer) -> list[Effect]:
        callers, self._waiting = self._waiting, {}
        return [Reply(caller, answer) for caller in callers]
