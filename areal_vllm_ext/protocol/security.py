"""Who may connect: a cluster's one key pair, and CURVE on every socket.

Whoever holds the cluster's key file is a member of the cluster, and nobody else gets past the handshake. Engines,
workers, directory and trainers all use the same key pair: the server proves it to the client, the client to the server.
Without a key file a key of this user is used and only loopback addresses are served, so that a laptop or a single node
needs no setting, and other users of the same machine still stay outside.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any, NamedTuple

import zmq
from zmq.utils import z85

from ..errors import SettingsError

_HEADER = "areal-vllm-ext cluster key 1"


class ClusterKey(NamedTuple):
    """A CURVE key pair, Z85 text, 40 bytes each."""

    public: bytes
    secret: bytes

    @property
    def fingerprint(self) -> str:
        """Enough of the public half to compare two key files by eye."""
        return self.public[:8].decode()


def new_key() -> ClusterKey:
    """A key that nobody has yet."""
    return ClusterKey(*zmq.curve_keypair())


def write_key(path: str | os.PathLike[str], key: ClusterKey | None = None) -> ClusterKey:
    """Write ``key``, by default a new one, to ``path`` (mode 0600).

    Raises:
        SettingsError: where the file exists already or cannot be written.
    """
    key = key or new_key()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot write a key to {path}: {error.strerror}") from None
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SettingsError(f"{path} exists already: give another path, or remove it first") from None
    except OSError as error:
        raise SettingsError(f"cannot write a key to {path}: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{_HEADER}\npublic {key.public.decode()}\nsecret {key.secret.decode()}\n")
    return key


def read_key(path: str | os.PathLike[str]) -> ClusterKey:
    """Read a key file that only its owner can read.

    Raises:
        SettingsError: where it is missing, readable by others, or no key file.
    """
    try:
        mode = stat.S_IMODE(Path(path).stat().st_mode)
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "not a text file"
        raise SettingsError(f"key file {path}: {cause}; make one with: areal-vllm keygen {path}") from None
    if mode & 0o077:
        raise SettingsError(f"key file {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}")
    match text.split():
        case [*header, "public", public, "secret", secret] if " ".join(header) == _HEADER:
            key = ClusterKey(public.encode(), secret.encode())
            if len(public) == 40 and len(secret) == 40 and zmq.curve_public(key.secret) == key.public:
                return key
    raise SettingsError(f"{path} is not an areal-vllm key file; make one with: areal-vllm keygen FILE")


def user_key() -> ClusterKey:
    """The key of this user for loopback, made at first use."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "areal-vllm-ext" / "loopback.key"
    if not path.exists():
        # Engines of one node start together: each writes its own, the first link wins, all read that one.
        draft = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        write_key(draft)
        try:
            path.hardlink_to(draft)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return read_key(path)


def is_loopback(host: str) -> bool:
    """Whether ``host`` (an address or a name) can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def key_for(host: str, key_file: str | None) -> ClusterKey:
    """The key for a socket on, or to, ``host``.

    Raises:
        SettingsError: off loopback without a key file.
    """
    if key_file:
        return read_key(key_file)
    if is_loopback(host):
        return user_key()
    raise SettingsError(
        f"{host} is not a loopback address, and no key is set: make one with 'areal-vllm keygen cluster.key', copy it to "
        "every node, and set AREAL_VLLM_KEY_FILE=cluster.key there (or EngineGroup.connect(..., key_file=...))"
    )


def own_address_toward(host: str) -> str:
    """The address of this machine from which ``host`` is reached."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing: it only asks the routing table.
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


def serve_curve(socket_: zmq.Socket[bytes], key: ClusterKey) -> None:
    """Let only holders of ``key`` connect to this socket (before ``bind``; needs ``ZapAuthenticator`` on its context)."""
    socket_.curve_server = True
    socket_.curve_publickey = key.public
    socket_.curve_secretkey = key.secret
    socket_.zap_domain = b"areal"


def join_curve(socket_: zmq.Socket[Any], key: ClusterKey) -> None:
    """Prove ``key`` to the server, and demand the same of it (before ``connect``)."""
    socket_.curve_serverkey = key.public
    socket_.curve_publickey = key.public
    socket_.curve_secretkey = key.secret


class ZapAuthenticator:
    """Answers ZeroMQ's authentication requests (ZAP, RFC 27) of one context: our key, or no entry."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], key: ClusterKey) -> None:
        self._allowed = z85.decode(key.public)
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind("inproc://zeromq.zap.01")
        self.thread = threading.Thread(target=self._run, name="areal-zap", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while True:
                version, request, _domain, _address, _identity, mechanism, *credentials = self._socket.recv_multipart()
                welcome = mechanism == b"CURVE" and credentials == [self._allowed]
                verdict = [b"200", b"OK"] if welcome else [b"400", b"not the cluster's key"]
                self._socket.send_multipart([version, request, *verdict, b"", b""])
        except zmq.ContextTerminated:
            self._socket.close()
