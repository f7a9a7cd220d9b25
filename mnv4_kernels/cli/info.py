"""info: what is installed, which kernels can be used, and what is missing."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch

from .. import environment
from ..backends import device, native
from ..tables import render as table

#: distribution -> what is lost without it
OPTIONAL = {
    "timm": "patch, verify, bench and demo need it",
    "triton": "no GPU kernels",
    "rich": "progress in plain lines",
    "scikit-learn": "demo needs it for its photograph",
    "onnxruntime": "bench needs it, here or in an environment of its own",
    "openvino": "bench needs it, here or in an environment of its own",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def collect() -> dict[str, Any]:
    """The facts, as JSON values."""
    facts: dict[str, Any] = {
        "mnv4_kernels": device.version("mnv4_kernels") or "not installed, imported from a folder",
        "torch": torch.__version__,
        "cpu": device.cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": device.gpu_name(),
        "extension": native.available(),
        "extension_missing_because": native.reasons(),
        "optional": {name: device.version(name) for name in OPTIONAL},
        "environment": {name: os.environ.get(name) for name in environment.VARIABLES},
    }
    if native.available():
        library = native.module()
        facts["tiers"] = {
            "compiled": library.compiled_tiers(),
            "detected": library.detected_tier(),
            "active": library.active_tier(),
        }
        facts["engine_bytes"] = library.engine_bytes()
    return facts


def main(arguments: argparse.Namespace) -> int:
    """Prints the facts."""
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(table("mnv4_kernels", ["fact", "value"], _rows(facts)))
    optional = [[name, found or f"missing: {OPTIONAL[name]}"] for name, found in facts["optional"].items()]
    print(f"\n{table('', ['optional', 'version'], optional)}\n")
    variables = [[name, "not set" if value is None else value] for name, value in facts["environment"].items()]
    print(table("", ["environment", "value"], variables))
    return 0


def _rows(facts: dict[str, Any]) -> list[list[str]]:
    rows = [[name, str(facts[name])] for name in ("mnv4_kernels", "torch", "cpu", "threads")]
    rows.append(["gpu", facts["gpu"] or "none"])
    if facts["extension"]:
        tiers = facts["tiers"]
        rows.append(["C++ library", "loaded"])
        rows.append(["tiers compiled", ", ".join(tiers["compiled"])])
        rows.append(["tier detected", tiers["detected"]])
        rows.append(["tier in use", tiers["active"]])
        rows.append(["engines hold", f"{facts['engine_bytes'] / 1e6:.1f} MB"])
    else:
        rows.append(["C++ library", f"missing: {'; '.join(facts['extension_missing_because'])}"])
    return rows
