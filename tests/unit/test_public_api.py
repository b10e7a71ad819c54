"""What is exported, what a type checker sees of it, and what it imports."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import areal_vllm_ext
from areal_vllm_ext import AsyncEngineGroup, EngineGroup
from areal_vllm_ext.client.options import Options, UpdateOptions, checked_seconds, checked_version
from areal_vllm_ext.errors import SettingsError

HEAVY = ("torch", "numpy", "vllm", "rich", "transformers")


def heavy_imports_of(code: str) -> set[str]:
    """The heavy packages that a new interpreter has imported after ``code``."""
    show = f"import sys; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import areal_vllm_ext",
        "from areal_vllm_ext import EngineGroup; EngineGroup.connect().close()",
        "from areal_vllm_ext import AsyncEngineGroup, EngineInfo, EngineState, UpdateOptions, UpdateResult, ArealError",
        "import areal_vllm_ext.control.directory_server",
        "import areal_vllm_ext.plugin",
    ],
)
def test_the_control_plane_never_imports_torch(code: str) -> None:
    assert heavy_imports_of(code) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "--timeout", "0.2"],
        ["status", "--engines", "2", "--timeout", "0.2"],
        ["pause", "--timeout", "0.2"],
        ["resume", "--timeout", "0.2"],
        ["keygen", "/proc/nowhere/cluster.key"],
        ["--help"],
    ],
)
def test_commands_of_the_control_plane_never_import_torch(arguments: list[str]) -> None:
    code = f"""
import contextlib
from areal_vllm_ext import cli
with contextlib.suppress(SystemExit):
    cli.main({arguments!r})
"""
    assert heavy_imports_of(code) == set()


def test_every_exported_name_is_there() -> None:
    assert dir(areal_vllm_ext) == sorted(areal_vllm_ext.__all__)
    for name in areal_vllm_ext.__all__:
        assert getattr(areal_vllm_ext, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        areal_vllm_ext.Nonsense  # noqa: B018


# Both clients

METHODS = {
    "call",
    "close",
    "connect",
    "engines",
    "forget",
    "pause",
    "resume",
    "sleep",
    "status",
    "update",
    "update_weights",
    "verify",
    "wake_up",
    "wake_up_with",
    "wait_ready",
}
# Collectives block the calling thread, so a trainer of several ranks needs the blocking client.
OF_SEVERAL_RANKS = {"process_group", "senders"}


@pytest.mark.parametrize("client", [EngineGroup, AsyncEngineGroup])
def test_a_client_shows_its_public_methods_only(client: type) -> None:
    shown = {name for name in dir(client.connect()) if not name.startswith("_")}
    assert shown == METHODS


@pytest.mark.parametrize("name", sorted(METHODS))
def test_both_clients_take_the_same_arguments(name: str) -> None:
    def arguments(client: type) -> list[tuple[str, object, object]]:
        parameters = inspect.signature(getattr(client, name)).parameters.values()
        return [(one.name, one.kind, one.default) for one in parameters if one.name not in OF_SEVERAL_RANKS]

    assert arguments(EngineGroup) == arguments(AsyncEngineGroup)


def test_every_method_says_what_it_does() -> None:
    for client in (EngineGroup, AsyncEngineGroup):
        for name in METHODS:
            assert len((getattr(client, name).__doc__ or "").splitlines()[0]) > 20


# Arguments are checked when they are given


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), 1e300, 10**400])
def test_a_timeout_that_no_clock_has_is_refused(seconds: float) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^timeout must be "):
        EngineGroup.connect().update(1, timeout=seconds)
    with EngineGroup.connect() as group:
        for call in (group.pause, group.resume, group.status, group.engines, group.wait_ready, group.verify):
            with pytest.raises((TypeError, ValueError), match=r"^timeout must be "):
                call(timeout=seconds)


@pytest.mark.parametrize("value", [None, "soon", "5", [1], True])
def test_a_timeout_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"^timeout must be a number of seconds, not "):
        checked_seconds(value)  # type: ignore[arg-type]


class Integer:
    """As numpy's integers."""

    def __index__(self) -> int:
        return 7


@pytest.mark.parametrize(("given", "version"), [(3, 3), ("step 3", "step 3"), (Integer(), 7), (-(2**63), -(2**63))])
def test_versions_are_integers_or_strings(given: object, version: object) -> None:
    assert checked_version(given) == version


@pytest.mark.parametrize("given", [None, True, 1.5, b"1", 2**63, -(2**63) - 1, "", "x" * 4097, "\ud800"])
def test_other_versions_are_refused(given: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^version must "):
        EngineGroup.connect().update(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda group: group.sleep(True), "level must be one of 1, 2, not True"),
        (lambda group: group.forget("r", -1), "dp_rank must be from 0 to 2147483647, not -1"),
        (lambda group: group.forget("r", 10**20), "dp_rank must be from 0 to 2147483647, not 1000"),
        (lambda group: group.wait_ready(True), "engines must be an integer, not True"),
        (lambda group: group.verify(5), "checkpoint must be a path, not 5"),
        (lambda _: EngineGroup.connect(b"tcp://127.0.0.1:1"), "b'tcp://127.0.0.1:1' is not an address"),  # type: ignore[arg-type]
        (lambda _: EngineGroup.connect(key_file=3), "key_file must be a path, not 3"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_named(call: Callable[[EngineGroup], object], message: str) -> None:
    with EngineGroup.connect() as group, pytest.raises((TypeError, ValueError, SettingsError), match=message):
        call(group)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transport": "nccl"}, "transport must be one of 'auto', 'broadcast', 'ipc', 'shared_memory', not 'nccl'"),
        ({"mode": "stop"}, "mode must be one of 'abort', 'wait', 'keep', not 'stop'"),
        ({"kv": "drop"}, "kv must be one of 'recompute', 'keep', 'reuse', not 'drop'"),
        ({"staging": "disk"}, "staging must be one of .*, not 'disk'"),
        ({"bucket_mib": 1.5}, "bucket_mib must be an integer, not 1.5"),
        ({"bucket_mib": True}, "bucket_mib must be an integer, not True"),
        ({"bucket_mib": 0}, "bucket_mib must be above 0, not 0"),
        ({"keep_buffers": 1}, "keep_buffers must be True or False, not 1"),
        ({"drop_lost": "yes"}, "drop_lost must be True or False, not 'yes'"),
        ({"on_phase": "print"}, "on_phase must be a function of the phase's name, not 'print'"),
        ({"trace": True}, "trace must be a path, not True"),
        ({"dedline": 5}, "an update has no option 'dedline'; its options are transport, "),
    ],
)
def test_wrong_options_are_named_before_anything_is_sent(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        EngineGroup.connect().update(1, **options)  # type: ignore[arg-type]


def test_options_that_are_none_are_left_out(tmp_path: Path) -> None:
    for options in ({"on_phase": None, "trace": None}, {"trace": tmp_path / "update.json"}, {"trace": "update.json"}):
        EngineGroup.connect().update(1, **options)  # type: ignore[arg-type]


def test_every_option_has_its_default_in_one_place() -> None:
    fields = set(inspect.signature(Options).parameters) - {"timeout"}
    assert {name.replace("mib", "bytes") for name in UpdateOptions.__annotations__} == fields


# A type checker

RIGHT = """
from areal_vllm_ext import AsyncEngineGroup, EngineGroup, EngineState, UpdateResult

def work(group: EngineGroup) -> UpdateResult:
    group.pause("wait", kv="recompute", timeout=5, lease=None)
    states: list[EngineState] = group.status()
    print(states[0].generation, states[0].update_phase)
    with group.update(1, timeout=60, transport="ipc", staging="host", trace="/tmp/trace.json") as update:
        update.send({}, dtype="bfloat16")
    return group.update_weights("/checkpoint", version="step 2", timeout=60, mode="keep", bucket_mib=64)

async def same(group: AsyncEngineGroup) -> UpdateResult:
    async with group.update(1, timeout=60, kv="keep") as update:
        await update.send({})
    return await group.update_weights({}, version=2, drop_lost=True)
"""
WRONG = {
    "group.update(1, dedline=60)": 'Unexpected keyword argument "dedline"',
    "group.update(1, deadline=60)": 'Unexpected keyword argument "deadline"',
    'group.update(1, transport="nccl")': "incompatible type \"Literal['nccl']\"",
    'group.update(1, staging="disk")': "incompatible type",
    'group.update(1, timeout="soon")': 'incompatible type "str"; expected "float"',
    "group.update_weights({}, version=1, dedline=60)": 'Unexpected keyword argument "dedline"',
    'group.update_weights({}, version=1, transport="nccl")': "incompatible type",
    "group.update_weights({})": 'Missing named argument "version"',
    'group.update_weights({}, version=1, senders="all")': "incompatible type",
    'group.pause("stop")': "incompatible type",
    "group.pause(deadline=5)": 'Unexpected keyword argument "deadline"',
    "group.status()[0].phase": '"EngineState" has no attribute "phase"',
    "same.update(1, dedline=60)": 'Unexpected keyword argument "dedline"',
    'same.update_weights({}, version=1, transport="nccl")': "incompatible type",
    "same.update_weights({}, version=1, process_group=None)": 'Unexpected keyword argument "process_group"',
}


# `make lint` checks the package itself. The types of what is skipped here cost 20 s, and no call above needs them.
MYPY = """
[mypy]
mypy_path = {package}
strict = True
follow_imports = silent

[mypy-torch.*,peft.*,numpy.*,safetensors.*,zmq.*,vllm.*,transformers.*,ray.*]
follow_imports = skip
follow_imports_for_stubs = True
"""


def test_a_type_checker_finds_wrong_calls_and_accepts_right_ones(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy.api")
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(RIGHT)
    heads = [
        "from areal_vllm_ext import AsyncEngineGroup, EngineGroup",
        "def f(group: EngineGroup, same: AsyncEngineGroup) -> None:",
    ]
    wrong.write_text("\n".join([*heads, *(f"    {call}" for call in WRONG)]) + "\n")
    (tmp_path / "mypy.ini").write_text(MYPY.format(package=Path(areal_vllm_ext.__file__).parent.parent))
    options = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", os.devnull]
    said, problems, _ = mypy.run([*options, str(right), str(wrong)])
    assert not problems
    lines = [line.partition("wrong.py:")[2] for line in said.splitlines() if ": error: " in line]
    assert "right.py" not in said, said
    for number, (call, message) in enumerate(WRONG.items(), start=1 + len(heads)):
        own = [line for line in lines if line.startswith(f"{number}: ")]
        assert any(message in line for line in own), (call, own, said)
