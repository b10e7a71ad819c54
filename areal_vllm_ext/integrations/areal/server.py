"""Stands in for ``areal.engine.vllm_ext.areal_vllm_server``: ``vllm serve`` with this package on it, from AReaL's command line.

It runs as the module that it replaces, so its imports are absolute.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points

WORKER_EXTENSION = "areal_vllm_ext.worker.WorkerExtension"
_EXTENSION_OF_AREAL = "areal.engine.vllm_ext.vllm_worker_extension.VLLMWorkerExtension"
# AReaL passes it, and vLLM does not know it: several nodes find each other by --master-addr.
_UNKNOWN_TO_VLLM = "--dist-init-addr"


def serve_arguments(arguments: list[str]) -> list[str]:
    """Return the arguments of ``vllm serve`` for the arguments of AReaL's server."""
    taken: list[str] = []
    names = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    skip = False
    for argument, name in zip(arguments, names, strict=True):
        if skip:
            skip = False
        elif name == _UNKNOWN_TO_VLLM:
            skip = "=" not in argument
        else:
            taken.append(argument.replace(_EXTENSION_OF_AREAL, WORKER_EXTENSION))
    if "--worker-extension-cls" not in names:
        taken += ["--worker-extension-cls", WORKER_EXTENSION]
    if "--headless" not in names and "--api-server-count" not in names:
        taken += ["--api-server-count", "1"]
    return taken


def plugin_names(given: str | None) -> str:
    """Return VLLM_PLUGINS with AReaL's routes. Where it was not set, all installed plugins stay on."""
    own = ["areal_vllm_ext", "areal_routes"]
    if given is None:
        groups = entry_points()
        named = [one.name for group in groups.groups if group.startswith("vllm.") for one in groups.select(group=group)]
    else:
        named = given.split(",")
    return ",".join(dict.fromkeys([*named, *own]))


def main() -> None:
    """Run ``vllm serve``."""
    os.environ["VLLM_PLUGINS"] = plugin_names(os.environ.get("VLLM_PLUGINS"))
    sys.argv = ["vllm", "serve", *serve_arguments(sys.argv[1:])]
    from vllm.entrypoints.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
