"""Keys, and who gets in."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zmq
from raw_client import RawClient

from areal_vllm_ext import EngineGroup, EngineUnreachable, protocol
from areal_vllm_ext.errors import SettingsError
from areal_vllm_ext.protocol import GetStatus, Status, security

if TYPE_CHECKING:
    from harness.simulated_engine import Deployment

# Key files


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_a_key_file_and_its_new_folders_are_for_their_owner_only(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "deep" / "deeper" / "cluster.key"
    before = os.umask(umask)
    try:
        key = security.write_key(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (path.parent, path.parent.parent)] == [0o700, 0o700]
    assert security.read_key(path) == key


def test_a_folder_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o755)
    security.write_key(tmp_path / "shared" / "cluster.key")
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o755


def test_the_key_of_this_user_is_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", os.fspath(tmp_path / "state"))
    before = os.umask(0)
    try:
        security.user_key()
    finally:
        os.umask(before)
    folder = tmp_path / "state" / "areal-vllm-ext"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "loopback.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("place", ["/proc/no", "/dev/null"])
def test_no_place_for_the_key_of_this_user_names_the_settings(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", place)
    with pytest.raises(SettingsError, match=f"{place}.*AREAL_VLLM_KEY_FILE or XDG_STATE_HOME"):
        security.user_key()


def test_keygen_never_overwrites_a_key(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    path.write_text("precious")
    with pytest.raises(SettingsError, match=r"cluster\.key exists already"):
        security.write_key(path)
    assert path.read_text() == "precious"


def test_keygen_where_nothing_can_be_written_names_the_path() -> None:
    with pytest.raises(SettingsError, match=r"key file /proc/no/cluster\.key cannot be written"):
        security.write_key("/proc/no/cluster.key")


def test_keygen_below_a_file_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"key file .*file/cluster\.key cannot be written: Not a directory"):
        security.write_key(tmp_path / "file" / "cluster.key")


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "kind", ["/dev/zero", "/dev/full", "/dev/tty", "folder", "pipe", "socket", "link to a pipe", "loop"]
)
def test_what_is_no_regular_file_is_refused_without_reading_it(tmp_path: Path, kind: str) -> None:
    path = Path(kind) if kind.startswith("/") else tmp_path / "key"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path, 0o600)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe", 0o600)
        path.symlink_to(tmp_path / "pipe")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.fspath(path))
    with pytest.raises(SettingsError, match=f"key file {path}"):
        security.read_key(path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    path.chmod(0o600)
    with pytest.raises(SettingsError, match="is not an areal-vllm key file"):
        security.read_key(path)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "", 5, b"\xff", "\ud800"])
def test_a_path_that_cannot_be_is_a_settings_error(path: object) -> None:
    with pytest.raises(SettingsError, match="key file"):
        security.read_key(path)  # type: ignore[arg-type]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    security.write_key(path)
    os.chown(path, 12345, -1)
    with pytest.raises(SettingsError, match=f"belongs to user 12345.*chown 0 {path}"):
        security.read_key(path)


def test_a_link_to_a_key_file_is_followed(tmp_path: Path) -> None:
    """Kubernetes mounts secrets as links."""
    key = security.write_key(tmp_path / "data")
    (tmp_path / "cluster.key").symlink_to(tmp_path / "data")
    assert security.read_key(tmp_path / "cluster.key") == key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_key_that_others_can_read_is_refused_with_the_way_out(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "cluster.key"
    security.write_key(path)
    path.chmod(mode)
    with pytest.raises(SettingsError, match=f"mode {mode:04o}.*chmod 600 {path}"):
        security.read_key(path)


def test_a_missing_key_file_names_keygen(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"No such file.*areal-vllm keygen"):
        security.read_key(tmp_path / "absent.key")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00garbage",
        b"public abc secret def",
        b"areal-vllm-ext cluster key 1\npublic abc\nsecret def\n",
        b"areal-vllm-ext cluster key 1\npublic " + b"x" * 40 + b"\nsecret " + b"y" * 40 + b"\n",
        b"areal-vllm-ext cluster key 1\npublic " + b" " * 40 + b"\nsecret " + b"\\" * 40 + b"\n",
        (
            b"areal-vllm-ext cluster key 2\npublic rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7\nsecret "
            b"JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6\n"
        ),
    ],
    ids=["empty", "binary", "no-header", "short", "not-a-pair", "not-z85", "other-version"],
)
def test_what_is_no_key_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cluster.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(SettingsError, match="areal-vllm keygen"):
        security.read_key(path)


def test_two_halves_of_different_pairs_are_no_key(tmp_path: Path) -> None:
    one, other = security.write_key(tmp_path / "one"), security.write_key(tmp_path / "other")
    mixed = (tmp_path / "one").read_text().replace(one.secret.decode(), other.secret.decode())
    (tmp_path / "one").write_text(mixed)
    with pytest.raises(SettingsError, match="is not an areal-vllm key file"):
        security.read_key(tmp_path / "one")


def test_engines_of_one_user_that_start_together_agree_on_one_key() -> None:
    with ThreadPoolExecutor(16) as pool:
        keys = set(pool.map(lambda _: security.user_key(), range(16)))
    assert len(keys) == 1
    folder = Path(os.environ["XDG_STATE_HOME"]) / "areal-vllm-ext"
    assert [path.name for path in folder.iterdir()] == ["loopback.key"], "a draft was left behind"


# Off loopback


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "0.0.0.0", "::", "fd00::1", "node7", "localhost.example.com", "128.0.0.1"]
)
def test_off_loopback_without_a_key_is_refused_and_names_the_setting(host: str) -> None:
    with pytest.raises(SettingsError, match=r"(?s)not a loopback address.*areal-vllm keygen.*AREAL_VLLM_KEY_FILE"):
        security.key_for(host, None)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_setting(host: str) -> None:
    assert security.key_for(host, None) == security.user_key()


def test_a_key_file_is_used_on_loopback_too(key_file: Path) -> None:
    assert security.key_for("127.0.0.1", os.fspath(key_file)) == security.read_key(key_file)


def test_a_group_off_loopback_without_a_key_is_refused_at_connect() -> None:
    with pytest.raises(SettingsError, match="AREAL_VLLM_KEY_FILE"):
        EngineGroup.connect("tcp://10.0.0.1:29700")


# At the door


def assert_serves(deployment: Deployment, raw: Callable[..., RawClient]) -> None:
    assert isinstance(raw(deployment.engines[0].endpoint.address).ask(GetStatus()), Status)


def test_the_wrong_key_is_named_within_the_deadline_and_costs_others_nothing(
    deployment: Deployment, tmp_path: Path, raw: Callable[..., RawClient]
) -> None:
    security.write_key(tmp_path / "wrong.key")
    started = time.monotonic()
    with (
        EngineGroup.connect(deployment.directory, key_file=tmp_path / "wrong.key") as group,
        pytest.raises(EngineUnreachable, match="key"),
    ):
        group.engines(timeout=1.0)
    assert time.monotonic() - started < 2.0
    assert_serves(deployment, raw)


@contextlib.contextmanager
def stranger_to(address: str) -> Iterator[tuple[zmq.Socket[bytes], Callable[[], None]]]:
    """A socket, and what connects it and says hello."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stranger = context.socket(zmq.DEALER)

    def send() -> None:
        stranger.connect(address)
        stranger.send_multipart([os.urandom(16), protocol.encoder.encode(protocol.Hello())], zmq.NOBLOCK)

    try:
        yield stranger, send
    finally:
        context.destroy(linger=0)


def test_who_knows_only_the_public_half_stays_outside(
    deployment: Deployment, key: security.ClusterKey, raw: Callable[..., RawClient]
) -> None:
    public, secret = zmq.curve_keypair()
    for server in (deployment.engines[0].endpoint.address, deployment.directory):
        with stranger_to(server) as (stranger, send):
            stranger.curve_serverkey, stranger.curve_publickey, stranger.curve_secretkey = key.public, public, secret
            send()
            assert not stranger.poll(500)
    assert_serves(deployment, raw)


@pytest.mark.parametrize("mechanism", ["NULL", "PLAIN"])
def test_a_client_without_a_key_gets_nothing(
    deployment: Deployment, raw: Callable[..., RawClient], mechanism: str
) -> None:
    with stranger_to(deployment.engines[0].endpoint.address) as (stranger, send):
        if mechanism == "PLAIN":
            stranger.plain_username, stranger.plain_password = b"root", b"root"
        send()
        assert not stranger.poll(500)
    assert_serves(deployment, raw)


def test_a_server_that_does_not_hold_the_key_is_told_nothing(key: security.ClusterKey, free_port: int) -> None:
    """The client proves the server too: an impostor on the engine's port learns no request."""
    public, secret = zmq.curve_keypair()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = None
    try:
        impostor = context.socket(zmq.ROUTER)  # without a authenticator: it lets everybody in
        impostor.curve_server, impostor.curve_publickey, impostor.curve_secretkey = True, public, secret
        impostor.bind(f"tcp://127.0.0.1:{free_port}")
        client = RawClient(f"tcp://127.0.0.1:{free_port}", key)
        client.send(os.urandom(16), protocol.encoder.encode(protocol.Hello()))
        assert not impostor.poll(700)
    finally:
        if client:
            client.close()
        context.destroy(linger=0)
