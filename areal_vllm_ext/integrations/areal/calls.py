"""The bodies of AReaL's calls, checked. Nothing here imports torch or vLLM."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from ...protocol import TensorMeta

Size = Annotated[int, msgspec.Meta(ge=0)]
AdapterName = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Call = TypeVar("Call", bound=msgspec.Struct)


class Refused(Exception):
    """A call that is answered with status 400; the message says what to do."""


def one_line(error: BaseException) -> str:
    """Return what went wrong, as AReaL's log shows it."""
    return " ".join((str(error) or type(error).__name__).split())


class Init(msgspec.Struct, frozen=True):
    """``/areal_init_weights_update_group``."""

    master_address: str
    master_port: str
    rank_offset: Annotated[int, msgspec.Meta(ge=1)]
    world_size: Annotated[int, msgspec.Meta(ge=2, le=2**16)]
    backend: Literal["gloo", "nccl"]
    group_name: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class Meta(msgspec.Struct, frozen=True):
    """``/areal_set_update_weight_meta``."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[Size]]
    group_name: str

    def tensors(self) -> list[TensorMeta]:
        return [
            TensorMeta(name, dtype.removeprefix("torch."), tuple(shape))
            for name, dtype, shape in zip(self.names, self.dtypes, self.shapes, strict=True)
        ]


class AdapterMeta(Meta, frozen=True):
    """``/areal_set_update_weight_meta_lora``, and the same again as ``/areal_update_weights_lora_xccl``."""

    lora_name: AdapterName
    lora_rank: Annotated[int, msgspec.Meta(ge=1)]
    lora_alpha: float
    lora_target_modules: list[str] | str
    lora_bias: str = "none"

    def tensors(self) -> list[TensorMeta]:
        """Return them under the names that peft saves: its modules have the name of their adapter in theirs."""
        metas = Meta.tensors(self)
        return [msgspec.structs.replace(meta, name=meta.name.replace(".default.weight", ".weight")) for meta in metas]

    @property
    def config(self) -> dict[str, Any]:
        """peft's configuration."""
        return {
            "peft_type": "LORA",
            "r": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "target_modules": self.lora_target_modules,
            "bias": self.lora_bias,
        }


class Disk(msgspec.Struct, frozen=True):
    """``/areal_update_weights``."""

    model_path: Annotated[str, msgspec.Meta(min_length=1)]


class LoadAdapter(msgspec.Struct, frozen=True):
    """``/v1/load_lora_adapter``. The name is ``{adapter}-v{N}``, and so is that of the model in requests."""

    lora_path: Annotated[str, msgspec.Meta(min_length=1)]
    lora_name: AdapterName


class LoadAdapterForAreal(msgspec.Struct, frozen=True):
    """``/areal_update_weights_lora``: the same under another name."""

    lora_model_path: Annotated[str, msgspec.Meta(min_length=1)]
    lora_name: AdapterName


class UnloadAdapter(msgspec.Struct, frozen=True):
    """``/v1/unload_lora_adapter``."""

    lora_name: AdapterName


def decode(kind: type[Call], body: bytes) -> Call:
    """Decode a body; fields that are not known are ignored, as AReaL's own server does.

    Raises:
        Refused: the body is not what the call takes.
    """
    try:
        call = msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f"the body is not what this route takes: {error}") from None
    if isinstance(call, Meta) and not len(call.names) == len(call.dtypes) == len(call.shapes) > 0:
        raise Refused(
            f"{len(call.names)} names, {len(call.dtypes)} dtypes and {len(call.shapes)} shapes were announced: "
            "announce one of each for every tensor"
        )
    return call
