"""The command ``launch``: a replica on a Ray cluster, from a file or from options, until Ctrl-C."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LaunchError, SettingsError
from .options import count, seconds

if TYPE_CHECKING:
    import argparse

    from ..launcher import ReplicaSpec
    from .options import Commands

_FIELDS = (
    "model",
    "data_parallel_size",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "restart",
    "timeout",
    "vllm_args",
)


def add_to(commands: Commands) -> None:
    """Add the command to ``areal-vllm``."""
    parser = commands.add(
        "launch",
        _launch,
        "Start vLLM on a Ray cluster, until Ctrl-C",
        "Nothing of it is left on any node when the command has ended. Options take precedence over the file.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="name on the Hugging Face Hub, or path on every node")
    parser.add_argument("--config", metavar="FILE", help="settings in YAML, described in docs/placement.md")
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", default="auto", help="of the Ray cluster (default: this node's)"
    )
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        help="the cluster's key, for other programs that control the engines; made if there is no such file (default: "
        "AREAL_VLLM_KEY_FILE, or a new key for this replica only)",
    )
    parser.add_argument(
        "--placement", choices=("separate", "deferred"), help="on one node, or over several (default: separate)"
    )
    parser.add_argument("--nodes", metavar="N", type=count, help="number of nodes, with deferred (default: 1)")
    parser.add_argument(
        "--devices-per-node", metavar="N", type=count, help="number of devices on each node (default: 1)"
    )
    parser.add_argument("--resource", metavar="NAME", help="Ray's name of a device (default: GPU)")
    parser.add_argument(
        "--strategy",
        choices=("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"),
        help="how Ray spreads the nodes' bundles (default: PACK)",
    )
    for kind in ("data", "tensor", "pipeline"):
        parser.add_argument(f"--{kind}-parallel-size", metavar="N", type=count, help="of vLLM (default: 1)")
    parser.add_argument(
        "--restart",
        choices=("never", "node", "replica"),
        help="what restarts when a node has died (default: never; docs/placement.md)",
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, help="time until all engines serve (default: 600)"
    )
    parser.add_argument("--vllm-args", metavar="...", nargs="...", help="all further arguments go to 'vllm serve'")


def _launch(options: argparse.Namespace) -> int:
    spec = read_spec(options)

    import ray

    from .. import launcher
    from ..protocol import security

    if options.key_file and not Path(options.key_file).exists():
        security.write_key(options.key_file)
    try:
        ray.init(options.ray_address, log_to_driver=False, logging_level="WARNING")
    except Exception as error:
        raise LaunchError(
            f"launch: no connection to Ray at {options.ray_address}: {' '.join(str(error).split())}; start Ray there, or give "
            "another --ray-address"
        ) from None
    with launcher.launch(spec, key_file=options.key_file) as replica:
        print(f"serving at {replica.url}; the directory is {replica.directory.address}", flush=True)
        while (state := replica.status()).phase != "failed":
            time.sleep(1)
    raise LaunchError(f"replica {replica.name}: {state.error}")


def read_spec(options: argparse.Namespace) -> ReplicaSpec:
    """Read the settings of a replica from the file, then from the options.

    Raises:
        SettingsError: the file cannot be read, or a setting is wrong or missing.
    """
    import msgspec

    from .. import launcher

    given = _read_file(options.config) if options.config else {}
    place: dict[str, Any] = {"kind": options.placement, "bundles": options.nodes, "devices": options.devices_per_node}
    place |= {"resource": options.resource, "strategy": options.strategy}
    place = {name: value for name, value in place.items() if value}
    placement = given.get("placement") or {}
    if not isinstance(placement, dict):
        raise SettingsError(
            f"{options.config}: placement is {placement!r}, not a mapping; write for example: placement: {{kind: separate}}"
        )
    given |= {"placement": {**placement, **place}}
    given |= {name: getattr(options, name) for name in _FIELDS if getattr(options, name)}
    if not given.get("model"):
        where = f"or 'model:' to {options.config}" if options.config else "or --config FILE"
        raise SettingsError(f"launch: there is no model; add MODEL to the command line, {where}")
    source = options.config or "launch"
    try:
        spec = msgspec.convert(given, launcher.ReplicaSpec)
        spec.check()
    except (msgspec.ValidationError, RecursionError) as error:
        raise SettingsError(f"{source}: {error}; see docs/placement.md") from None
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from None
    return spec


def _read_file(path: str) -> dict[str, Any]:
    import msgspec

    try:
        given = msgspec.yaml.decode(Path(path).read_bytes())
    except ImportError:
        raise SettingsError(f"{path}: PyYAML is not installed; run: pip install pyyaml") from None
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; give the path of a YAML file") from None
    except Exception as error:  # the parser's own, and what its constructors raise for bad values
        raise SettingsError(f"{path}: it is not YAML: {' '.join(str(error).split())}") from None
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise SettingsError(
            f"{path}: it holds a {type(given).__name__}, not a mapping of settings; see docs/placement.md"
        )
    return given
