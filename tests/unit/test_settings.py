"""Settings: where they come from, and what is said about wrong ones."""

from __future__ import annotations

from typing import Any

import pytest

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.config import Settings, split_address
from areal_vllm_ext.errors import SettingsError


def test_a_plain_engine_needs_no_setting() -> None:
    assert Settings.load(None, {}) == Settings()
    assert Settings.load({"other": 1}, {}) == Settings()


def test_a_variable_wins_over_additional_config_and_that_over_the_default() -> None:
    config = {"areal": {"replica": "from-config", "port": 7}}
    settings = Settings.load(config, {"AREAL_VLLM_REPLICA": "from-variable", "AREAL_VLLM_HOST": ""})
    assert settings == Settings(replica="from-variable", port=7)


def test_every_setting_has_a_variable() -> None:
    for name, default in vars(Settings()).items():
        special = {"trainer_lost": "stay_paused", "peers": "off", "directory": "tcp://host:1"}
        text = "77" if isinstance(default, int) else special.get(name, "text")
        loaded = Settings.load(None, {f"AREAL_VLLM_{name.upper()}": text})
        assert str(getattr(loaded, name)) == text


@pytest.mark.parametrize(
    ("config", "environ", "message"),
    [
        ({"areal": {"prot": 1}}, {}, r"no setting 'prot'; known are .*port"),
        ({"areal": [1]}, {}, r"is \[1\], not an object"),
        ({"areal": {"replica": 3}}, {}, r"areal\.replica: 3 is not a string"),
        ({"areal": {"port": "x"}}, {}, "areal.port: 'x' is not a whole number from 0 to 65535"),
        (
            {},
            {"AREAL_VLLM_TRAINER_LOST": "panic"},
            "AREAL_VLLM_TRAINER_LOST: 'panic' is neither resume nor stay_paused",
        ),
        ({}, {"AREAL_VLLM_MAX_MESSAGE_MIB": "much"}, "AREAL_VLLM_MAX_MESSAGE_MIB: 'much' is not a whole number from 1"),
        ({}, {"AREAL_VLLM_MAX_MESSAGE_MIB": "0"}, "'0' is not a whole number from 1"),
        ({}, {"AREAL_VLLM_PORT": "65536"}, "'65536' is not a whole number"),
        ({"areal": {"port": 1.5}}, {}, "1.5 is not a whole number"),
        ({"areal": {"port": True}}, {}, "True is not a whole number"),
        ({"areal": {"port": None}}, {}, "None is not a whole number"),
        ({"areal": {"host": "a\nb"}}, {}, "has control characters"),
        ({"areal": {"key_file": "a\0b"}}, {}, "has control characters"),
        ({"areal": {"replica": "x" * 257}}, {}, "the name has 257 characters"),
        ({}, {"AREAL_VLLM_DIRECTORY": "10.0.0.1:29700"}, "tcp://host:port"),
        ({"areal": {1: 2}}, {}, "no setting 1"),
    ],
)
def test_a_wrong_setting_is_named(config: dict[str, Any], environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.load(config, environ)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("tcp://10.0.0.1:29700", ("10.0.0.1", 29700)),
        ("tcp://[fd00::1]:1", ("fd00::1", 1)),
        ("tcp://Node_7.x:65535", ("Node_7.x", 65535)),
    ],
)
def test_an_address_is_tcp_host_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address",
    [
        "",
        "10.0.0.1:29700",
        "http://10.0.0.1:1",
        "tcp://10.0.0.1",
        "tcp://:1",
        "tcp://h:0",
        "tcp://h:99999",
        "tcp://h:1/",
        "tcp://h:1?x",
        "tcp://user@h:1",
        "tcp://h h:1",
        "tcp://h\n:1",
        "tcp://h:1\n",
        "tcp://h\0:1",
        "tcp://*:1",
        "tcp://h\u00f6:1",
        "tcp://h:\u0661",
        "tcp://[::1:1",
        "tcp://[]:1",
        "tcp://[1::2::3]:1",
        "tcp://::1:1",
        "tcp://eth0;127.0.0.1:1",
        "tcp://" + "h" * 300 + ":1",
        "TCP://h:1",
        "tcp://h:+1",
        "ipc:///tmp/x",
        "tcp://-:1",
        "tcp://_h:1",
        "tcp://..:1",
    ],
)
def test_what_is_no_address_is_refused_with_the_form_to_write(address: str) -> None:
    with pytest.raises(SettingsError, match="tcp://host:port"):
        split_address(address)
    if address:
        with pytest.raises(SettingsError, match="tcp://host:port"):
            EngineGroup.connect(address)
