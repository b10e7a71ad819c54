"""Commands for a cluster: make its key, and serve a directory for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ArealError
from .options import add_key_file

if TYPE_CHECKING:
    import argparse

    from .options import Commands


def add_to(commands: Commands) -> None:
    """Add the commands to ``areal-vllm``."""
    parser = commands.add(
        "keygen",
        _keygen,
        "Make a cluster's key",
        "The file is readable by its owner only (mode 0600). An existing file is never overwritten.\n"
        "Copy the file to every node and set AREAL_VLLM_KEY_FILE to its path there. Whoever has the\n"
        "key can command the engines.",
    )
    parser.add_argument("file", metavar="FILE", help="path of the new file")

    parser = commands.add(
        "directory",
        _directory,
        "Serve a directory that outlives the engines, for one or several replicas",
        "Without this command the head engine of a replica serves the directory. The command runs until Ctrl-C.",
    )
    parser.add_argument("address", metavar="ADDRESS", help="tcp://host:port, an address of this machine")
    add_key_file(parser)


def _keygen(options: argparse.Namespace) -> int:
    from ..protocol import security

    key = security.write_key(options.file)
    print(f"wrote {options.file} ({key.fingerprint}...): copy it to every node and set AREAL_VLLM_KEY_FILE to its path")
    return 0


def _directory(options: argparse.Namespace) -> int:
    import zmq

    from ..config import Settings, split_address
    from ..control.directory_server import DirectoryServer
    from ..process.file_limit import raise_file_limit
    from ..protocol import security, timing

    raise_file_limit()
    host, port = split_address(options.address)
    settings = Settings.load()
    key = security.key_for(host, options.key_file or settings.key_file)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    authenticator = security.ZapAuthenticator(context, key)
    server: DirectoryServer | None = None
    try:
        server = DirectoryServer(
            context, host, port, key, settle_seconds=timing.SETTLE_SECONDS, resume_orphans=settings.resume_orphans
        )
        print(f"directory at {server.address}; engines find it with AREAL_VLLM_DIRECTORY={server.address}", flush=True)
        while server.thread.is_alive():
            server.thread.join(1.0)
        raise ArealError("directory: its thread has failed; the traceback above says why")
    finally:
        context.term()
        if server:
            server.thread.join()
        authenticator.thread.join()
