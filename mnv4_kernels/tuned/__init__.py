"""Tuned launch configs: one JSON file a device, each with the provenance of its figures.

A file is `<device name in lower case, spaces as underscores>.json`::

    {"format": 1,
     "provenance": {"device": "...", "command": "...", "commit": "...", "date": "...", "torch": "...",
                    "triton": "...", "copy_gb_s": 0.0, "matmul_tflop_s": 0.0},
     "configs": {"dwconv_bn_act/bfloat16/256x64x56x56/k3s1": {"kind": "DepthwiseConfig", ..., "us": 0.0}}}

Files are written by `mnv4_kernels.ops.gpu.tune` on that device, never by hand, and nothing tunes at
first use: a shape or a device without a row gets the heuristic's config.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..ops.gpu.config import Config, from_json, to_json

FORMAT = 1

#: What each file must say about where its figures come from.
PROVENANCE = ("device", "command", "commit", "date", "torch", "triton", "copy_gb_s", "matmul_tflop_s")


def shipped(device_name: str) -> Path:
    """The package's own file for a device."""
    return Path(__file__).parent / f"{device_name.lower().replace(' ', '_')}.json"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Config]]:
    """(provenance, configs) of a tuned file; raises `ValueError` on one that is not whole."""
    data = json.loads(path.read_text())
    if data.get("format") != FORMAT:
        raise ValueError(f"`format` of {path.name} must be {FORMAT}, got {data.get('format')!r}")
    provenance = data.get("provenance", {})
    missing = [name for name in PROVENANCE if not provenance.get(name)]
    if missing:
        raise ValueError(f"`provenance` of {path.name} must name {', '.join(missing)}")
    configs = {
        key: from_json({name: value for name, value in row.items() if name != "us"})
        for key, row in data["configs"].items()
    }
    return provenance, configs


def rows(path: Path) -> list[tuple[str, Config, float]]:
    """(key, config, median microseconds) of every row of a tuned file."""
    _, configs = read(path)
    data = json.loads(path.read_text())["configs"]
    return [(key, config, float(data[key]["us"])) for key, config in configs.items()]


def write(path: Path, provenance: dict[str, Any], configs: dict[str, tuple[Config, float]]) -> None:
    """Writes a tuned file of {key: (config, median microseconds)}; raises `ValueError` on missing provenance."""
    missing = [name for name in PROVENANCE if not provenance.get(name)]
    if missing:
        raise ValueError(f"`provenance` must name {', '.join(missing)}")
    rows = {key: {**to_json(config), "us": round(us, 3)} for key, (config, us) in sorted(configs.items())}
    path.write_text(json.dumps({"format": FORMAT, "provenance": provenance, "configs": rows}, indent=1) + "\n")


@lru_cache(maxsize=8)
def _configs(path: Path) -> tuple[str, dict[str, Config]]:
    if not path.is_file():
        return "", {}
    provenance, configs = read(path)
    return provenance["device"], configs


def lookup(device_name: str, key: str) -> Config | None:
    """The tuned config of `key` on a device, None where nobody has tuned it.

    A file named by `MNV4_KERNELS_TUNED` is asked before the shipped one, if it was made on this device.
    """
    own = os.environ.get("MNV4_KERNELS_TUNED")
    if own:
        device, configs = _configs(Path(own))
        if device == device_name and key in configs:
            return configs[key]
    return _configs(shipped(device_name))[1].get(key)


def provenance(device_name: str) -> dict[str, Any]:
    """Where a device's tuned figures come from, its measured ceilings among it; empty where nobody tuned it."""
    own = os.environ.get("MNV4_KERNELS_TUNED")
    for path in [*([Path(own)] if own else []), shipped(device_name)]:
        if path.is_file():
            found = read(path)[0]
            if found["device"] == device_name:
                return found
    return {}
