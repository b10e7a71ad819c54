"""The command line of ``areal-vllm``."""

from __future__ import annotations

import argparse

from .._version import __version__
from . import cluster, demo, group, launch
from .options import EXIT_CODES, STATUS_CODE, VERIFY_CODE, Commands


def build() -> argparse.ArgumentParser:
    """Build the parser; ``run(options)`` of what it parses is the command."""
    parser = argparse.ArgumentParser(
        prog="areal-vllm",
        description="Control the vLLM engines of a cluster: update their weights, pause and resume them.",
        epilog=EXIT_CODES.format(f"  3    status: {STATUS_CODE}\n       verify: {VERIFY_CODE}\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"areal-vllm-ext {__version__}")
    commands = Commands(parser.add_subparsers(title="commands", required=True, metavar="COMMAND"))
    for module in (group, cluster, launch, demo):
        module.add_to(commands)
    return parser
