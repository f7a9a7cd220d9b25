"""The pass: in graphs without gradients, convolutions and what follows them become programs of the engine.

A region is what hangs together: convolutions (dense, depthwise, 1x1) with BatchNorm and
activation, projections with the skip that is added to them, average pools, a global pool
and the layers behind it. It becomes one op, `subnetwork`, with the parameters that the
graph has anyway as arguments. What is in no region stays inductor's.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from ..environment import OPS, Switches
from ..ops import subnetwork as subnetwork_room
from ..ops.subnetwork import subnetwork
from ..ops.support import CPP_DTYPES, dtype_name, library_reasons
from . import calls, layers
from .calls import read, value_of
from .layers import Layer

log = logging.getLogger(__name__)

#: Fewer convolutions than this are inductor's: handing maps over costs two copies. With 1, DenseNet-121, all in parts
#: of one or two, takes 1.28 times as long; with 4, MobileNet-V3 small 1.15.
FEWEST = 3

_MODES = ("_set_grad_enabled", "_enter_autocast", "_enter_inference_mode")
_SWITCHES = Switches(OPS)


class FuseConvolutions(CustomGraphPass):
    """For `torch._inductor.config.pre_grad_custom_pass`: the graph as Dynamo traced it, changed in place.

    Graphs on disk are keyed by `uuid`. An op in them knows all that it needs by its arguments.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Replaces what it can; what keeps it from anything is logged (`TORCH_LOGS=+mnv4_kernels.compiler`)."""
        reasons = obstacles(graph)
        if reasons:
            log.info("graph left to inductor: %s", "; ".join(reasons))
            return
        replaced: dict[fx.Node, fx.Node] = {}
        for region in regions(graph):
            _replace(graph, region, replaced)
        graph.lint()

    def uuid(self) -> Any:
        """Changes with the sources that decide what a graph becomes."""
        files = [module.__file__ for module in (calls, layers, subnetwork_room.contract, subnetwork_room.recipe)]
        return get_hash_for_files((__file__, *map(str, files)))


def obstacles(graph: fx.Graph) -> list[str]:
    """Why the whole graph is inductor's; empty: it need not."""
    reasons = list(library_reasons(OPS[0]))
    switched_off = _SWITCHES.obstacle()
    if switched_off:
        reasons = [switched_off]
    inputs = [value_of(node) for node in graph.nodes if node.op == "placeholder"]
    wanted = any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs)
    if torch.is_grad_enabled() and wanted:
        reasons.append("gradients are enabled, and an input or parameter requires them")
    if torch.is_autocast_enabled("cpu"):
        reasons.append("under autocast")
    modes = {getattr(node.target, "__name__", "") for node in graph.nodes if node.op == "call_function"}
    reasons += [f"the graph changes modes ({name})" for name in _MODES if name in modes]
    return reasons


@dataclasses.dataclass(eq=False)
class Region:
    """Calls that become one program."""

    source: fx.Node
    layers: list[Layer]
    #: nodes whose results are layers
    values: dict[fx.Node, Layer] = dataclasses.field(default_factory=dict)
    members: list[fx.Node] = dataclasses.field(default_factory=list)

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes that others read."""
        inside = set(self.members)
        return [node for node in self.members if any(user not in inside for user in node.users)]


def regions(graph: fx.Graph) -> list[Region]:
    """The regions of `graph` that are worth it."""
    finder = _Finder()
    for node in graph.nodes:
        if not finder.take(node) and calls.may_write(node):
            finder.close()
    found = [region for region in finder.found if sum(layer.weight is not None for layer in region.layers) >= FEWEST]
    return [region for region in found if region.outputs]


class _Finder:
    """Walks a graph in order; regions stay open for further calls until something might write to what they read."""

    def __init__(self) -> None:
        self.found: list[Region] = []
        self._at: dict[fx.Node, Region] = {}

    def close(self) -> None:
        """Nothing joins the regions found so far."""
        self._at = {}

    def take(self, node: fx.Node) -> bool:
        """True if `node` has become part of a region."""
        call = read(node)
        if call is None or value_of(node) is None or value_of(call.x) is None:
            return False
        if isinstance(call, calls.Conv):
            return self._convolution(node, call)
        if isinstance(call, calls.Add):
            return self._add(node, call)
        if isinstance(call, calls.Pad):
            # joins with the convolution behind it
            return _only_user_convolves(node)
        if call.x not in self._at:
            return False
        region = self._at[call.x]
        source = region.values[call.x]
        layer = _follow(call, call.x, source, node)
        return layer is not None and self._join(region, layer, node)

    def _join(self, region: Region, layer: Layer, *nodes: fx.Node) -> bool:
        if layer not in region.layers:
            region.layers.append(layer)
        region.members += nodes
        for node in nodes:
            region.values[node] = layer
            self._at[node] = region
        return True

    def _convolution(self, node: fx.Node, call: calls.Conv) -> bool:
        frame = read(call.x)
        pad = frame if isinstance(frame, calls.Pad) and _only_user_convolves(call.x) else None
        source = call.x if pad is None else pad.x
        region = self._at.get(source)
        if region is None:
            value = value_of(source)
            if not _enters(value):
                return False
            region = Region(source, [Layer("input", None, int(value.shape[1]))])
            region.values[source] = region.layers[0]
        layer = layers.convolution(call, region.values[source], pad)
        if layer is None or not _readable(layer, value_of(region.source)):
            return False
        if region not in self.found:
            self.found.append(region)
            self._at[source] = region
        if pad is not None:
            region.members.append(call.x)
        return self._join(region, layer, node)

    def _add(self, node: fx.Node, call: calls.Add) -> bool:
        # in place, others may look at what is written to
        ways = ((call.x, call.other), (call.other, call.x))[: 1 if call.in_place else 2]
        for main, skip in ways:
            region = self._at.get(main)
            if region is None or skip not in region.values or len(main.users) != 1:
                continue
            layer, residual = region.values[main], region.values[skip]
            free = layer.kind == "pointwise" and layer.stage < layers.DONE and layer.residual is None
            earlier = region.layers.index(residual) < region.layers.index(layer)
            if free and earlier and residual.is_map and layers.shaped_alike(main, skip):
                layer.residual, layer.stage = residual, layers.DONE
                return self._join(region, layer, node)
        return False


def _follow(call: Any, node: fx.Node, source: Layer, user: fx.Node) -> Layer | None:
    """The layer that `call` makes of `source`, the layer of `node`: the same one, grown, or another; None: neither."""
    alone = len(node.users) == 1
    if isinstance(call, calls.Norm):
        if not alone or source.stage != layers.CONVOLVED:
            return None
        grown = dataclasses.replace(source, norm=call)
        if not _readable(grown, value_of(node)):
            return None
        source.norm, source.stage = call, layers.NORMALISED
        return source
    if isinstance(call, calls.Scale):
        fits = value_of(node).dim() == 4 and int(value_of(call.factors).shape[0]) == source.channels
        promoted = value_of(user).dtype != value_of(node).dtype
        if promoted or not (alone and fits) or source.stage not in (layers.CONVOLVED, layers.NORMALISED):
            return None
        grown = dataclasses.replace(source, scale=call.factors)
        if not _readable(grown, value_of(node)):
            return None
        source.scale, source.stage = call.factors, layers.SCALED
        return source
    if isinstance(call, calls.Act):
        if not alone or source.stage == layers.DONE:
            return None
        source.act, source.stage = call.name, layers.DONE
        return source
    if isinstance(call, calls.Same):
        return source if source.kind != "input" and alone else None
    if isinstance(call, calls.AveragePool):
        return layers.average(call, source) if source.is_map else None
    if isinstance(call, calls.GlobalPool):
        return Layer("pool", source, source.channels) if source.is_map else None
    if isinstance(call, calls.Flatten):
        return source if not source.is_map and value_of(node).dim() == 4 else None
    if isinstance(call, calls.Linear):
        flat = not source.is_map and value_of(node).dim() == 2
        layer = layers.dense(call, source, int(value_of(user).shape[1])) if flat else None
        return layer if layer is not None and _readable(layer, value_of(node)) else None
    return None


def _enters(value: Any) -> bool:
    plain = isinstance(value, torch.Tensor) and value.dim() == 4 and value.device.type == "cpu"
    return plain and value.dtype in CPP_DTYPES


def _readable(layer: Layer, x: torch.Tensor) -> bool:
    """True if all that the layer reads is the graph's own input, of x's dtype, on the CPU."""
    for node in layer.nodes():
        value = value_of(node)
        if node.op != "placeholder" or value.device.type != "cpu" or value.dtype not in CPP_DTYPES:
            return False
        if node is layer.weight and value.dtype != x.dtype:
            log.info("%s is %s, x %s", node.name, dtype_name(value.dtype), dtype_name(x.dtype))
            return False
    return True


def _only_user_convolves(node: fx.Node) -> bool:
    users = list(node.users)
    return len(users) == 1 and isinstance(read(users[0]), calls.Conv)


def _replace(graph: fx.Graph, region: Region, replaced: dict[fx.Node, fx.Node]) -> None:
    """Puts the op in the place of `region`; notes in `replaced` what stands for which of its outputs."""
    outputs = region.outputs
    source = replaced.get(region.source, region.source)
    text = layers.write(region.layers, [region.values[node] for node in outputs])
    with graph.inserting_before(region.members[0]):
        call = graph.call_function(subnetwork, (source, text.tensors, text.program, text.recipe))
        for number, node in enumerate(outputs):
            result = _result(graph, call, number, region.values[node], value_of(node))
            result.meta.update(node.meta)
            node.replace_all_uses_with(result, delete_user_cb=_outside(region.members))
            replaced[node] = result
    for node in reversed(region.members):
        graph.erase_node(node)


def _result(graph: fx.Graph, call: fx.Node, number: int, layer: Layer, value: torch.Tensor) -> fx.Node:
    result = graph.call_function(operator.getitem, (call, number))
    if layer.is_map or value.dim() == 2:
        return result
    # the engine's pooled features have no height and width
    for axis in (2, 3):
        result = graph.call_function(torch.unsqueeze, (result, axis))
    return result


def _outside(members: Iterable[fx.Node]) -> Any:
    inside = set(members)
    return lambda user: user not in inside
