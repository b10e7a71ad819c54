"""Who may connect: one key pair for a cluster, and CURVE on every socket.

Whoever holds the cluster's key file is a member of the cluster; everybody else fails the handshake. Engines, workers,
directory and trainers all use the same key pair: the server proves it to the client, and the client to the server.
Without a key file, a key of this user is used and only loopback addresses are served. So a laptop or a single node needs
no setting, and other users of the machine still stay outside.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import stat
import threading
from pathlib import Path
from typing import Any, NamedTuple

import zmq
from zmq.utils import z85

from ..errors import SettingsError

_HEADER = "areal-vllm-ext cluster key 1"
_MAX_KEY_FILE_BYTES = 4096


class ClusterKey(NamedTuple):
    """A CURVE key pair, Z85 text, 40 bytes each."""

    public: bytes
    secret: bytes

    @property
    def fingerprint(self) -> str:
        """Return enough of the public half to compare two key files by eye."""
        return self.public[:8].decode()


def new_key() -> ClusterKey:
    """Return a new random key."""
    return ClusterKey(*zmq.curve_keypair())


def write_key(path: str | os.PathLike[str], key: ClusterKey | None = None) -> ClusterKey:
    """Write ``key``, by default a new one, to a new file of mode 0600, and return it.

    Folders that do not exist are made, with mode 0700. The umask has no effect on either.

    Raises:
        SettingsError: the file exists already, or cannot be written.
    """
    key = key or new_key()
    try:
        _make_private_folder(Path(path).parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, 0o600)
            file.write(f"{_HEADER}\npublic {key.public.decode()}\nsecret {key.secret.decode()}\n")
    except FileExistsError:
        raise SettingsError(f"key file {path} exists already; give another path, or remove it first") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"key file {path} cannot be written: {_cause(error)}; give another path") from None
    return key


def _make_private_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_private_folder(folder.parent)
        with contextlib.suppress(FileExistsError):  # another process was faster
            folder.mkdir()
            folder.chmod(0o700)


def read_key(path: str | os.PathLike[str]) -> ClusterKey:
    """Read a key file.

    Kind, owner and mode are checked on the open file before it is read, because a device or a pipe has no end, and a
    file that others own or can read is no secret.

    Raises:
        SettingsError: the file is missing, not a regular file, owned or readable by others, or not a key file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
            facts = os.fstat(file.fileno())
            if problem := _key_file_problem(path, facts):
                raise SettingsError(f"key file {path} {problem}")
            content = file.read(_MAX_KEY_FILE_BYTES)
    except (OSError, ValueError, TypeError) as error:
        raise SettingsError(f"key file {path}: {_cause(error)}; make one with: areal-vllm keygen {path}") from None
    match content.decode(errors="replace").split():
        case [*header, "public", public, "secret", secret] if " ".join(header) == _HEADER:
            key = ClusterKey(public.encode(), secret.encode())
            if len(key.public) == 40 and len(key.secret) == 40 and zmq.curve_public(key.secret) == key.public:
                return key
    raise SettingsError(f"{path} is not an areal-vllm key file; make one with: areal-vllm keygen FILE")


def _key_file_problem(path: str | os.PathLike[str], facts: os.stat_result) -> str:
    if not stat.S_ISREG(facts.st_mode):
        return "is not a regular file; give the path of a file that areal-vllm keygen wrote"
    if facts.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {facts.st_uid}, who can read and change it; run: chown {os.geteuid()} {path}"
    if (mode := stat.S_IMODE(facts.st_mode)) & 0o077:
        return f"can be read by others (mode {mode:04o}); run: chmod 600 {path}"
    return ""


def _cause(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def user_key() -> ClusterKey:
    """Return this user's key for loopback, which the first call makes.

    Raises:
        SettingsError: the key cannot be read or written.
    """
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError as error:
        raise SettingsError(
            f"no place for this user's key: {error}; set AREAL_VLLM_KEY_FILE or XDG_STATE_HOME"
        ) from None
    path = state / "areal-vllm-ext" / "loopback.key"
    if not os.path.lexists(path):
        # Engines of one node start together. Each writes a key of its own, the first link wins, and all read that one.
        draft = path.with_suffix(f".{secrets.token_hex(8)}")
        try:
            write_key(draft)
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(draft)
        except (SettingsError, OSError) as error:
            raise SettingsError(f"this user's key: {error}; or set AREAL_VLLM_KEY_FILE or XDG_STATE_HOME") from None
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()
    return read_key(path)


def is_loopback(host: str) -> bool:
    """Return whether ``host`` (an address or a name) can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def key_for(host: str, key_file: str | None) -> ClusterKey:
    """Return the key for a socket on, or to, ``host``.

    Raises:
        SettingsError: ``host`` is not a loopback address and there is no key file, or the key cannot be read.
    """
    if key_file:
        return read_key(key_file)
    if is_loopback(host):
        return user_key()
    raise SettingsError(
        f"{host} is not a loopback address, and no key is set; make one with 'areal-vllm keygen cluster.key', copy it to "
        "every node, and set AREAL_VLLM_KEY_FILE=cluster.key there (or EngineGroup.connect(..., key_file=...))"
    )


def own_address_toward(host: str) -> str:
    """Return the address of this machine from which ``host`` is reached."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing; the kernel only looks into its routing table.
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


def serve_curve(socket_: zmq.Socket[bytes], key: ClusterKey) -> None:
    """Let only holders of ``key`` connect; call it before ``bind``, with a ``ZapAuthenticator`` on the context."""
    socket_.curve_server = True
    socket_.curve_publickey = key.public
    socket_.curve_secretkey = key.secret
    socket_.zap_domain = b"areal"


def join_curve(socket_: zmq.Socket[Any], key: ClusterKey) -> None:
    """Prove ``key`` to the server, and demand the same proof from it; call it before ``connect``."""
    socket_.curve_serverkey = key.public
    socket_.curve_publickey = key.public
    socket_.curve_secretkey = key.secret


class ZapAuthenticator:
    """Answers the authentication requests (ZAP, RFC 27) of one ZeroMQ context: holders of the key are let in."""

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
