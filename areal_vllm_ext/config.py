"""Settings: ``AREAL_VLLM_*`` variables first, then ``--additional-config '{"areal": {...}}'``, then defaults.

vLLM hashes ``--additional-config`` into its compile cache key. So settings that differ between nodes or runs (addresses,
ports) belong into environment variables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import re
from collections.abc import Mapping
from typing import Any

from .errors import SettingsError

DEFAULT_DIRECTORY_PORT = 29700
ENV_PREFIX = "AREAL_VLLM_"

# ZeroMQ refuses other names, and would take some other texts for something else.
_ADDRESS = re.compile(
    r"tcp://(?:\[(?P<ipv6>[0-9a-fA-F:.]+(?:%[A-Za-z0-9_.-]+)?)\]|(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{0,252})):(?P<port>[0-9]{1,5})"
)
_MAX_NAME_CHARACTERS = 256
_RANGES = {"port": (0, 65_535), "max_message_mib": (1, 1024)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of an engine; a client uses ``key_file``, ``directory`` and ``max_message_mib`` only.

    Attributes:
        key_file: the cluster's key (``areal-vllm keygen``). Without one, this user's key is used, on loopback only.
        directory: ``tcp://host:port`` of the directory. Default: port 29700 of vLLM's ``--data-parallel-address``.
        host: address of this node that the endpoint binds to. Default: the one from which the directory is reached.
        port: the endpoint's port; 0 takes a free one.
        replica: name of this vLLM deployment. Default: address and RPC port of its data-parallel head.
        trainer_lost: what engines do that a lost trainer left paused: ``resume``, or ``stay_paused`` until the next trainer.
        peers: ``on``: this engine fetches its group's weights from a peer when it comes back, and offers its own to others. Or
            ``off``.
        max_message_mib: upper bound of a message, in MiB; a longer one ends its sender's connection.
    """

    key_file: str | None = None
    directory: str | None = None
    host: str | None = None
    port: int = 0
    replica: str | None = None
    trainer_lost: str = "resume"
    peers: str = "on"
    max_message_mib: int = 16

    @property
    def resume_orphans(self) -> bool:
        """Whether engines resume that a lost trainer left paused."""
        return self.trainer_lost == "resume"

    @property
    def fetches(self) -> bool:
        """Whether this engine fetches weights from peers, and offers its own."""
        return self.peers == "on"

    @classmethod
    def load(
        cls, additional_config: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ
    ) -> Settings:
        """Read the settings of this process.

        Args:
            additional_config: vLLM's ``--additional-config``.
            environ: environment variables.

        Raises:
            SettingsError: a name is unknown, or a value is not what the setting takes.
        """
        given = (additional_config or {}).get("areal", {})
        if not isinstance(given, Mapping):
            raise SettingsError(
                f'--additional-config: "areal" is {given!r}, not an object; write {{"areal": {{"key_file": "..."}}}}'
            )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := [name for name in given if name not in fields]:
            raise SettingsError(
                f'--additional-config: "areal" has no setting {unknown[0]!r}; known are {", ".join(fields)}'
            )
        values: dict[str, Any] = {}
        for name, field in fields.items():
            parse = _number if field.type == "int" else _text
            if text := environ.get(variable := ENV_PREFIX + name.upper()):
                values[name] = parse(variable, name, text)
            elif name in given:
                values[name] = parse(f"--additional-config: areal.{name}", name, given[name])
        return cls(**values)


def _number(source: str, name: str, value: object) -> int:
    least, most = _RANGES[name]
    with contextlib.suppress(ValueError):
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            number = int(value)
            if least <= number <= most:
                return number
    raise SettingsError(f"{source}: {value!r} is not a whole number from {least} to {most}")


def _text(source: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise SettingsError(f'{source}: {value!r} is not a string; write "{name}": "..."')
    if not value.isprintable():
        raise SettingsError(f"{source}: {value!r} has control characters; remove them")
    if name == "trainer_lost" and value not in ("resume", "stay_paused"):
        raise SettingsError(f"{source}: {value!r} is neither resume nor stay_paused; write one of them")
    if name == "peers" and value not in ("on", "off"):
        raise SettingsError(f"{source}: {value!r} is neither on nor off; write one of them")
    if name == "replica" and not 0 < len(value) <= _MAX_NAME_CHARACTERS:
        raise SettingsError(f"{source}: the name has {len(value)} characters; use 1 to {_MAX_NAME_CHARACTERS}")
    if name == "directory":
        split_address(value)
    return value


def split_address(address: object) -> tuple[str, int]:
    """Return host and port of ``tcp://host:port``.

    Raises:
        SettingsError: the text is no such address.
    """
    if isinstance(address, str) and (found := _ADDRESS.fullmatch(address)) and 0 < int(found["port"]) <= 65_535:
        if found["name"]:
            return found["name"], int(found["port"])
        with contextlib.suppress(ValueError):
            ipaddress.IPv6Address(found["ipv6"])
            return found["ipv6"], int(found["port"])
    raise SettingsError(f"{address!r} is not an address; write it as tcp://host:port (IPv6: tcp://[address]:port)")
