"""vLLM's ``WeightSource`` of 0.32 and 0.33, which differ, read as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def full_pass(source: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Return a fresh pass over all parameters, whole. On every rank of a trainer it runs the same collectives.

    Raises:
        TypeError: the source gives no whole tensors.
    """
    if (implements := getattr(source, "implements_iter_full", None)) is not None and not implements():  # 0.33
        raise TypeError(
            f"{type(source).__name__} has no iter_full(), so it gives no whole tensors: define it, or send with "
            "EngineGroup.update_weights(module, process_group=..., senders='partitioned')"
        )
    if (iter_full := getattr(source, "iter_full", None)) is not None:
        passed: Iterator[tuple[str, torch.Tensor]] = iter_full()
        return passed
    return iter(source)  # 0.32


def metadata(source: Any) -> list[Any]:
    """Return name, dtype and shape of each parameter: a method gives them in 0.32, an attribute in 0.33."""
    found = source.metadata
    return list(found() if callable(found) else found)
