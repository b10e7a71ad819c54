"""Keys, and who gets in."""

from __future__ import annotations

import contextlib
import os
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


def test_a_key_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cluster.key"
    mask = os.umask(0)
    try:
        key = security.write_key(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert security.read_key(path) == key


def test_keygen_never_overwrites_a_key(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    path.write_text("precious")
    with pytest.raises(SettingsError, match=r"cluster\.key exists already"):
        security.write_key(path)
    assert path.read_text() == "precious"


def test_keygen_where_nothing_can_be_written_names_the_path() -> None:
    with pytest.raises(SettingsError, match=r"cannot write a key to /proc/no/cluster\.key"):
        security.write_key("/proc/no/cluster.key")


def test_keygen_below_a_file_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"cannot write a key to .*file/cluster\.key"):
        security.write_key(tmp_path / "file" / "cluster.key")


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
