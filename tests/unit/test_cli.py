"""The command line: one line on standard error that says what to do, never a traceback, and an exit code for scripts."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from areal_vllm_ext.cli import main
from areal_vllm_ext.protocol import security

if TYPE_CHECKING:
    from pathlib import Path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with code 1 and one line."""
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    return said.err


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def test_keygen_writes_a_key_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.key"
    assert main(["keygen", str(path)]) == 0
    assert "AREAL_VLLM_KEY_FILE" in capsys.readouterr().out
    assert path.stat().st_mode & 0o777 == 0o600
    assert "exists already" in refused(capsys, "keygen", str(path))


def test_keygen_says_why_it_cannot_write(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot write a key to /proc/cluster.key" in refused(capsys, "keygen", "/proc/cluster.key")


def test_missing_directory_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    address = free_address()
    for command in (["status"], ["pause"], ["resume"], ["update", "--from", ".", "--to-version", "1"]):
        line = refused(capsys, *command, "--connect", address, "--timeout", "0.5")
        assert address in line
        assert "nothing listens there" in line


def test_address_off_loopback_needs_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert "AREAL_VLLM_KEY_FILE" in refused(capsys, "status", "--connect", "tcp://192.0.2.1:29700")


@pytest.mark.parametrize("address", ["192.0.2.1:29700", "tcp://host", "tcp://host:port", "http://host:1"])
def test_bad_address_says_how_to_write_one(capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert "tcp://host:port" in refused(capsys, "status", "--connect", address)


def test_key_that_others_can_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.key"
    security.write_key(path)
    path.chmod(0o644)
    line = refused(capsys, "status", "--connect", free_address(), "--key-file", str(path))
    assert f"chmod 600 {path}" in line


def test_directory_says_which_address_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused(capsys, "directory", f"tcp://127.0.0.1:{port}")


def test_wrong_command_line_is_code_2() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["update", "--from", "x"])
    assert ended.value.code == 2
