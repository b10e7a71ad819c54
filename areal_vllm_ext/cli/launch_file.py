"""``areal-vllm launch``: a replica on a Ray cluster, from a file or from flags, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path
from typing import Any

from ..errors import LaunchError, SettingsError


def add_to(commands: Any) -> None:
    """Add the command to ``areal-vllm``'s."""
    command = commands.add_parser(
        "launch", help="place vLLM on a Ray cluster; runs until Ctrl-C, and takes all with it"
    )
    command.add_argument("model", metavar="MODEL", nargs="?", help="on the Hub, or a path on every node")
    command.add_argument(
        "--config", metavar="FILE", help="settings in YAML (docs/placement.md); flags come before them"
    )
    command.add_argument(
        "--ray-address", metavar="ADDRESS", default="auto", help="of the Ray cluster (default: this node's)"
    )
    command.add_argument(
        "--key-file", metavar="FILE", help="the cluster's key; is made if there is none (default: no file)"
    )
    command.add_argument("--placement", choices=("separate", "deferred"), help="on one node, or over several")
    command.add_argument("--nodes", metavar="N", type=int, help="of a deferred placement")
    command.add_argument("--devices-per-node", metavar="N", type=int)
    command.add_argument("--resource", metavar="NAME", help="Ray's name of a device (default: GPU)")
    command.add_argument("--strategy", choices=("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"))
    for kind in ("data", "tensor", "pipeline"):
        command.add_argument(f"--{kind}-parallel-size", metavar="N", type=int)
    command.add_argument("--restart", choices=("never", "node", "replica"))
    command.add_argument("--timeout", metavar="SECONDS", type=float, help="until all engines serve (default: 600)")
    command.add_argument("--vllm-args", metavar="...", nargs=argparse.REMAINDER, help="the rest goes to vllm serve")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    import msgspec

    from .. import launcher
    from ..protocol import security

    given: dict[str, Any] = {}
    if options.config:
        given = msgspec.yaml.decode(Path(options.config).read_bytes()) or {}
    place: dict[str, Any] = {"kind": options.placement, "bundles": options.nodes, "devices": options.devices_per_node}
    place |= {"resource": options.resource, "strategy": options.strategy}
    given["placement"] = {**given.get("placement", {}), **{name: value for name, value in place.items() if value}}
    names = (
        "model",
        "data_parallel_size",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "restart",
        "timeout",
        "vllm_args",
    )
    given |= {name: getattr(options, name) for name in names if getattr(options, name)}
    try:
        spec = msgspec.convert(given, launcher.ReplicaSpec)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{options.config or 'flags'}: {error}") from None
    if options.key_file and not Path(options.key_file).exists():
        security.write_key(options.key_file)

    import ray

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    ray.init(options.ray_address, log_to_driver=False, logging_level="WARNING")
    with launcher.launch(spec, key_file=options.key_file) as replica:
        print(f"serving at {replica.url}; engines are known at {replica.directory.address}", flush=True)
        while (state := replica.status()).phase != "failed":
            time.sleep(1)
    raise LaunchError(state.error)
