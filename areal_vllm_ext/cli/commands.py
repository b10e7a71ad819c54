"""``areal-vllm``: status, pause, resume, update, verify, keygen, directory, launch and the demo, for people and for scripts.

Exit codes: 0 done; 1 it failed, and the one line on standard error says why and what to do; 2 the command line is wrong;
3 (``status``) an engine is missing, tainted, stale, unreachable or on another version than the others; (``verify``) weights
differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from typing import TYPE_CHECKING

from .._version import __version__
from ..errors import ArealError, LaunchError
from . import launch_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        print("areal-vllm: interrupted", file=sys.stderr)
        return 130
    except LaunchError as error:  # the cause in a line, then the end of its log
        print(f"areal-vllm: {error}", file=sys.stderr)
        return 1
    except (ArealError, OSError, ValueError) as error:
        print(f"areal-vllm: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="areal-vllm", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"areal-vllm-ext {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    group = argparse.ArgumentParser(add_help=False)
    group.add_argument(
        "--connect",
        metavar="ADDRESS",
        default="",
        help="tcp://host:port of the directory (default: AREAL_VLLM_DIRECTORY, or this machine, port 29700)",
    )
    group.add_argument("--key-file", metavar="FILE", help="the cluster's key (default: AREAL_VLLM_KEY_FILE)")
    group.add_argument("--json", action="store_true", help="print JSON for programs")
    group.add_argument("--timeout", metavar="SECONDS", type=float, default=60.0, help="deadline (default: %(default)s)")

    command = commands.add_parser("status", parents=[group], help="every engine: version, state, requests")
    command.add_argument("--engines", metavar="N", type=int, help="first wait until N engines are ready")
    command.set_defaults(run=_status)

    command = commands.add_parser("pause", parents=[group], help="pause generation on every engine")
    command.add_argument("--mode", choices=("keep", "wait", "abort"), default="keep")
    command.set_defaults(run=_pause)

    command = commands.add_parser("resume", parents=[group], help="let every engine generate again")
    command.set_defaults(run=_resume)

    command = commands.add_parser("update", parents=[group], help="move every engine to the weights in a directory")
    command.add_argument("--from", dest="source", metavar="DIR", required=True, help="a Hugging Face checkpoint")
    command.add_argument("--to-version", metavar="VERSION", required=True, help="the new version's name")
    command.set_defaults(run=_update)

    command = commands.add_parser(
        "verify", parents=[group], help="compare the weights that engines serve with each other, and with a directory"
    )
    command.add_argument("--against", metavar="DIR", help="a Hugging Face checkpoint that they should serve")
    command.set_defaults(run=_verify)

    command = commands.add_parser("keygen", help="make a cluster's key")
    command.add_argument("file", metavar="FILE")
    command.set_defaults(run=_keygen)

    command = commands.add_parser("directory", help="serve a directory apart from any engine, for several replicas")
    command.add_argument("address", metavar="ADDRESS", help="tcp://host:port, of this machine")
    command.add_argument("--key-file", metavar="FILE", help="the cluster's key (default: AREAL_VLLM_KEY_FILE)")
    command.set_defaults(run=_directory)

    launch_file.add_to(commands)

    command = commands.add_parser("demo", help="train a tiny model with two vLLM engines on this machine")
    command.add_argument("--moe", action="store_true", help="a mixture-of-experts model on a lockstep DP group")
    command.add_argument("--steps", metavar="N", type=int, help="training steps")
    command.add_argument("--seed", metavar="N", type=int, default=0)
    command.add_argument("--keep-logs", action="store_true", help="keep the engines' logs")
    command.set_defaults(run=_demo)
    return parser


def _status(options: argparse.Namespace) -> int:
    from .. import EngineGroup

    with EngineGroup.connect(options.connect, key_file=options.key_file) as group:
        if options.engines:
            group.wait_ready(options.engines, options.timeout)
        states = group.status(min(options.timeout, 5.0))
    if options.json:
        print(json.dumps([dataclasses.asdict(state) for state in states]))
    else:
        _print_table(
            ("replica", "DP rank", "node", "role", "version", "state", "update", "requests", "note"),
            [
                (
                    state.replica,
                    str(state.dp_rank),
                    state.node,
                    "headless" if state.headless else "head",
                    "" if state.version is None else str(state.version),
                    state.state,
                    state.phase,
                    str(state.requests),
                    state.error,
                )
                for state in states
            ],
        )
    healthy = all(state.state != "unreachable" and state.phase not in ("tainted", "stale") for state in states)
    return 0 if states and healthy and len({state.version for state in states}) == 1 else 3


def _pause(options: argparse.Namespace) -> int:
    from .. import EngineGroup

    with EngineGroup.connect(options.connect, key_file=options.key_file) as group:
        group.pause(options.mode, deadline=options.timeout, lease=None)
        return _report(options, {"paused": len(group.engines())}, "{paused} engines are paused")


def _resume(options: argparse.Namespace) -> int:
    from .. import EngineGroup

    with EngineGroup.connect(options.connect, key_file=options.key_file) as group:
        group.resume(deadline=options.timeout)
        return _report(options, {"resumed": len(group.engines())}, "{resumed} engines generate")


def _update(options: argparse.Namespace) -> int:
    from .. import EngineGroup

    with EngineGroup.connect(options.connect, key_file=options.key_file) as group:
        with group.update(options.to_version, deadline=options.timeout) as update:
            update.send(options.source)
        result = update.result
    facts = {
        "version": result.version,
        "engines": len(result.engines),
        "lost": dict(result.lost),
        "total_ms": round(result.total_ms, 1),
        "pause_ms": round(result.pause_ms, 1),
    }
    _report(options, facts, "{engines} engines serve version {version} (took {total_ms} ms, paused for {pause_ms} ms)")
    return 1 if result.lost else 0


def _verify(options: argparse.Namespace) -> int:
    from .. import EngineGroup

    with EngineGroup.connect(options.connect, key_file=options.key_file) as group:
        found = group.verify(options.against, deadline=options.timeout)
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


def _keygen(options: argparse.Namespace) -> int:
    from ..protocol import security

    key = security.write_key(options.file)
    print(f"wrote {options.file} ({key.fingerprint}...): copy it to every node and set AREAL_VLLM_KEY_FILE to its path")
    return 0


def _directory(options: argparse.Namespace) -> int:
    import zmq

    from ..config import Settings, split_address
    from ..control.directory_server import DirectoryServer
    from ..protocol import security
    from ..protocol.timing import SETTLE_SECONDS

    host, port = split_address(options.address)
    settings = Settings.load()
    key = security.key_for(host, options.key_file or settings.key_file)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    authenticator = security.ZapAuthenticator(context, key)
    server = DirectoryServer(
        context, host, port, key, settle_seconds=SETTLE_SECONDS, resume_orphans=settings.resume_orphans
    )
    print(f"directory at {server.address}; engines find it with AREAL_VLLM_DIRECTORY={server.address}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: context.term())
    server.thread.join()
    authenticator.thread.join()
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .. import demo

    return demo.run(moe=options.moe, steps=options.steps, seed=options.seed, keep_logs=options.keep_logs)


def _report(options: argparse.Namespace, facts: Mapping[str, object], sentence: str) -> int:
    print(json.dumps(facts) if options.json else sentence.format(**facts))
    return 0


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table without a library: a trainer's environment may lack one."""
    shown = [place for place, head in enumerate(heads) if head in heads[:7] or any(row[place] for row in rows)]
    widths = [max(len(line[place]) for line in (heads, *rows)) for place in shown]
    for line in (heads, *rows):
        print("  ".join(line[place].ljust(width) for place, width in zip(shown, widths, strict=True)).rstrip())
