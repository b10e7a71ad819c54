"""Which methods of a worker ``group.call`` does not reach, and what to call instead. For both ends of a call."""

from __future__ import annotations

_UPDATE = "use group.update_weights(...)"
_SLEEP = "use group.sleep(...) and group.wake_up(...)"
_ADAPTER = "use group.update_weights(adapters=...)"
_INSTEAD = {
    "add_lora": _ADAPTER,
    "execute_model": "send a request to the engine",
    "finish_weight_update": _UPDATE,
    "init_weight_transfer_engine": _UPDATE,
    "load_model": _UPDATE,
    "load_weights": _UPDATE,
    "reload_weights": _UPDATE,
    "remove_lora": _ADAPTER,
    "reset_weights": _UPDATE,
    "shutdown": "stop the engine's server",
    "sleep": _SLEEP,
    "start_draft_weight_update": _UPDATE,
    "start_weight_update": _UPDATE,
    "update_weights": _UPDATE,
    "wake_up": _SLEEP,
}


def refusal(method: str) -> str:
    """Return why a call must not reach the method with this name, and what to do; empty if it may."""
    if not method.isidentifier():
        return f"{method!r} is no name of a method"
    if method.startswith("_"):
        return f"{method} is private, because its name begins with an underscore: give it a public name"
    if method.startswith("areal_"):
        return f"{method} belongs to areal_vllm_ext: give your method another name"
    if instead := _INSTEAD.get(method):
        return f"{method} belongs to vLLM, and would act past this package: {instead}"
    return ""
