"""Where a competitor's time goes, block by block: ONNX Runtime's own profile, read by the modules of its nodes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from .case import Case
from .environments import ONNX, ONNXRUNTIME
from .kit import ConversionError, Kit
from .rounds import Protocol, Worker, WorkerError
from .runtimes import RUNTIMES, Foreign

NAME = "onnxruntime"
#: Module of each of the file's nodes.
MODULES = Foreign("model.json", ONNX, ONNXRUNTIME)


def block_times(
    case: Case, protocol: Protocol, repeats: int, progress: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, float], str]:
    """Microseconds of each block of `case` in ONNX Runtime, medians of `repeats` runs; or {} and why not."""
    (runtime,) = [row for row in RUNTIMES if row.name == NAME]
    assert isinstance(runtime.how, Foreign)
    if case.dtype != "float32":
        return {}, f"{NAME} has no {case.dtype} on the CPU"
    missing = [*ONNX.missing(protocol.environments), *ONNXRUNTIME.missing(protocol.environments)]
    if missing:
        return {}, "; ".join(missing)
    with Kit(case, protocol.cache) as kit:
        torch_worker, player = Worker(case), Worker(case, ONNXRUNTIME.python(protocol.environments))
        try:
            progress(f"{case.title}: {runtime.how.file} for {NAME}")
            torch_worker.ask("prepare", folder=str(kit.folder), export=True)
            for file in (runtime.how, MODULES):
                kit.convert(file, protocol.environments)
            progress(f"{case.title}: profile of {NAME}")
            steps = player.ask("profile", folder=str(kit.folder), file=runtime.how.file, repeats=repeats)["steps"]
            modules = json.loads((kit.folder / MODULES.file).read_text())
        except (WorkerError, ConversionError) as failure:
            return {}, f"{NAME} failed: {failure}"
        finally:
            torch_worker.close()
            player.close()
    return _by_block(steps, modules), ""


def _by_block(steps: list[tuple[str, float]], modules: dict[str, str]) -> dict[str, float]:
    """Sums the times of steps in order of execution; what has no name of the file's belongs to the step before."""
    found: dict[str, float] = {}
    block = "stem"
    for name, us in steps:
        # the runtime's optimizer appends to names of nodes and of values
        known = re.sub(r"(_nchwc|_token_\d+|/.*)+$", "", name)
        module = modules.get(known)
        if module is not None:
            block = block_of(module)
        found[block] = found.get(block, 0.0) + us
    return found


def block_of(module: str) -> str:
    """The block of a module's name in timm's model: "stem", "blocks.I.J" or "head"."""
    inside = re.match(r"blocks\.\d+\.\d+", module)
    if inside:
        return inside.group()
    return "stem" if module.startswith(("conv_stem", "bn1")) else "head"
