"""The backend: inductor, after `FuseConvolutions`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from .fuse import FuseConvolutions


def backend(
    graph: fx.GraphModule,
    inputs: list[torch.Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **others: Any,
) -> Callable[..., Any]:
    """Compiles `graph` for `torch.compile(model, backend="mnv4_kernels")`.

    Whatever `FuseConvolutions` leaves alone is inductor's: graphs with gradients, of other devices, of other layers.

    Args:
        graph: what Dynamo traced, any model's.
        inputs: its example inputs.
        mode: `torch.compile`'s, as inductor takes it.
        options: `torch.compile`'s, as inductor takes them.
        others: further arguments of inductor's in newer versions of torch.
    """
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    passes = patches.get("pre_grad_custom_pass", config.pre_grad_custom_pass)
    patches["pre_grad_custom_pass"] = _together(FuseConvolutions(), passes)
    return cast(Callable[..., Any], compile_fx(graph, inputs, config_patches=patches))


def _together(first: FuseConvolutions, others: Any) -> Any:
    if others is None:
        return first
    return [first, *(others if isinstance(others, Sequence) else [others])]
