"""The command line: one line on standard error that says what to do, never a traceback, and an exit code for scripts."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import zmq

from areal_vllm_ext.cli import main
from areal_vllm_ext.cli.group import _json_or_text
from areal_vllm_ext.cli.parser import build
from areal_vllm_ext.protocol import directory_decoder, security
from areal_vllm_ext.protocol.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import IO

    from simulated_engine import Deployment

COMMAND = (sys.executable, "-m", "areal_vllm_ext.cli")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with code 1 and one line."""
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("areal-vllm: ")
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    return said.err


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        yield server


def address_of(server: socket.socket) -> str:
    return f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def silent_address(silent: socket.socket) -> str:
    return address_of(silent)


# Keys


def test_keygen_writes_a_key_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.key"
    assert main(["keygen", str(path)]) == 0
    assert "AREAL_VLLM_KEY_FILE" in capsys.readouterr().out
    assert path.stat().st_mode & 0o777 == 0o600
    assert "exists already" in refused(capsys, "keygen", str(path))


def test_keygen_says_why_it_cannot_write(capsys: pytest.CaptureFixture[str]) -> None:
    assert "/proc/cluster.key" in refused(capsys, "keygen", "/proc/cluster.key")


def test_a_key_that_others_can_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.key"
    security.write_key(path)
    path.chmod(0o644)
    line = refused(capsys, "status", "--connect", free_address(), "--key-file", str(path))
    assert f"chmod 600 {path}" in line


# Addresses


def test_a_missing_directory_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    address = free_address()
    for command in (["status"], ["pause"], ["resume"], ["update", "--from", ".", "--to-version", "1"]):
        line = refused(capsys, *command, "--connect", address, "--timeout", "0.5")
        assert address in line
        assert "nothing listens there" in line


def test_an_address_off_loopback_needs_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert "AREAL_VLLM_KEY_FILE" in refused(capsys, "status", "--connect", "tcp://192.0.2.1:29700")


@pytest.mark.parametrize(
    "address", ["192.0.2.1:29700", "tcp://host", "tcp://host:port", "http://host:1", "tcp://-:1", "tcp://\0:1"]
)
def test_a_bad_address_says_how_to_write_one(capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert "tcp://host:port" in refused(capsys, "status", "--connect", address)
    assert "tcp://host:port" in refused(capsys, "directory", address)


@pytest.mark.parametrize(
    "host",
    ["256.1.1.1", "no-such-host.invalid", "[fe80::1%nope]", "0.0.0.0", "255.255.255.255", "[::]", "1", "h--", "h_."],
)
def test_an_address_that_leads_nowhere_is_one_line_within_the_timeout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    key_file = tmp_path / "cluster.key"
    security.write_key(key_file)
    started = time.monotonic()
    line = refused(capsys, "status", "--connect", f"tcp://{host}:1", "--key-file", str(key_file), "--timeout", "0.4")
    assert f"tcp://{host}:1" in line
    assert time.monotonic() - started < 1.0


def test_directory_says_which_address_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused(capsys, "directory", f"tcp://127.0.0.1:{port}")


# Options


@pytest.mark.parametrize(
    "arguments",
    [
        ["update", "--from", "x"],
        ["status", "--timeout", "nan"],
        ["status", "--timeout", "inf"],
        ["status", "--timeout", "0"],
        ["status", "--timeout=-1"],
        ["status", "--timeout", "1e300"],
        ["status", "--timeout", "soon"],
        ["status", "--engines", "0"],
        ["status", "--engines", "1.5"],
        ["pause", "--mode", "stop"],
        ["launch", "m", "--nodes", "0"],
        ["demo", "--steps", "0"],
        ["no-such-command"],
        [],
    ],
)
def test_a_wrong_command_line_is_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "pause", "resume"])
def test_the_timeout_is_kept(command: str, silent_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    def seconds(timeout: float) -> float:
        started = time.monotonic()
        refused(capsys, command, "--connect", silent_address, "--timeout", str(timeout))
        return time.monotonic() - started

    for timeout in (0.3, 0.9):
        # A busy machine may stall one try for longer.
        tries = [took := seconds(timeout)]
        while took >= timeout + 0.5 and len(tries) < 3:
            tries.append(took := seconds(timeout))
        assert timeout - 0.05 <= min(tries) < timeout + 0.5, tries


def test_status_takes_a_timeout_above_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    key = security.user_key()
    security.ZapAuthenticator(context, key)
    mute = Server(context, "127.0.0.1", 0, key, directory_decoder, 1 << 16)  # it lets clients in, and never answers
    try:
        started = time.monotonic()
        refused(capsys, "status", "--connect", mute.address, "--timeout", "5.6")
        assert 5.5 <= time.monotonic() - started < 6.1
    finally:
        mute.socket.close()
        context.term()


# Files of settings


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "there is no model; add MODEL to the command line, or 'model:' to "),
        ("- model: m", "it holds a list, not a mapping"),
        ("just text", "it holds a str, not a mapping"),
        ("5", "it holds a int, not a mapping"),
        ("1: 2", "not a mapping of settings"),
        ("{model: m, placement: text}", "placement is 'text', not a mapping"),
        ("{model: m, placement: [1]}", "placement is [1], not a mapping"),
        ("{model: m, placement: {kind: near}}", "Invalid enum value 'near'"),
        ("{model: m, placement: {bundles: many}}", "Expected `int`, got `str` - at `$.placement.bundles`"),
        ("{model: m, placement: {1: 2}}", "at `key` in `$.placement`"),
        ("{model: m, placement: {group: g}}", "placement.group"),
        ("{model: [m]}", "Expected `str`, got `array` - at `$.model`"),
        ("{model: m, modell: m}", "unknown field `modell`"),
        ("{model: m, timeout: .nan}", "timeout"),
        ("{model: m, timeout: .inf}", "timeout"),
        ("{model: m, timeout: -1}", "timeout"),
        ("{model: m, max_restarts: -1}", "max_restarts"),
        ("{model: m, placement: {bundles: -1, devices: -1}}", "placement"),
        ("{model: m, placement: {worker_share: 7}}", "worker_share"),
        ("{model: m, name: ../x}", "name"),
        ('{model: "a\\0b"}', "model"),
        ('{model: m, env: {A: "a\\0b"}}', "env"),
        ('{model: m, env: {"A=B": "c"}}', "env"),
        ("{model: m", "it is not YAML"),
        ("model: !!python/object:os.system m", "it is not YAML"),
        ("model: &a [*a]", "replica.yaml: "),
        ("a: &a [x,x]\nb: &b [*a,*a]\nmodel: m", "unknown field"),
        ("[" * 5000, "it is not YAML"),
        ("model: \x00", "it is not YAML"),
        ("model: 2001-99-99", "it is not YAML"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str) -> None:
    (tmp_path / "replica.yaml").write_text(text)
    line = refused(capsys, "launch", "--config", str(tmp_path / "replica.yaml"))
    assert says in line
    assert "replica.yaml" in line


@pytest.mark.parametrize("path", ["/no/such/file", "/", "/proc/self/mem", "a\0b", "x" * 5000])
def test_a_file_that_cannot_be_read_is_named(capsys: pytest.CaptureFixture[str], path: str) -> None:
    refused(capsys, "launch", "--config", path)


def test_launch_without_a_model_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "launch: there is no model; add MODEL to the command line, or --config FILE" in refused(capsys, "launch")


# Help


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (one for one in build()._actions if isinstance(one, argparse._SubParsersAction))
    return dict(action.choices)


def test_help_is_plain_text_and_every_option_is_described() -> None:
    for name, parser in {"": build(), **subcommands()}.items():
        text = parser.format_help()
        assert not re.search(r"``|:(class|meth|func):", text), name
        assert parser.description, name
        assert "exit codes:" in text
        assert all(action.help for action in parser._actions if action.option_strings), name


def test_help_says_defaults_units_and_that_a_pause_has_no_lease() -> None:
    commands = subcommands()
    for name, default in (("status", "5"), ("pause", "60"), ("resume", "60"), ("update", "300"), ("verify", "300")):
        text = " ".join(commands[name].format_help().split())
        assert f"--timeout SECONDS time for the whole command (default: {default}" in text
    assert "no lease" in commands["pause"].format_help()
    for name, parser in commands.items():
        assert ("\n  3  " in parser.format_help()) == (name in ("status", "verify"))


# Imports


@pytest.mark.parametrize("command", ["status", "pause", "resume", "keygen", "directory", "help"])
def test_control_commands_import_no_torch(command: str, tmp_path: Path) -> None:
    arguments = {
        "keygen": ["keygen", str(tmp_path / "key")],
        "directory": ["directory", "tcp://192.0.2.1:1"],
        "help": ["--help"],
    }.get(command, [command, "--timeout", "0.3", "--connect", free_address()])
    script = f"""
import sys
from areal_vllm_ext.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
heavy = {{"torch", "numpy", "ray", "rich", "vllm", "transformers"}} & set(sys.modules)
assert "argparse" in sys.modules and not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_module_that_is_not_installed_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torch":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.delattr("areal_vllm_ext.demo", raising=False)  # if another test has imported it
    removed = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("areal_vllm_ext.demo")}
    torch = sys.modules.pop("torch", None)
    sys.meta_path.insert(0, Missing())  # type: ignore[arg-type]
    try:
        assert "torch is not installed; run: pip install" in refused(capsys, "demo")
    finally:
        sys.meta_path.pop(0)
        sys.modules.update(removed)
        if torch:
            sys.modules["torch"] = torch


# Output


def test_status_prints_a_table_and_json(
    deployment: Deployment, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--connect", deployment.directory, "--key-file", str(key_file)]
    assert main(["status", "--engines", "2", *where, "--timeout", "20"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert re.split(r"\s\s+", head) == [
        "replica",
        "DP rank",
        "node",
        "role",
        "version",
        "generation",
        "update phase",
        "requests",
    ]
    assert len(rows) == 2
    assert all("running" in row and "idle" in row for row in rows)
    assert main(["status", *where, "--json"]) == 0
    states = json.loads(capsys.readouterr().out)
    assert [state["dp_rank"] for state in states] == [0, 1]


def test_pause_and_resume(deployment: Deployment, key_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--connect", deployment.directory, "--key-file", str(key_file)]
    assert main(["pause", *where]) == 0
    assert capsys.readouterr().out == "2 engines are paused\n"
    assert not any(engine.running for engine in deployment.engines.values())
    assert main(["resume", "--json", *where]) == 0
    assert json.loads(capsys.readouterr().out) == {"resumed": 2}
    assert all(engine.running for engine in deployment.engines.values())


@pytest.mark.parametrize(("text", "version"), [("5", 5), ("0", 0), ("007", "007"), ("step-5", "step-5"), ("٣", "٣")])
def test_a_version_of_digits_is_a_number(text: str, version: object) -> None:
    assert build().parse_args(["update", "--from", ".", "--to-version", text]).to_version == version


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_standard_stream_that_is_closed_is_no_traceback(tmp_path: Path, closed: str) -> None:
    command = f'"{sys.executable}" -m areal_vllm_ext.cli keygen "{tmp_path}/k" {closed}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_text_that_is_nested_too_deep_for_json_is_text() -> None:
    text = "[" * 100_000
    assert _json_or_text(text) == text


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    script = f"exec {sys.executable} -m areal_vllm_ext.cli --help > /dev/full"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in ended.stderr
    reader = subprocess.Popen(
        [*COMMAND, "keygen", str(tmp_path / "key")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert reader.stdout
    assert reader.stderr
    reader.stdout.close()
    with reader.stderr:
        assert reader.stderr.read() == b""
    assert reader.wait(30) == 1


# Signals


def run_and_send(number: int, arguments: list[str], wait: Callable[[IO[str]], object]) -> tuple[int, str]:
    """Run a command as a shell does, send it a signal after ``wait(output)``, and return exit code and standard error."""
    script = "print(flush=True); import sys; from areal_vllm_ext.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()  # Python itself has started
    wait(process.stdout)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode, said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_waiting_command_with_its_code(silent: socket.socket, number: int, code: int) -> None:
    for command in ("status", "pause", "resume"):
        arguments = [command, "--connect", address_of(silent), "--timeout", "30"]
        with contextlib.ExitStack() as connections:
            ended = run_and_send(number, arguments, lambda _: connections.enter_context(silent.accept()[0]))
        assert ended == (code, "areal-vllm: interrupted\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_directory_with_its_code(number: int, code: int) -> None:
    arguments = ["directory", free_address()]
    assert run_and_send(number, arguments, lambda output: output.readline()) == (code, "areal-vllm: interrupted\n")


def test_ctrl_c_at_any_moment_is_code_130(silent_address: str) -> None:
    moments = random.Random(7)
    for command in (["status", "--connect", silent_address, "--timeout", "30"], ["directory", free_address()]):
        for _ in range(6):
            moment = moments.uniform(0.0, 0.6)
            code, said = run_and_send(signal.SIGINT, command, lambda _, moment=moment: time.sleep(moment))
            assert code == 130, said
            assert "Traceback" not in said or ", in main\n" not in said, said


def test_ctrl_c_waits_until_the_messages_are_imported() -> None:
    """msgspec may end the process (SIGSEGV) when a signal comes while it makes a decoder."""
    script = """
import os, signal, sys
from areal_vllm_ext.cli import main

class Interrupts:
    def find_spec(self, name, *_):
        if name == "areal_vllm_ext.protocol.answers":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
assert main(["status"]) == 130
assert "areal_vllm_ext.protocol.answers" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_second_ctrl_c_prints_no_traceback(silent: socket.socket) -> None:
    arguments = [*COMMAND, "pause", "--connect", address_of(silent), "--timeout", "30"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    with silent.accept()[0]:
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
    _, said = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in said
