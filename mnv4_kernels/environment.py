"""Every environment variable that mnv4_kernels reads, and the switches that turn kernels off.

The `DISABLE` switches are read anew at each call, so that they work at run time too:
`os.environ["MNV4_KERNELS_DISABLE"] = "1"` sends the next call down timm's own path.
A switch is on unless its value is empty, 0, false, no or off.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

DISABLE = "MNV4_KERNELS_DISABLE"

#: ops that have a switch of their own
OPS = (
    "conv_bn_act",
    "conv_pwconv",
    "dwconv_bn_act",
    "dwconv_pwconv",
    "head",
    "kv_downsample",
    "mobile_attention",
    "mqa",
    "mqa_projected",
    "pwconv_bn_act",
    "uib",
)

#: ops of training that have a switch of their own, for both directions
TRAINING_OPS = ("bn_act", "bn_act_conv", "bn_act_dwconv", "bn_act_pwconv")

#: name -> what it does; a test compares this table with what the sources read
VARIABLES: dict[str, str] = {
    DISABLE: "1: patched models run timm's own path everywhere; `functional` and CUDA calls of ops run the references",
    **{f"{DISABLE}_{op.upper()}": f"1: the same for what needs `{op}` only" for op in (*OPS, *TRAINING_OPS)},
    "MNV4_KERNELS_TIER": "the highest instruction-set tier that the C++ kernels may use; read when the library loads",
    "MNV4_KERNELS_TUNED": "a file of launch configurations for the GPU kernels, used before the shipped ones",
    "MNV4_KERNELS_BUILD": "at build time; 0: install the pure Python package, without the C++ library",
    "MNV4_KERNELS_SANITIZE": "at build time; sanitizers to build the C++ library with, e.g. address,undefined",
}

_OFF = frozenset(("", "0", "false", "no", "off"))


def switch_of(op: str) -> str:
    """The variable that turns `op` off."""
    return f"{DISABLE}_{op.upper()}"


def is_set(name: str) -> bool:
    """True if the switch `name` is on."""
    return os.environ.get(name, "").strip().lower() not in _OFF


def reasons(op: str) -> list[str]:
    """Which switches turn `op` off, in sentences; empty list: none does."""
    return [f"turned off by {name}={os.environ[name]}" for name in (DISABLE, switch_of(op)) if is_set(name)]


class Switches:
    """The switches of a few ops, cheap enough to be asked at each call of a block (about 0.2 us)."""

    __slots__ = ("_keys", "_names")

    def __init__(self, ops: Iterable[str]) -> None:
        self._names = (DISABLE, *(switch_of(op) for op in sorted(set(ops))))
        self._keys = tuple(_raw_key(name) for name in self._names)

    def obstacle(self) -> str:
        """Which switch is on, as a sentence; empty: none."""
        if _RAW.keys().isdisjoint(self._keys):
            return ""
        return next((f"turned off by {name}={os.environ[name]}" for name in self._names if is_set(name)), "")


# `os.environ` encodes each key and answers a missing one through an exception: 0.7 us a question.
# The dict below it, where there is one, answers in 0.03 us.
_RAW: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)


def _raw_key(name: str) -> object:
    encode = getattr(os.environ, "encodekey", None)
    return name if encode is None or _RAW is os.environ else encode(name)
