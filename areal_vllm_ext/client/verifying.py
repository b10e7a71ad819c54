"""``group.verify``: ask every worker for digests of what it serves, and compare them."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING

from .. import protocol
from ..control.command import POLL_SECONDS
from ..errors import EngineUnreachable, RequestError
from ..integrity.checkpoint import contents
from ..integrity.verify import compare

if TYPE_CHECKING:
    import os

    from ..control.command import Commander, Target
    from ..control.link import Link
    from ..integrity.verify import Verification


async def verify(
    commander: Commander,
    checkpoint: str | os.PathLike[str] | None,
    draft: str | os.PathLike[str] | None,
    timeout: float,
) -> Verification:
    """Compare what the engines serve. See ``AsyncEngineGroup.verify``."""
    if draft is not None and checkpoint is None:
        raise ValueError("verify(draft=...) compares beside a checkpoint: give the base model's directory too")
    ends = time.monotonic() + timeout
    expected = await asyncio.to_thread(contents, checkpoint) if checkpoint is not None else None
    drafted = await asyncio.to_thread(contents, draft) if draft is not None else None
    async with commander.command("verify", max(ends - time.monotonic(), 0.1)) as targets:
        answers = await asyncio.gather(
            *(_digests(commander.link, name, target, expected is not None, ends) for name, target in targets.items())
        )
        statuses = {name: target.status for name, target in targets.items()}
        taken = await _taken(commander.link, next(iter(targets.values())), ends) if expected is not None else None
        answered = dict(zip(targets, answers, strict=True))
        return await asyncio.to_thread(compare, answered, statuses, expected, taken, drafted)


async def _taken(link: Link, target: Target, ends: float) -> protocol.Weights | None:
    """Return what the engines' model takes of a checkpoint; None if it is not known."""
    answer = await link.request(target.engine.address, protocol.DescribeWeights(), max(ends - time.monotonic(), 0.1))
    assert isinstance(answer, protocol.Weights)
    return answer if answer.tensors else None


async def _digests(link: Link, name: str, target: Target, with_contents: bool, ends: float) -> protocol.WeightDigests:
    while True:
        left = max(ends - time.monotonic(), 0.1)
        ask = protocol.DigestWeights(request=uuid.uuid4().hex, timeout=left, contents=with_contents)
        try:
            answer = await link.request(target.engine.address, ask, left + 0.2)
        except EngineUnreachable as error:
            raise EngineUnreachable(f"{name}: {error}") from None
        except RequestError as error:
            if error.kind != "busy" or left <= POLL_SECONDS:
                raise RequestError(error.kind, f"{name}: {error}") from None
        else:
            assert isinstance(answer, protocol.WeightDigests)
            return answer
        await asyncio.sleep(POLL_SECONDS)
