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
        text = "77" if isinstance(default, int) else "stay_paused" if name == "trainer_lost" else "text"
        loaded = Settings.load(None, {f"AREAL_VLLM_{name.upper()}": text})
        assert str(getattr(loaded, name)) == text


@pytest.mark.parametrize(
    ("config", "environ", "message"),
    [
        ({"areal": {"prot": 1}}, {}, r"no setting 'prot'; known: .*port"),
        ({"areal": [1]}, {}, "must be an object"),
        ({"areal": {"replica": 3}}, {}, r"areal\.replica must be a string, not 3"),
        ({"areal": {"port": "x"}}, {}, "AREAL_VLLM_PORT must be a number, not 'x'"),
        ({}, {"AREAL_VLLM_TRAINER_LOST": "panic"}, "must be resume or stay_paused, not 'panic'"),
        ({}, {"AREAL_VLLM_MAX_MESSAGE_MIB": "much"}, "AREAL_VLLM_MAX_MESSAGE_MIB must be a number, not 'much'"),
    ],
)
def test_a_wrong_setting_is_named(config: dict[str, Any], environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.load(config, environ)


@pytest.mark.parametrize(
    ("address", "parts"), [("tcp://10.0.0.1:29700", ("10.0.0.1", 29700)), ("tcp://[fd00::1]:1", ("fd00::1", 1))]
)
def test_an_address_is_tcp_host_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address", ["", "10.0.0.1:29700", "http://10.0.0.1:1", "tcp://10.0.0.1", "tcp://:1", "tcp://h:0", "tcp://h:99999"]
)
def test_what_is_no_address_is_refused_with_the_form_to_write(address: str) -> None:
    with pytest.raises(SettingsError, match="tcp://host:port"):
        split_address(address)
    with pytest.raises(SettingsError, match="tcp://host:port"):
        EngineGroup.connect(address)
