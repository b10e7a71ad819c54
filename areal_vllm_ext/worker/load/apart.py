"""Builds a second model beside the running one, on any thread, without a change to what generation uses.

vLLM builds models before it serves, so it sets what the whole process shares: torch's default dtype and device, and the
registers of layers by name. Here each of them is this thread's own, or a copy.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# vLLM keeps its current configuration in a global variable, so models are built one after another.
_building = threading.Lock()
# The default dtype of the thread that builds.
_own = threading.local()

# What ``loading_of`` adds to a configuration: the model that is built with it, and its prefix.
_MODEL, _PREFIX = "areal_model_config", "areal_prefix"

_REGISTERS = ("static_forward_context", "static_all_moe_layers")

# These make floating tensors of the default dtype, whatever their arguments are.
_ALWAYS = {
    torch.empty,
    torch.empty_strided,
    torch.empty_permuted,
    torch.ones,
    torch.zeros,
    torch.rand,
    torch.randn,
    torch.eye,
    torch.linspace,
    torch.logspace,
    torch.range,
    torch.scalar_tensor,
    torch.bartlett_window,
    torch.blackman_window,
    torch.hamming_window,
    torch.hann_window,
    torch.kaiser_window,
    torch.fft.fftfreq,
    torch.fft.rfftfreq,
}
# These do so if they are given Python floats.
_OF_FLOATS = {torch.arange, torch.full, torch.tensor, torch.as_tensor, torch.asarray}


class _DefaultDtype(TorchFunctionMode):
    """Gives this thread a default dtype, and calls ``step`` often.

    It does not change what operators on integers promote to. A tensor that a model computes so gets another dtype than in a
    usual load, which the comparison with the live model finds.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._step()
        kwargs = kwargs or {}
        if func in _ALWAYS or func in _OF_FLOATS:
            of_floats = func in _ALWAYS or _is_of_floats((*args[-3:], *kwargs.values()))
            if of_floats and kwargs.get("dtype") is None and kwargs.get("out") is None:
                kwargs = kwargs | {"dtype": _own.dtype}
        return func(*args, **kwargs)


def _is_of_floats(values: Any) -> bool:
    """Return whether nested lists of Python numbers have a float, and nothing else than numbers."""
    if isinstance(values, (list, tuple)):
        kinds = [_is_of_floats(value) for value in values]
        return any(kinds)
    return isinstance(values, float)


class _Device(DeviceContext):
    """Makes new tensors on a device, as ``with torch.device(...)``, but not in the sight of other threads.

    Torch's own context sets a global variable, and compiled functions guard on it: generation would compile again.
    """

    __enter__ = TorchFunctionMode.__enter__
    __exit__ = TorchFunctionMode.__exit__


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make the body's new tensors on ``device``."""
    return _Device(device)


@contextlib.contextmanager
def apart(config: Any, step: Callable[[], None] = lambda: None, timeout: float = -1) -> Iterator[Any]:
    """Let the body build a model beside the running one.

    Args:
        config: vLLM's configuration of the running model.
        step: called before each of torch's functions; it may raise.
        timeout: seconds to wait for another thread that builds; without a limit by default.

    Yields:
        the configuration to build with.

    Raises:
        TimeoutError: another thread was building until then.
    """
    from vllm.config import set_current_vllm_config

    if not _building.acquire(timeout=timeout):
        raise TimeoutError("another model was being built all the time")
    try:
        own = separate_config(config)
        with (
            _thread_default_dtype(model_config_of(config).dtype),
            set_current_vllm_config(own),
            torch.no_grad(),
            _DefaultDtype(step),
        ):
            yield own
    finally:
        _building.release()


def loading_of(config: Any, model_config: Any, prefix: str) -> Any:
    """Return a copy of vLLM's configuration with which ``model_config`` is built: a drafter beside the base model."""
    own = copy.copy(config)
    vars(own).update({_MODEL: model_config, _PREFIX: prefix})
    return own


def model_config_of(config: Any) -> Any:
    """Return vLLM's configuration of the model that is built with ``config``."""
    return vars(config).get(_MODEL, config.model_config)


def separate_config(config: Any) -> Any:
    """Return a copy of vLLM's configuration that shares no register with it, and that compiles nothing.

    Attention and MoE layers register by name, and a name only once. A compiled model would never be freed, because torch
    keeps its hooks.
    """
    from vllm.config import CompilationMode

    compilation = copy.copy(config.compilation_config)
    for name, value in vars(compilation).items():
        if isinstance(value, (dict, list, set)):
            vars(compilation)[name] = type(value)() if name in _REGISTERS else copy.copy(value)
    vars(compilation)["mode"] = CompilationMode.NONE
    own = copy.copy(config)
    vars(own)["compilation_config"] = compilation
    return own


@contextlib.contextmanager
def _thread_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Give this thread a default dtype. Others keep the process's."""
    read, write = torch.get_default_dtype, torch.set_default_dtype

    def get_default_dtype() -> torch.dtype:
        return getattr(_own, "dtype", None) or read()

    def set_default_dtype(value: torch.dtype) -> None:
        if hasattr(_own, "dtype"):
            _own.dtype = value
        else:
            write(value)

    # Torch's compiler takes its value as a constant, and does not look inside.
    get_default_dtype._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001
    _own.dtype = dtype
    torch.get_default_dtype, torch.set_default_dtype = get_default_dtype, set_default_dtype
    try:
        yield
    finally:
        torch.get_default_dtype, torch.set_default_dtype = read, write
        del _own.dtype


def load_into(model: Any, config: Any, device: torch.device, load: Callable[[Any], None]) -> None:
    """Load a new model and process what was loaded, as vLLM's own loader does.

    It collects no garbage and empties no cache, which would hold up generation.

    Args:
        model: from ``new_model``.
        config: what ``apart`` gave.
        device: the worker's.
        load: gives the model its weights.
    """
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    load(model)
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    if any(getattr(method, "uses_meta_device", False) for method in methods):  # quantised as it is loaded
        from vllm.model_executor.model_loader.reload import finalize_layerwise_processing

        finalize_layerwise_processing(model, model_config_of(config))
    process_weights_after_loading(model, model_config_of(config), device)
    model.eval()


def new_model(config: Any, device: torch.device) -> torch.nn.Module:
    """Return a model of ``config`` without weights, on ``device`` or where the configuration has vLLM load it."""
    load_device = config.load_config.device
    return initialized(config, torch.device(load_device) if load_device else device)


def initialized(config: Any, device: torch.device) -> torch.nn.Module:
    """Return a model of ``config`` without weights, on ``device``."""
    from vllm.model_executor.model_loader.utils import initialize_model

    prefix = vars(config).get(_PREFIX, "")
    with on_device(device):
        model: torch.nn.Module = initialize_model(
            vllm_config=config, model_config=model_config_of(config), prefix=prefix
        )
    return model
