"""The checker of histories accepts what one register could do, and finds every history that none could."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from chaos.history import Read, Write, problems
from chaos.simulation.account import Account, Served

START = Write("v0", -math.inf, -math.inf, "committed")


def write(version: object, started: float, ended: float = math.inf, outcome: str = "committed") -> Write:
    return Write(version, started, ended, outcome)  # type: ignore[arg-type]


def read(version: object, started: float, ended: float | None = None, engine: str = "e0", proven: object = "") -> Read:
    return Read(engine, version, version if proven == "" else proven, started, started if ended is None else ended)


RIGHT = {
    "nothing happens": ([], [read("v0", 1), read("v0", 5)]),
    "an update": ([write("v1", 1, 2)], [read("v0", 0.5), read("v1", 3)]),
    "both versions while the update runs, old before new": ([write("v1", 1, 5)], [read("v0", 2), read("v1", 3)]),
    "overlapping reads of both": ([write("v1", 1, 5)], [read("v1", 2, 4), read("v0", 1, 3, "e1")]),
    "an aborted update": ([write("v1", 1, 2, "aborted")], [read("v0", 3)]),
    "an unknown update that did not happen": ([write("v1", 1, outcome="unknown")], [read("v0", 9)]),
    "an unknown update that happened much later": (
        [write("v1", 1, 2, "unknown")],
        [read("v0", 5), read("v1", 7), read("v1", 9)],
    ),
    "two updates at once, in either order": ([write("v1", 1, 5), write("v2", 1, 5)], [read("v2", 2), read("v1", 6)]),
    "a request in flight over the commit, by its spans": (
        [write("v1", 1, 5)],
        [read("v0", 0, 3), read("v1", 3, 9), read("v0", 2, 3.5, "e1"), read("v1", 3.5, 4, "e1")],
    ),
    "an update that no request saw": ([write("v1", 1, 2), write("v2", 3, 4)], [read("v0", 0), read("v2", 5)]),
}

WRONG = {
    "old weights after the update returned": ([write("v1", 1, 2)], [read("v0", 3)], "was current"),
    "old weights after another engine served the new ones": (
        [write("v1", 1, 9)],
        [read("v1", 3, engine="e0"), read("v0", 4, engine="e1")],
        "was current",
    ),
    "new, old, new": ([write("v1", 1, 9)], [read("v1", 3), read("v0", 4), read("v1", 5)], "was current"),
    "two versions at once for a while": (
        [write("v1", 1, 2)],
        [read("v0", 3, engine="e1"), read("v1", 2.5, engine="e0"), read("v0", 8, engine="e1"), read("v1", 9)],
        "was current",
    ),
    "a request in flight goes back to the old version": (
        [write("v1", 1, 9)],
        [read("v0", 0, 2), read("v1", 2, 3), read("v0", 3.1, 4)],
        "was current",
    ),
    "a request in flight on another engine ends late with the old version": (
        [write("v1", 1, 2)],
        [read("v0", 0, 3, "e1"), read("v0", 2.5, 3, "e1")],
        "was current",
    ),
    "an aborted update is served": ([write("v1", 1, 2, "aborted")], [read("v1", 3)], "that update was aborted"),
    "served before its update began": ([write("v1", 5, 6)], [read("v1", 3)], "before its update began"),
    "a version that no update brought": ([], [read("v7", 3)], "which no update brought"),
    "tokens of another version": ([write("v1", 1, 2)], [read("v1", 3, proven="v0")], "the tokens are of v0"),
    "tokens of no version": ([write("v1", 1, 2)], [read("v1", 3, proven=None)], "the tokens are of no version"),
    "an unknown update that happened, and was undone": (
        [write("v1", 1, outcome="unknown")],
        [read("v1", 3), read("v0", 4)],
        "was current",
    ),
    "a committed update is lost": ([write("v1", 1, 2), write("v2", 3, 4)], [read("v1", 5)], "was current"),
    "two updates at once, in both orders": (
        [write("v1", 1, 9), write("v2", 1, 9)],
        [read("v1", 2), read("v2", 3), read("v1", 4)],
        "was current",
    ),
    "startup weights of an engine that restarted": (
        [write("v1", 1, 2)],
        [read("v1", 3, engine="e0"), read("v0", 4, engine="e1"), read("v1", 5, engine="e0")],
        "was current",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_history_of_one_register_is_accepted(name: str) -> None:
    writes, reads = RIGHT[name]
    assert problems([START, *writes], reads) == []


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_history_is_found(name: str) -> None:
    writes, reads, problem = WRONG[name]
    found = problems([START, *writes], reads)
    assert found
    assert problem in found[0]


def test_a_version_that_was_written_twice_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="same version"):
        problems([START, write("v1", 1, 2), write("v1", 3, 4)], [])


def linearizable(writes: list[Write], reads: list[Read]) -> bool:
    """Decide by trying every order, as the definition says."""
    operations: list[Write | Read] = [START, *writes, *reads]
    ends = [math.inf if isinstance(one, Write) and one.outcome == "unknown" else one.ended for one in operations]

    def place(left: frozenset[int], current: object) -> bool:
        if all(isinstance(operations[i], Write) and operations[i].outcome == "unknown" for i in left):  # type: ignore[union-attr]
            return True
        for i in left:
            one = operations[i]
            if any(ends[j] < one.started for j in left):
                continue
            if isinstance(one, Read) and one.version != current:
                continue
            if place(left - {i}, one.version):
                return True
        return False

    return place(frozenset(range(len(operations))), None)


def test_the_verdict_is_that_of_trying_every_order() -> None:
    dice = random.Random(7)
    verdicts = []
    for _ in range(3000):
        moments = [float(moment) for moment in dice.sample(range(40), 16)]
        pairs = [tuple(sorted(moments[i : i + 2])) for i in range(0, 16, 2)]
        writes = [
            write(version, *pair, dice.choice(["committed", "committed", "unknown"]))
            for version, pair in zip(("v1", "v2"), pairs, strict=False)
        ]
        reads = [read(dice.choice(["v0", "v1", "v2"]), *pair) for pair in pairs[2 : dice.randint(4, 7)]]
        verdicts.append(linearizable(writes, reads))
        assert (problems([START, *writes], reads) == []) == verdicts[-1], (writes, reads)
    assert 300 < sum(verdicts) < 2700
    assert len(list(itertools.groupby(verdicts))) > 100


def test_what_engines_serve_is_judged_more_strictly_than_any_requests_in_flight() -> None:
    """The simulation reads at the first and last moment of each stretch. Requests, with a span in each, prove no more."""
    dice = random.Random(11)
    strict = found_by_requests = 0
    for _ in range(1500):
        account, reads = Account(), []
        writes = [
            write(f"v{n}", *sorted(dice.sample(range(20), 2)), dice.choice(["committed", "unknown"])) for n in (1, 2)
        ]
        for rank in range(2):
            moments = sorted(dice.sample(range(1, 40), 6))
            versions = (
                sorted(dice.choices(["v0", "v1", "v2"], k=3))
                if dice.random() < 0.8
                else dice.choices(["v0", "v1"], k=3)
            )
            stretches = list(zip(moments[::2], moments[1::2], versions, strict=True))
            for started, ended, version in stretches:
                account.serves(rank, Served(f"e{rank}", version, version), started)
                account.serves(rank, None, ended)
            for _ in range(3):  # each request is in flight from one moment to another, and has a span in each stretch
                begun, answered = sorted(dice.uniform(0, 40) for _ in range(2))
                reads += [
                    read(version, max(started, begun), min(ended, answered), f"e{rank}")
                    for started, ended, version in stretches
                    if started < answered and begun < ended
                ]
        by_stretches, by_requests = account.problems(writes, 40.0), problems([START, *writes], reads)
        strict += bool(by_stretches)
        found_by_requests += bool(by_requests)
        assert by_stretches or not by_requests, (writes, reads)
    assert strict > found_by_requests > 100
