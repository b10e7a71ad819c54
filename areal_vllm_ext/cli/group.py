"""Commands for the engines of a group: status, pause, resume, wake-up, update, verify, call, forget."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING

from .options import STATUS_CODE, VERIFY_CODE, add_key_file, count, seconds
from .output import print_report, print_table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from ..client.blocking import EngineGroup
    from ..client.state import EngineState
    from ..protocol import Version
    from .options import Commands

_STATUS_SECONDS = 5.0
_READY_SECONDS = 600.0


def add_to(commands: Commands) -> None:
    """Add the commands to ``areal-vllm``."""
    parser = commands.add(
        "status",
        _status,
        "Show every engine: version, generation, update phase, requests",
        "Engines that do not answer are listed as unreachable, engines that are lost as not heard.",
        code_3=STATUS_CODE,
    )
    parser.add_argument("--engines", metavar="N", type=count, help="first wait until N engines are ready")
    _add_connection(parser, f"{_STATUS_SECONDS:g}, or {_READY_SECONDS:g} with --engines", None)

    parser = commands.add(
        "pause",
        _pause,
        "Pause generation on every engine",
        "This pause has no lease: the engines stay paused until 'areal-vllm resume' or another client\n"
        "resumes them, also through updates. If an engine does not pause in time, the others resume.",
    )
    parser.add_argument(
        "--mode",
        choices=("keep", "wait", "abort"),
        default="keep",
        help="keep: freeze running requests; wait: let them finish; abort: end them (default: %(default)s)",
    )
    _add_connection(parser, "%(default)g", 60.0)

    parser = commands.add("resume", _resume, "Let every engine generate again")
    _add_connection(parser, "%(default)g", 60.0)

    parser = commands.add(
        "wake-up",
        _wake_up,
        "Bring weights and KV cache of every engine back to its device",
        "For engines that sleep and whose trainer is gone. Engines that ran before their sleep run again.",
    )
    _add_connection(parser, "%(default)g", 60.0)

    parser = commands.add(
        "update",
        _update,
        "Move every engine to the weights in a directory",
        "All engines move to the new version, or none does. The directory must have the same path on every node.",
    )
    parser.add_argument(
        "--from", dest="source", metavar="DIR", required=True, help="a Hugging Face checkpoint (safetensors)"
    )
    parser.add_argument(
        "--draft", metavar="DIR", help="the checkpoint of the engines' drafter, which this host can read"
    )
    parser.add_argument(
        "--to-version",
        metavar="VERSION",
        type=_version,
        required=True,
        help="name of the new version; digits alone are a number, as trainers count steps",
    )
    _add_connection(parser, "%(default)g", 300.0)

    parser = commands.add(
        "verify",
        _verify,
        "Compare the weights that engines serve with each other, and with a directory",
        code_3=VERIFY_CODE,
    )
    parser.add_argument("--against", metavar="DIR", help="a Hugging Face checkpoint that the engines should serve")
    parser.add_argument("--draft", metavar="DIR", help="beside it, the checkpoint that their drafter should serve")
    _add_connection(parser, "%(default)g", 300.0)

    parser = commands.add(
        "call",
        _call,
        "Call a method of your own worker extension on every worker",
        "The method is a public one of a subclass of WorkerExtension. Arguments are JSON; what is no JSON is text.",
    )
    parser.add_argument("method", metavar="METHOD", help="the method's name")
    parser.add_argument("arguments", metavar="ARGUMENT", nargs="*", type=_json_or_text, help="passed to it, in order")
    _add_connection(parser, "%(default)g", 60.0)

    parser = commands.add(
        "forget",
        _forget,
        "Give up lost engines for good, so that commands go on without them",
        "Every command asks for all engines, and names the lost ones. An engine that is alive is not forgotten.\n"
        "A forgotten engine that comes back is a member again once an update has reached it.",
    )
    parser.add_argument("replica", metavar="REPLICA", help="the replica's name, as status shows it")
    parser.add_argument("dp_rank", metavar="DP_RANK", type=int, nargs="?", help="default: all ranks of the replica")
    _add_connection(parser, "%(default)g", 5.0)


def _add_connection(parser: argparse.ArgumentParser, default: str, timeout: float | None) -> None:
    parser.add_argument(
        "--connect",
        metavar="ADDRESS",
        default="",
        help="tcp://host:port of the directory (default: AREAL_VLLM_DIRECTORY, or port 29700 of this machine)",
    )
    add_key_file(parser)
    parser.add_argument("--json", action="store_true", help="print JSON for programs, on one line")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=timeout,
        help=f"time for the whole command (default: {default})",
    )


def _version(text: str) -> Version:
    return int(text) if text.isascii() and text.isdecimal() and str(int(text)) == text else text


def _json_or_text(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _connect(options: argparse.Namespace) -> EngineGroup:
    from .. import EngineGroup

    return EngineGroup.connect(options.connect, key_file=options.key_file)


def _left(ends: float) -> float:
    return max(ends - time.monotonic(), 0.05)


def _status(options: argparse.Namespace) -> int:
    ends = time.monotonic() + (options.timeout or (_READY_SECONDS if options.engines else _STATUS_SECONDS))
    with _connect(options) as group:
        if options.engines:
            group.wait_ready(options.engines, _left(ends))
        states = group.status(_left(ends))
    if options.json:
        print(json.dumps([dataclasses.asdict(state) for state in states]))
    else:
        _print_states(states)
    healthy = all(
        state.generation != "unreachable" and state.update_phase not in ("tainted", "stale", "foreign")
        for state in states
    )
    return 0 if states and healthy and len({state.version for state in states}) == 1 else 3


def _print_states(states: Sequence[EngineState]) -> None:
    always: dict[str, Sequence[str]] = {
        "replica": [state.replica for state in states],
        "DP rank": [str(state.dp_rank) for state in states],
        "node": [state.node for state in states],
        "role": ["headless" if state.headless else "head" for state in states],
        "version": ["" if state.version is None else str(state.version) for state in states],
        "generation": [state.generation for state in states],
        "update phase": [state.update_phase for state in states],
        "requests": [str(state.requests) for state in states],
    }
    sometimes: dict[str, Sequence[str]] = {}
    if any(state.adapters for state in states):
        served = [sorted(state.adapters.items()) for state in states]
        sometimes["adapters"] = [", ".join(f"{name} ({version})" for name, version in one) for one in served]
    if any(state.drafter for state in states):
        sometimes["drafter"] = [_drafter(state) for state in states]
    if any(state.sleep not in ("awake", "") for state in states):
        sometimes["sleep"] = [state.sleep.replace("_", " ") for state in states]
    if any(state.free_memory is not None for state in states):
        free = [state.free_memory for state in states]
        sometimes["free memory"] = ["" if nbytes is None else f"{nbytes / 2**30:.1f} GiB" for nbytes in free]
    notes = [state.error for state in states]
    print_table({**always, **sometimes, **({"note": notes} if any(notes) else {})})


def _drafter(state: EngineState) -> str:
    """Return how an engine drafts, and which version its drafter has where that is not the engine's."""
    if not state.drafter or state.draft_version == state.version:
        return state.drafter
    return f"{state.drafter} ({'as started' if state.draft_version is None else f'version {state.draft_version}'})"


def _pause(options: argparse.Namespace) -> int:
    paused = _on_all(options, lambda group, left: group.pause(options.mode, timeout=left, lease=None))
    return print_report(options.json, {"paused": paused}, "{paused} engines are paused")


def _resume(options: argparse.Namespace) -> int:
    resumed = _on_all(options, lambda group, left: group.resume(timeout=left))
    return print_report(options.json, {"resumed": resumed}, "{resumed} engines generate")


def _wake_up(options: argparse.Namespace) -> int:
    awake = _on_all(options, lambda group, left: group.wake_up(timeout=left))
    return print_report(options.json, {"awake": awake}, "{awake} engines are awake")


def _on_all(options: argparse.Namespace, command: Callable[[EngineGroup, float], None]) -> int:
    """Run ``command``, which gets the group and the seconds that are left. Returns how many engines it has."""
    ends = time.monotonic() + options.timeout
    with _connect(options) as group:
        engines = group.engines(options.timeout)
        command(group, _left(ends))
    return len(engines)


def _update(options: argparse.Namespace) -> int:
    with _connect(options) as group:
        with group.update(options.to_version, timeout=options.timeout) as update:
            update.send(options.source, draft=options.draft)
        result = update.result
    facts = {
        "version": result.version,
        "engines": len(result.engines),
        "lost": dict(result.lost),
        "total_ms": round(result.total_ms, 1),
        "pause_ms": round(result.pause_ms, 1),
        "draft": result.draft,
    }
    sentence = "{engines} engines serve version {version} (took {total_ms} ms, paused for {pause_ms} ms)"
    print_report(options.json, facts, sentence)
    return 1 if result.lost else 0


def _call(options: argparse.Namespace) -> int:
    with _connect(options) as group:
        result = group.call(options.method, *options.arguments, timeout=options.timeout)
    if options.json:
        print(json.dumps([dataclasses.asdict(answer) for answer in result.answers], default=repr))
    else:
        print("\n".join(map(str, result.answers)))
    return 1 if result.errors else 0


def _forget(options: argparse.Namespace) -> int:
    with _connect(options) as group:
        group.forget(options.replica, options.dp_rank, timeout=options.timeout)
    which = "all ranks" if options.dp_rank is None else f"DP rank {options.dp_rank}"
    facts = {"replica": options.replica, "dp_rank": options.dp_rank}
    return print_report(options.json, facts, f"{which} of replica {{replica}} are forgotten")


def _verify(options: argparse.Namespace) -> int:
    with _connect(options) as group:
        found = group.verify(options.against, draft=options.draft, timeout=options.timeout)
    if options.json:
        print(json.dumps({"equal": found.equal, **dataclasses.asdict(found)}))
    else:
        for difference in found.differences:
            print(difference)
        for engine, reason in found.unproven.items():
            print(f"{engine}: not compared with a fresh load: {reason}")
        if found.equal:
            print(f"{found.engines} engines serve the same weights ({found.tensors} tensors compared)")
    return 0 if found.equal else 3
