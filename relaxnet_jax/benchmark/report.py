"""A benchmark's document as tables, CSV files and a figure."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.markup import escape
from rich.table import Table

from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.evaluate.figures import SERIES, SPARE, STYLE, new_figure, save_figure

LONGEST_NAME = 70  # characters shown of a kernel's name


def steps_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries for steps on a bucket."""
    return {k: v for k, v in document["entries"].items() if "structures_per_s" in v}


def curve(document: dict[str, Any], kind: str, unit: str) -> list[dict[str, Any]]:
    """The entries of a curve, e.g. ("inference", "atoms"), in the order of their abscissa."""
    found = [
        v
        for k, v in document["entries"].items()
        if f"/ {kind} /" in k and k.endswith(f" {unit}") and "seconds_per_atom" in v
    ]
    return sorted(found, key=lambda entry: entry[unit])


def device_line(document: dict[str, Any]) -> str:
    """Device, cores and versions on one line."""
    m = document["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items())
    return f"{m['device']} ({m['platform']}), {m['cores']} cores; {versions}"


def remarks(document: dict[str, Any]) -> list[str]:
    """Caveats that a reader of the figures must know."""
    m, lines = document["machine"], []
    loads = {e.get("load_average", m["load_average"]) for e in document["entries"].values()}
    if (load := max(loads, default=0.0)) >= 0.5 * m["cores"]:
        lines.append(
            f"the load average was {load} on {m['cores']} cores when a run began; "
            "measurements under load understate the machine's speed"
        )
    for name, entry in document["entries"].items():
        if "skipped" in entry:
            lines.append(f"{name}: {entry['skipped']}")
        if entry.get("kernels") == {}:
            lines.append(f"{name}: JAX's profiler recorded no kernels")
        if entry.get("costs", {}).get("remark"):
            lines.append(f"{name}: {entry['costs']['remark']}")
        if entry.get("costs", {}).get("loops_of_unknown_length"):
            lines.append(f"{name}: loops of unknown length are counted once in FLOP and bytes")
    if document["missing"]:
        lines.append(
            f"time ran out before {len(document['missing'])} measurements; run the same command "
            "again to make them"
        )
    return lines


def steps_tables(document: dict[str, Any]) -> list[Table]:
    """A table of speeds and one of costs, each with a row per configuration, bucket and step."""
    speed, costs = (Table(title=title, title_justify="left") for title in ("Speed", "Costs"))
    _columns(speed, "structures/s", "atoms·frames/s", "ms", "min–max", "cold s", "cached s")
    _columns(costs, "padding", "MiB", "GFLOP", "GB", "matmul", "copy", "cached")
    for name, e in steps_of(document).items():
        s, c = e["seconds"], e["compile_s"]
        label = name.replace(" / ", " ").replace("training step", "training")
        speed.add_row(
            label,
            f"{e['structures_per_s']:.4g}",
            f"{e['atom_frames_per_s']:.4g}",
            f"{1e3 * s['median']:.4g}",
            f"{1e3 * s['fastest']:.3g}–{1e3 * s['slowest']:.3g}",
            f"{c['trace'] + c['compile']:.1f}",
            f"{c['cached_trace'] + c['cached_compile']:.1f}",
        )
        costs.add_row(
            label,
            _percent(e["padding"]),
            f"{e['memory_bytes'] / 2**20:.0f}",
            f"{e['costs']['flops'] / 1e9:.2f}",
            "–" if e["costs"]["xla_bytes"] is None else f"{e['costs']['xla_bytes'] / 1e9:.2f}",
            _percent(e.get("share_of_matmul")),
            _percent(e.get("share_of_copy")),
            _percent(e.get("share_of_cache_copy")),
        )
    return [speed, costs]


def kernel_tables(document: dict[str, Any]) -> list[Table]:
    """For every profiled step, a table of the kinds of kernels that took most time on the device."""
    tables = []
    for name, e in steps_of(document).items():
        if not (found := e.get("kernels")):
            continue
        busy, step = found["busy_s"], e["seconds"]["median"]
        title = (
            f"{name}: {found['calls']:.0f} kernels, busy {1e3 * busy:.3g} of {1e3 * step:.3g} ms"
        )
        table = Table(title=title, title_justify="left")
        _columns(table, "share", "calls", "µs each", first="kernels")
        table.columns[0].no_wrap, table.columns[0].max_width = True, LONGEST_NAME
        for kind, k in found["kinds"].items():
            mean, calls = 1e6 * k["seconds"] / k["calls"], f"{k['calls']:.0f}"
            table.add_row(escape(kind), _percent(k["share"]), calls, f"{mean:.3g}")
        tables.append(table)
    return tables


def _columns(table: Table, *names: str, first: str = "step") -> None:
    table.add_column(first)
    for name in names:
        table.add_column(name, justify="right")


def ceilings_line(document: dict[str, Any]) -> str | None:
    """The machine's ceilings on one line; None if they were not measured."""
    c = document["entries"].get("ceilings")
    if c is None:
        return None
    return (
        f"ceilings: matrix product {c['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s, copy "
        f"{c['copy_bytes_per_s'] / 1e9:.1f} GB/s, within the cache "
        f"{c['cache_copy_bytes_per_s'] / 1e9:.1f} GB/s"
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


CURVES = (("inference", "atoms"), ("inference", "frames"), ("training step", "atoms"))
CURVE_COLUMNS = (
    "kind",
    "atoms",
    "frames",
    "seconds",
    "fastest",
    "slowest",
    "repeats",
    "seconds_per_atom",
    "seconds_per_atom_and_frame",
    "memory_bytes",
    "memory_bytes_per_atom",
    "compile_s",
)


def write_curves(document: dict[str, Any], folder: Path) -> list[Path]:
    """Writes scaling.csv and, from two points on, scaling.png; returns the files written."""
    rows = []
    for kind, unit in CURVES:
        for entry in curve(document, kind, unit):
            seconds = entry["seconds"] | {"seconds": entry["seconds"]["median"]}
            values = entry | seconds | {"kind": f"{kind} by {unit}"}
            rows.append([values[name] for name in CURVE_COLUMNS])
    if not rows:
        return []
    files = [folder / "scaling.csv"]
    with atomic_path(files[0]) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CURVE_COLUMNS)
        writer.writerows(rows)
    if len(rows) > 1:
        files.append(folder / "scaling.png")
        scaling_figure(document, files[1])
    return files


def scaling_figure(document: dict[str, Any], path: Path) -> None:
    """Draws time and memory per atom against atoms, and time per atom against frames."""
    panels: Sequence[tuple[str, str, str, float]] = (
        ("atoms", "seconds_per_atom", "time per atom (ms)", 1e3),
        ("atoms", "memory_bytes_per_atom", "memory per atom (KiB)", 2.0**-10),
        ("frames", "seconds_per_atom", "time per atom (ms)", 1e3),
    )
    styles = {"inference": SERIES["model"], "training step": SPARE[0]}
    config = document["identity"]["configs"][0]["name"]
    caption = f"{config}: supercells of B2 NiAl on {device_line(document)}"
    with matplotlib.rc_context(STYLE):
        figure = new_figure(8.0, 3.0, caption)
        axes = figure.subplots(1, len(panels))
        for axis, (unit, field, ylabel, factor) in zip(axes, panels):
            for kind, style in styles.items():
                points = curve(document, kind, unit)
                if points:
                    x = [p[unit] for p in points]
                    axis.plot(x, [factor * p[field] for p in points], label=kind, **style)
            axis.set(xlabel=unit, ylabel=ylabel, xscale="log", yscale="log")
            low, high = np.log10(axis.get_ylim())  # whole decades, as ticks in between are cramped
            axis.set_ylim(10 ** np.floor(low), 10 ** np.ceil(high))
        handles, names = axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, names, loc="outside upper center", ncols=len(names))
        save_figure(figure, path)


def peers_table(document: dict[str, Any]) -> Table:
    """One row per comparison: seconds of both, and how many times longer the peer takes."""
    table = Table(title="Peers", title_justify="left")
    _columns(table, "structures", "ours ms", "peer ms", "ratio", "min–max", "agreement")
    for name, e in document["entries"].items():
        if "ratio" not in e:
            continue
        r = e["ratio"]
        agreement = [v for k, v in e.items() if k.endswith("_difference")]
        table.add_row(
            name.replace(" / ", " ").replace("training step", "training"),
            str(e["structures"]),
            f"{1e3 * e['ours_s']['median']:.4g}",
            f"{1e3 * e['peer_s']['median']:.4g}",
            f"{r['median']:.2f}",
            f"{r['min']:.2f}–{r['max']:.2f}",
            f"{max(agreement):.0e}" if agreement else "–",
        )
    return table
