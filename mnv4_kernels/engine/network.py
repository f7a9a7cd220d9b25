"""The module that `optimize` returns: programs of the engine, and timm's blocks where there is no node for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..backends import native
from ..backends.torch_internals import constant_in_graphs, suggest_memory_format, untraced
from ..modules.program import FEATURES, RESULT
from ..ops.engine import Array, Engine, encode, engine_run, program_pack, program_run

#: What weights are stored in and inputs may be.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class OptimizeError(RuntimeError):
    """`optimize(..., strict=True)` met a piece that the engine can't run, or the model is none that it knows."""


class ProgramPart(nn.Module):
    """One program of the engine. Its folded arrays are what is copied and pickled; a copy packs them anew.

    They are held packed only, and unpacked when asked for.

    Args:
        program: [nodes, fields] int64.
        arrays: folded weights and biases, float32.
        bfloat16: multiply in bfloat16 where the processor does; else in float32, with the same arrays.
        names: of the module that each node comes from.
    """

    def __init__(
        self, program: torch.Tensor, arrays: Sequence[Array], bfloat16: bool, names: list[str] | None = None
    ) -> None:
        super().__init__()
        self.names = names or [""] * len(program)
        self.in_bfloat16 = bfloat16
        self.program = program
        self._start(arrays)

    @property
    def arrays(self) -> list[torch.Tensor]:
        """Folded weights and biases, float32, as they are stored."""
        return self._engine.arrays()

    def _start(self, arrays: Sequence[Array]) -> None:
        if not native.available():
            raise OptimizeError("the engine needs the C++ library: " + "; ".join(native.reasons()))
        self._engine = Engine(self.program, arrays, self.in_bfloat16)
        # torch.compile guards on a module's plain integer, so that compiled code meets no other engine
        self._handle = self._engine.handle

    def forward(self, x: torch.Tensor, tag: int = RESULT) -> list[torch.Tensor]:
        """[N, C, H, W] -> the outputs of `tag`, float32."""
        if torch.compiler.is_exporting():
            # a handle is nothing in another process: the packed weights become a constant of the exported program
            exported: list[torch.Tensor] = program_run(_text(self), _packed(self), x, self.in_bfloat16, tag)
            return exported
        results: list[torch.Tensor] = engine_run(self._handle, x, tag)
        return results

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_engine", "_handle")}
        return {**kept, "arrays": self.arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = state.pop("arrays")
        super().__setstate__(state)
        self._start(arrays)


@constant_in_graphs
def _text(part: ProgramPart) -> str:
    with untraced():
        return encode(part.program.tolist())


@constant_in_graphs
def _packed(part: ProgramPart) -> torch.Tensor:
    text = _text(part)
    with untraced():
        packed: torch.Tensor = program_pack(text, part.arrays, part.in_bfloat16)
        return packed


class OptimizedNetwork(nn.Module):
    """Inference only: same results as the model that it was made from, within rounding.

    Args:
        channels: of the input.
        parts: in order; all but the first take the map of the one before.
        taps: whether the results of the parts are a list of maps (features_only).
        head: whether the last part ends in logits or features [N, K].
        fallbacks: (module name, reason) of each piece that runs by timm's own code.
    """

    def __init__(
        self, channels: int, parts: list[nn.Module], taps: bool, head: bool, fallbacks: list[tuple[str, str]]
    ) -> None:
        super().__init__()
        self.channels = channels
        self.parts = nn.ModuleList(parts)
        self.taps = taps
        self.head = head
        self.fallbacks = fallbacks
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        """Images [N, C, H, W] -> what the model returned: logits, features, or a list of maps; in x's dtype."""
        results = self._run(x, RESULT)
        if self.taps:
            return [_like(tap, x) for tap in results]
        return _like(results[-1], x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, C, H, W] -> the last stage's map."""
        if self.taps:
            raise RuntimeError("a features_only model has no forward_features; call the model itself")
        return _like(self._run(x, FEATURES if self.head else RESULT)[-1], x)

    def _run(self, x: torch.Tensor, tag: int) -> list[torch.Tensor]:
        self._check(x)
        found: list[torch.Tensor] = []
        y = x
        parts = self.parts
        last = len(parts) - 1
        for index, part in enumerate(parts):
            if isinstance(part, ProgramPart):
                results = part(y, tag if index == last else RESULT)
                # a part's last result is the next part's input; those before it are taps
                found += results if index == last else results[:-1]
                y = results[-1]
            else:
                y = part(y)
                found += [y] if index == last or part.tap else []
        return found

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cpu")

    def _check(self, x: Any) -> None:
        if not isinstance(x, torch.Tensor) or x.dim() != 4 or x.shape[1] != self.channels:
            got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"`x` must be a tensor [N, {self.channels}, H, W], got {got}")
        if x.dtype not in DTYPES:
            raise ValueError(f"`x` must be float32, bfloat16 or float16, got {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"`x` must be on {self.device}, as the network is, got {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("an optimized network has no gradients: call it under torch.no_grad(), or use mk.patch")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> OptimizedNetwork:
        """What `to`, `half` and `cuda` call: packed weights can't be moved or converted, nor must it seem so."""
        weight = torch.empty(0, device=self.device)
        moved = fn(weight)
        if (moved.device, moved.dtype) != (weight.device, weight.dtype):
            raise RuntimeError(
                f"an optimized network can't become {moved.dtype} on {moved.device}: convert or move the model and "
                "optimize that (its `dtype` is an argument of `optimize`); inputs may be float32, bfloat16 or float16"
            )
        return self

    def extra_repr(self) -> str:
        """What runs by timm's own code."""
        return "; ".join(f"{name} runs timm's own code: {reason}" for name, reason in self.fallbacks)


class TimmPart(nn.Module):
    """A block without a node, run by timm's code in float32."""

    def __init__(self, block: nn.Module, tap: bool) -> None:
        super().__init__()
        self.block = block
        self.tap = tap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's result."""
        y: torch.Tensor = self.block(x.contiguous(memory_format=torch.channels_last))
        return y


def _like(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if y.dtype != x.dtype:
        y = y.to(x.dtype)
    if y.dim() == 4 and suggest_memory_format(x) == torch.channels_last:
        return y.contiguous(memory_format=torch.channels_last)
    return y
