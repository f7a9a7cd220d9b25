"""Profiles as one HTML page: a roofline with a point a block, where the time goes, and the tables."""

from __future__ import annotations

import math
from html import escape

from . import rival
from .page import STYLE
from .profiling import Profile

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 360, 60, 40
_BAR, _PITCH = 26, 44


def render(profiles: list[Profile]) -> str:
    """The page, which needs no other file."""
    sections = "\n".join(_section(found) for found in profiles)
    longest = max(max(_total(found), sum(found.rival.values())) for found in profiles)
    bars = "\n".join(f"<h3>{escape(found.case.title)}</h3>\n{stack(found, longest)}" for found in profiles)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>mnv4_kernels profile</title>"
        f"<style>{STYLE}</style></head><body>\n<h1>Where the time goes</h1>\n"
        f"<p>Each bar is a network, each piece a block; hold the pointer on one for its name and time. A competitor's "
        f"times are its own profiler's; the line is the floor.</p>\n{bars}\n"
        f"{sections}</body></html>\n"
    )


def _total(found: Profile) -> float:
    return sum(block.us for block in found.blocks)


def _section(found: Profile) -> str:
    tables = "".join(_table(*cells) for cells in (found.block_table(), found.step_table()))
    return (
        f"<h2>{escape(found.case.title)}</h2>\n{roofline(found)}\n<p>{escape(found.footnote())} "
        "Across: operations a byte of weights, input and output; up: GFLOP/s; both logarithmic. A point may lie above "
        f"the slope where a block finds its input in cache.</p>\n{tables}"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{heads}</tr>{body}</table>"


def stack(found: Profile, longest: float) -> str:
    """SVGs: a bar of the blocks' times, ours and the competitor's; `longest` microseconds fill a line."""
    scale = (_WIDTH - 210) / longest
    names = list(dict.fromkeys([*(block.name for block in found.blocks), *found.rival]))
    floor = scale * sum(found.floor_us(block.flops, block.weight_bytes) for block in found.blocks)
    mark = f"<line class='floor' x1='{floor:.1f}' x2='{floor:.1f}' y1='0' y2='{_BAR + 8}'/>"
    ours = {block.name: block.us for block in found.blocks}
    drawn = _bar("ours", ours, names, scale, mark)
    return drawn + (_bar(rival.NAME, found.rival, names, scale, mark) if found.rival else "")


def _bar(label: str, times: dict[str, float], names: list[str], scale: float, mark: str) -> str:
    parts = [f"<svg role='img' viewBox='0 0 {_WIDTH} {_PITCH}' width='100%'>"]
    left = 0.0
    for name, us in times.items():
        width = us * scale
        # a block has its colour in every bar; neighbours differ in hue: the golden angle never repeats
        color = f"hsl({names.index(name) * 137.5 % 360:.0f} 55% 60%)"
        parts.append(
            f"<rect x='{left:.2f}' y='4' width='{width:.2f}' height='{_BAR}' fill='{color}'>"
            f"<title>{escape(label)}, {escape(name)}: {us:.1f} us</title></rect>"
        )
        left += width
    total = sum(times.values()) / 1e3
    return "".join([*parts, mark, f"<text x='{left + 6:.1f}' y='22'>{escape(label)} {total:.2f} ms</text></svg>"])


def roofline(found: Profile) -> str:
    """An SVG: the roof of both ceilings, and a point a block whose area is its share of the time."""
    points = [(block, block.flops / block.bytes, block.flops / block.us / 1e3) for block in found.blocks if block.flops]
    peak, rate = found.ceilings.gflops, found.ceilings.gbytes
    xs = [x for _, x, _ in points] + [peak / rate]
    ys = [y for _, _, y in points] + [peak]
    low_x, high_x = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs) * 1.01))
    low_y, high_y = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys) * 1.01))

    def across(x: float) -> float:
        return _LEFT + (math.log10(x) - low_x) / (high_x - low_x) * (_WIDTH - _LEFT - 20)

    def up(y: float) -> float:
        return (high_y - math.log10(y)) / (high_y - low_y) * (_HEIGHT - _BOTTOM - 10) + 10

    parts = [f"<svg role='img' viewBox='0 0 {_WIDTH} {_HEIGHT}' width='100%'>"]
    for power in range(low_x, high_x + 1):
        x = across(10.0**power)
        parts.append(f"<line class='grid' x1='{x:.1f}' x2='{x:.1f}' y1='10' y2='{_HEIGHT - _BOTTOM}'/>")
        parts.append(f"<text x='{x:.1f}' y='{_HEIGHT - 20}' text-anchor='middle'>{10.0**power:g}</text>")
    for power in range(low_y, high_y + 1):
        y = up(10.0**power)
        parts.append(f"<line class='grid' x1='{_LEFT}' x2='{_WIDTH - 20}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{10.0**power:g}</text>")
    # the slope starts where it enters the plot, at the left or from below
    start = max(10.0**low_x, 10.0**low_y / rate)
    ridge = peak / rate
    roof = f"{across(start):.1f},{up(start * rate):.1f} {across(ridge):.1f},{up(peak):.1f} {_WIDTH - 20},{up(peak):.1f}"
    parts.append(f"<polyline class='roof' points='{roof}'/>")
    total = _total(found)
    for block, x, y in points:
        radius = 3 + 30 * math.sqrt(block.us / total)
        parts.append(
            f"<circle class='point' cx='{across(x):.1f}' cy='{up(y):.1f}' r='{radius:.1f}'>"
            f"<title>{escape(block.name)}: {y:.0f} GFLOP/s at {x:.1f} FLOP/B, {block.us:.1f} us</title></circle>"
        )
    return "".join(parts) + "</svg>"
