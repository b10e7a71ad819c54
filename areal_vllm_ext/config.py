"""Settings: ``AREAL_VLLM_*`` variables first, then ``--additional-config '{"areal": {...}}'``, then defaults.

vLLM hashes ``--additional-config`` into its compile cache key, so what differs from node to node or from run to run
(addresses, ports) belongs into environment variables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from .errors import SettingsError

DEFAULT_DIRECTORY_PORT = 29700
ENV_PREFIX = "AREAL_VLLM_"


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of an engine; a client uses ``key_file`` and ``directory`` only.

    Attributes:
        key_file: the cluster's key (``areal-vllm keygen``). Without one only loopback is served, with a key of this user.
        directory: ``tcp://host:port`` of the directory. Default: port 29700 of vLLM's ``--data-parallel-address``.
        host: own address that the endpoint binds to. Default: the one from which the directory is reached.
        port: the endpoint's port; 0 takes a free one.
        replica: name of this vLLM deployment. Default: address and RPC port of its data-parallel head.
        trainer_lost: what happens to engines that a trainer left paused when it died: ``resume``, or ``stay_paused`` until
            the next one comes.
        max_message_mib: longest message that is read, in MiB; longer ones end the sender's connection.
    """

    key_file: str | None = None
    directory: str | None = None
    host: str | None = None
    port: int = 0
    replica: str | None = None
    trainer_lost: str = "resume"
    max_message_mib: int = 16

    @property
    def resume_orphans(self) -> bool:
        """Whether engines run again that a trainer left paused when it died."""
        return self.trainer_lost == "resume"

    @classmethod
    def load(
        cls, additional_config: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ
    ) -> Settings:
        """Read the settings of this process.

        Raises:
            SettingsError: for an unknown name or a value of the wrong type, naming it.
        """
        given = (additional_config or {}).get("areal", {})
        if not isinstance(given, Mapping):
            raise SettingsError(
                '--additional-config: "areal" must be an object, such as {"areal": {"key_file": "..."}}'
            )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(given) - set(fields)):
            raise SettingsError(
                f'--additional-config: "areal" has no setting {unknown[0]!r}; known: {", ".join(fields)}'
            )
        values: dict[str, Any] = dict(given)
        for name in fields:
            if text := environ.get(ENV_PREFIX + name.upper()):
                values[name] = text
        for name, value in values.items():
            if fields[name].type == "int":
                try:
                    values[name] = int(value)
                except (TypeError, ValueError):
                    raise SettingsError(f"setting {ENV_PREFIX}{name.upper()} must be a number, not {value!r}") from None
            elif not isinstance(value, str):
                raise SettingsError(f"--additional-config: areal.{name} must be a string, not {value!r}")
        settings = cls(**values)
        if settings.trainer_lost not in ("resume", "stay_paused"):
            raise SettingsError(
                f"{ENV_PREFIX}TRAINER_LOST must be resume or stay_paused, not {settings.trainer_lost!r}"
            )
        return settings


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``tcp://host:port``.

    Raises:
        SettingsError: where it is none.
    """
    with contextlib.suppress(ValueError):
        parts = urlsplit(address)
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return parts.hostname, parts.port
    raise SettingsError(f"{address!r} is not an address; write it as tcp://host:port")
