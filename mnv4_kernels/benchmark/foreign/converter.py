"""Writes an exported program as the file that a runtime reads: `python converter.py PROGRAM FILE`.

PROGRAM is torch.export's, so that no environment but the one that bench runs in needs timm; FILE's suffix says
which format.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.export import ExportedProgram


def to_onnx(program: ExportedProgram, path: Path) -> None:
    """For ONNX Runtime and OpenVINO."""
    torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False)


def to_executorch(program: ExportedProgram, path: Path) -> None:
    """ExecuTorch's program, whatever XNNPACK can run delegated to it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def to_litert(program: ExportedProgram, path: Path) -> None:
    """LiteRT's flat buffer, with images in NCHW at the door as everywhere here."""
    import litert_torch

    assert program.example_inputs is not None
    arguments, _ = program.example_inputs
    litert_torch.convert(program.module(), arguments).export(str(path))


def to_modules(program: ExportedProgram, path: Path) -> None:
    """JSON: the module that each node of the ONNX file beside `path`, and each result of a node, comes from."""
    import onnx

    found: dict[str, str] = {}
    for node in onnx.load(path.with_name("model.onnx"), load_external_data=False).graph.node:
        for entry in node.metadata_props:
            if entry.key == "pkg.torch.onnx.name_scopes":
                # from the model down to the call itself
                *_, module, _ = ast.literal_eval(entry.value)
                found |= dict.fromkeys((node.name, *node.output), module)
    path.write_text(json.dumps(found))


FORMATS: dict[str, Callable[[ExportedProgram, Path], None]] = {
    ".onnx": to_onnx,
    ".pte": to_executorch,
    ".tflite": to_litert,
    ".json": to_modules,
}


def main() -> None:
    """Converts into a neighbour of FILE first, so that FILE is whole wherever it exists."""
    path = Path(sys.argv[2])
    partial = path.with_stem("partial")
    with torch.no_grad():
        FORMATS[path.suffix](torch.export.load(sys.argv[1]), partial)
    partial.rename(path)


if __name__ == "__main__":
    main()
