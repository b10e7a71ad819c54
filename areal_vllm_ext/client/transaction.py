"""``Transaction``: one update, from the lease to its result. ``AsyncUpdate`` and ``Update`` are its faces."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from .. import protocol
from ..errors import ArealError, InvalidWeights, UpdateAborted, UpdateInDoubt, WeightsTainted, join
from ..observability import trace
from ..observability.spans import SpanRecorder
from ..process.collector import no_collection
from ..process.switch_interval import ShortSwitchInterval
from ..protocol import Version
from ..transport.base import Cancelled
from .context import UpdateContext
from .delivery import Delivery, Sharing
from .drafts import DraftPart, DraftSource, say_kept
from .driver import Driver
from .lora import AdapterChanges, AdapterSource, checked_name, copied
from .modules import Named, gathered
from .paths import checkpoint_path
from .sleeping import wake_weights
from .state import UpdateResult
from .walk import drained_on_error, walk
from .weights import Checker, WeightSource, checked_cast

if TYPE_CHECKING:
    import torch

    from ..control.command import Commander, Target
    from .coordinator import Coordinator
    from .driver import Fate
    from .options import Options
    from .sinks import Sinks

logger = logging.getLogger("vllm.areal_vllm_ext")

CANNOT_PICKLE = (
    "an update cannot be pickled, because it belongs to the connections of this process: begin it in the process that sends "
    "the weights; its result can be pickled"
)

# A thread that sends for a cancelled update notices that within milliseconds, unless the user's iterator keeps it.
_STOP_SECONDS = 0.5
# Time to collect the engines' part of a trace; the shorter one applies after the deadline.
_TRACE_SECONDS, _LATE_TRACE_SECONDS = 2.0, 0.15


class Transaction:
    """One update of a group.

    Attributes:
        version: names the new weights.
        options: as the user gave them.
        sharing: zero-copy sharing of this process' tensors.
        adapters: what the update does to the engines' adapters.
        draft: what it does to their drafter.
        context: what all parts of the update use; set by ``start``.
        driver, delivery: set by ``open``.
    """

    context: UpdateContext
    driver: Driver
    delivery: Delivery

    def __init__(self, commander: Commander, sinks: Sinks, version: Version, options: Options) -> None:
        self.version = version
        self.options = options
        self.sharing = Sharing()
        self.adapters = AdapterChanges()
        self._weights_given = False
        self.draft = DraftPart()
        self._commander = commander
        self._sinks = sinks
        self._lease = contextlib.AsyncExitStack()
        self._interval = ShortSwitchInterval()
        self._targets: dict[str, Target] = {}
        self._result: UpdateResult | None = None
        self._state: Literal["new", "open", "closed"] = "new"

    @property
    def result(self) -> UpdateResult:
        """What the update took; set when its block has been left."""
        if self._result is None:
            raise ArealError("the update has no result yet: it is set when the update's block has been left")
        return self._result

    def start(self, loop: asyncio.AbstractEventLoop) -> UpdateContext:
        """Start the time of the update, which runs on ``loop``.

        Raises:
            ArealError: the update was started before.
        """
        if self._state != "new":
            raise ArealError("this update's block was entered before: call group.update(...) for each update")
        self._state = "open"
        now = time.monotonic()
        spans = SpanRecorder(trace.MAX_SPANS_PER_KIND if self.options.trace else 0)
        self.context = UpdateContext(
            version=self.version,
            options=self.options,
            link=self._commander.link,
            loop=loop,
            sinks=self._sinks,
            started=now,
            ends=now + self.options.timeout,
            spans=spans,
        )
        return self.context

    async def open(self) -> None:
        """Take the lease, fence every engine and wake weights that sleep. ``start`` has been called."""
        context = self.context
        context.spans.set_state("update", "lease")
        # The event loop needs the interpreter while another thread handles tensor after tensor.
        self._lease.enter_context(self._interval)
        try:
            command = self._commander.command(
                f"update to version {self.version}", context.left, without_lost=self.options.drop_lost
            )
            self._targets = await self._lease.enter_async_context(command)
            await wake_weights(self._commander, self._targets, context.ends)
        except BaseException:
            self._state = "closed"
            await self._lease.aclose()
            raise
        self.driver = Driver(context, self._targets, self._commander)
        self._sinks.begin(context)
        self.delivery = Delivery(context, self._targets, self.driver, self.sharing)
        context.spans.set_state("update", "")

    def send(
        self,
        weights: WeightSource | str | os.PathLike[str],
        dtype: str | torch.dtype | None = None,
        draft: DraftSource | None = None,
    ) -> None:
        """Bring the weights to every engine's staging. See ``AsyncUpdate.send``. Not from the event loop's thread."""
        self.check_open()
        weights = walk(weights, self.options.timeout)
        with drained_on_error(weights):
            self.deliver(weights, dtype, draft=draft)

    def deliver(
        self,
        weights: WeightSource | str | os.PathLike[str],
        dtype: str | torch.dtype | None,
        gather: Callable[[Iterable[Named]], Iterator[Named]] = gathered,
        draft: DraftSource | None = None,
    ) -> None:
        """Send ``weights``, whose tensors ``gather`` makes full, and ``draft``."""
        if self._weights_given:
            raise ArealError("update.send(...) was called twice: an update sends once; begin another update")
        self._weights_given = True
        delivery, cast = self.delivery, checked_cast(dtype)
        if draft is not None or self._drafter:
            self.draft = DraftPart(cast, draft)
            delivery.draft_bytes = self.draft.fit(delivery.taken(), delivery.dtype, self._drafter)
        if isinstance(weights, (str, os.PathLike)):
            if self.options.partial:
                raise InvalidWeights("partial=True needs tensors, not a path: give what was trained as a state dict")
            path = checkpoint_path(weights)
            delivery.send_path(path, beside=draft is not None or bool(self.adapters.sent or self._differing))
            self.draft.look_into(path)
            self._send_draft()
            return
        taken = delivery.taken()
        partial = self.options.partial
        checker = Checker(taken, delivery.dtype, cast)
        self.draft.watch(checker, weights)
        with no_collection():
            pairs = checker.check_source(weights, gather, partial=partial)
        self.sharing.allow(weights, self.options.staging)
        with self.errors_of_sending():
            delivery.send(pairs, taken.required)
            if partial:
                delivery.keep_rest(taken)
        self._send_draft()

    def _send_draft(self) -> None:
        """Send the drafter's tensors, if this update brings them; they come after the base model's."""
        self.delivery.complete = False
        with self.errors_of_sending():
            if (pairs := self.draft.pairs()) is not None:
                self.delivery.send_draft(pairs)
        self.delivery.complete = True

    @property
    def _drafter(self) -> str:
        """How the engines draft with a model; empty if they do not."""
        return next((one.engine.drafter for one in self._targets.values() if one.engine.drafter), "")

    def add_adapter(
        self,
        name: str,
        source: AdapterSource,
        gather: Callable[[Iterable[Named]], Iterator[Named]] = gathered,
    ) -> None:
        """Copy an adapter into host memory; it is sent when the block is left. See ``AsyncUpdate.send_adapter``."""
        self._check_changeable("send_adapter")
        self.adapters.add(name, copied(name, source, gather))

    def remove_adapter(self, name: str) -> None:
        """Note that the engines are to serve an adapter no longer. See ``AsyncUpdate.remove_adapter``."""
        self._check_changeable("remove_adapter")
        self.adapters.remove(checked_name(name))

    def _check_changeable(self, method: str) -> None:
        """Raise ArealError outside of the update's block, and after its votes."""
        self.check_open(method)
        driver = getattr(self, "driver", None)  # rank 0 has one
        if driver and driver.coordinator and driver.coordinator.phase not in ("begin", "send"):
            raise ArealError(f"update.{method}(...) was called after update.prepare(): call it before")

    def check_open(self, method: str = "send") -> None:
        """Raise ArealError outside of the update's block."""
        if self._state != "open":
            when = "before" if self._state == "new" else "after"
            raise ArealError(
                f"update.{method}(...) was called {when} the update's block: write "
                f"`with group.update(version) as update: update.{method}(...)`"
            )

    @contextlib.contextmanager
    def errors_of_sending(self) -> Iterator[None]:
        """Turn what stops the body, which sends, into an error of this update."""
        try:
            yield
        except (InvalidWeights, UpdateAborted):
            raise
        except (Cancelled, TimeoutError, concurrent.futures.TimeoutError, RuntimeError) as error:
            raise UpdateAborted(self.context.given_up(str(error) or type(error).__name__)) from error

    async def prepare(self) -> None:
        """Ask for the votes, and hold the update when every engine has voted yes. See ``AsyncUpdate.prepare``."""
        self.check_open()
        await self._send_adapters()
        coordinator = self.driver.coordinator
        if coordinator is None or coordinator.phase != "send":
            raise ArealError(
                "update.prepare() was called before update.send(...), or twice: send first, then prepare once"
            )
        await self._vote(coordinator, hold=True)
        self.driver.raise_if_given_up()

    async def close(self, error: BaseException | None, sending: asyncio.Future[None] | None = None) -> None:
        """End the update: commit what was sent, or give it up because of ``error``.

        Args:
            error: raised in the update's block.
            sending: done when the thread that sends has ended.

        Raises:
            InvalidWeights: nothing was sent.
            UpdateAborted: every engine keeps its old weights.
            WeightsTainted: no engine committed, and the commit of some failed half-way.
            UpdateInDoubt: no engine is known to have committed, and some did not answer.
        """
        self._state = "closed"
        problem: BaseException | None = None
        if error is None:
            try:
                await self._send_adapters()
            except BaseException as failure:
                problem = failure
        self.context.closed.set()
        try:
            await self.driver.stop_beginning()
            coordinator = self.driver.coordinator
            if coordinator is not None:
                await self._end(coordinator, error or problem)
            if problem is not None:
                raise problem
            if coordinator is not None and error is None:
                self._result = await self._conclude(coordinator)
            elif error is None:
                raise InvalidWeights("the update sent nothing: call update.send(...) inside its block")
        finally:
            if sending and not sending.done():
                await asyncio.wait([sending], timeout=_STOP_SECONDS)
            self.sharing.revoke()
            self._remember()
            self._sinks.end(self.context)
            await self._lease.aclose()
            if self.options.trace:
                await self._write_trace(self.options.trace)

    def abandon(self) -> None:
        """Let go of what this process holds, where ``close`` cannot run: the group was closed within the block."""
        self._interval.end()
        self.sharing.revoke()

    async def _send_adapters(self) -> None:
        """Send the adapters of the update, and those that engines lack which came back without them. Once."""
        changes, delivery, coordinator = self.adapters, self.delivery, self.driver.coordinator
        incomplete = self._weights_given and not delivery.complete
        if incomplete or (coordinator is None and not changes) or (coordinator and coordinator.phase != "send"):
            return
        try:
            changes.bring_to(self._differing, self._sinks.adapters)
        except InvalidWeights as error:
            raise UpdateAborted(self.context.given_up(str(error))) from None
        adapters = [one for one in changes.sent.values() if not one.is_relayed]

        def send() -> None:
            with self.errors_of_sending():
                if coordinator is None:
                    delivery.begin_without_weights(adapters)
                for adapter in adapters:
                    delivery.send_adapter(adapter)

        if adapters or coordinator is None:
            await asyncio.to_thread(send)

    @property
    def _differing(self) -> dict[str, str | None]:
        """The adapters in which engines differ, with the manifest that the newest engines have."""
        statuses = sorted((one.status for one in self._targets.values()), key=lambda status: status.committed_epoch)
        held = [{name: one.manifest for name, one in status.adapters.items()} for status in statuses]
        names = {name for one in held for name in one}
        return {name: held[-1].get(name) for name in sorted(names) if len({one.get(name) for one in held}) > 1}

    async def _end(self, coordinator: Coordinator, error: BaseException | None) -> None:
        """Commit, or give up, at every engine."""
        run = self.driver.run
        if coordinator.phase in ("begin", "send", "prepared") and error is not None:
            await run(coordinator.give_up(f"{type(error).__name__}: {error}"))
        elif coordinator.phase == "send":
            await self._vote(coordinator)
        elif coordinator.phase == "prepared" and (changed := self.sharing.changed()):
            await run(coordinator.give_up(changed))
        elif coordinator.phase == "prepared":
            await run(coordinator.commit(self.context.left))

    async def _vote(self, coordinator: Coordinator, *, hold: bool = False) -> None:
        """Ask for the votes; commit if all are yes, unless ``hold``."""
        delivery, run = self.delivery, self.driver.run
        if self._weights_given and not delivery.complete:
            await run(coordinator.give_up("update.send(...) did not bring all weights, and its error was not raised"))
        elif changed := self.sharing.changed():
            await run(coordinator.give_up(changed))
        else:
            # From disk, or from a trainer's own process group, there is no manifest: then the engines' votes are only
            # compared with each other.
            base = coordinator.base if delivery.unchanged else ""
            units = self.adapters.units(weights=delivery.complete, draft=self.draft.outcome == "sent")
            relayed = any(one.is_relayed for one in self.adapters.sent.values())
            manifest = "" if relayed else delivery.units_manifest(units)
            kept = () if base else delivery.kept
            await run(coordinator.sent(delivery.buckets, manifest, base, kept, units, hold=hold))

    async def _conclude(self, coordinator: Coordinator) -> UpdateResult:
        """Find out what became of the update at every engine."""
        if not coordinator.commit_sent:
            self.driver.raise_if_given_up()
        fates = await self.driver.ask_lost()
        if not coordinator.committed:
            raise self._not_committed(coordinator, fates)
        self._commander.drop(
            # An engine that committed and did not resume may be running by now, so the group does not go on without it.
            self._targets[name].engine
            for name in coordinator.lost
            if name not in coordinator.committed
        )
        finished = time.monotonic()
        return UpdateResult(
            version=self.version,
            engines=tuple(coordinator.committed),
            lost=dict(coordinator.lost),
            nbytes=self.delivery.nbytes,
            kept=self.delivery.unchanged,
            total_ms=(finished - self.context.started) * 1e3,
            pause_ms=(finished - self.driver.pause_started) * 1e3,
            commit_ms=self.driver.commit_seconds * 1e3,
            adapters=self._adapters_after(),
            draft=self._draft_after(),
        )

    def _draft_after(self) -> Literal["sent", "kept", ""]:
        """Return what became of the drafter. That it is kept is logged once."""
        if not self._drafter or not self._weights_given or self.draft.outcome == "sent":
            return self.draft.outcome
        if not self._sinks.said_kept:
            self._sinks.said_kept = True
            say_kept(self._drafter, {target.status.draft_version for target in self._targets.values()})
        return "kept"

    def _adapters_after(self) -> dict[str, Version]:
        """Return the adapters that the engines serve after this update, with the version that brought each."""
        status = max((one.status for one in self._targets.values()), key=lambda status: status.committed_epoch)
        before = {name: one.version for name, one in status.adapters.items() if name not in self.adapters.removed}
        return before | dict.fromkeys(self.adapters.sent, self.version)

    def _not_committed(self, coordinator: Coordinator, fates: dict[str, Fate]) -> ArealError:
        """Return the error of an update that was to commit, and that no engine is known to have committed."""
        causes = join(coordinator.lost)
        tainted = sorted(name for name, fate in fates.items() if fate == "tainted")
        if set(fates) < set(self._targets):
            failed = f"; tainted and paused: {', '.join(tainted)}" if tainted else ""
            return UpdateInDoubt(
                f"every engine was told to commit version {self.version}, and it is unknown whether one has: {causes}{failed}; "
                "all other engines commit, or none: the directory resolves this, and status() shows it"
            )
        if tainted:
            others = "" if len(tainted) == len(fates) else "; all other engines serve their old weights"
            return WeightsTainted(
                f"version {self.version} failed while it was committed: {causes}; "
                f"paused with a partially loaded set of weights: {', '.join(tainted)}{others}; send another update"
            )
        return UpdateAborted(self.context.given_up(causes))

    def _remember(self) -> None:
        """Keep what the next update can use; after a failure, nothing."""
        if self._result is None:
            self._sinks.sent, self._sinks.sent_manifest = {}, ""
            self._sinks.drop(self.context)
            return
        if self.delivery.complete:
            self._sinks.sent = self.delivery.contents
            self._sinks.sent_manifest = self.delivery.manifest
        known = self._sinks.adapters | self.adapters.sent
        self._sinks.adapters = {
            name: one for name, one in known.items() if name not in self.adapters.removed and not one.is_relayed
        }

    async def _write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the trace. What is missing is logged; it never fails the update."""
        context = self.context
        engines: dict[str, list[protocol.Span]] = {}
        problems: list[str] = []
        about = {"version": str(self.version), "committed": self._result is not None}
        try:
            if coordinator := self.driver.coordinator:
                about |= {"update": coordinator.update, "given_up": coordinator.reason, "lost": coordinator.lost}
                timeout = min(_TRACE_SECONDS, max(context.left, _LATE_TRACE_SECONDS))
                infos = {name: target.engine for name, target in self._targets.items()}
                engines, problems = await trace.collect(context.link.request, infos, coordinator.update, timeout)
            spans = context.spans.snapshot()
            await asyncio.to_thread(trace.write, path, spans, engines, context.started, about)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
        if problems:
            logger.warning("the trace %s of version %s is incomplete: %s", path, self.version, "; ".join(problems))
