"""What a compiled program costs: floating-point operations, bytes moved, memory.

XLA's cost analysis counts the body of a loop once, however often it runs (in every version tried, a
scan of 1, 4 and 16 steps has the same number of operations). RelaxNet's ODE, its layers and its
triplets are all loops. The analysis is therefore done once for the program and once for the body of
each loop, and the body is multiplied by the number of trips that XLA knows.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from relaxnet_jax.data.files import one_line

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_WHILE = re.compile(r"\bwhile\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLS = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of one execution of a program.

    Attributes:
      flops: arithmetic operations of the traced program, loops times their trips: the products and
        sums of matrix products, and one per element of any other arithmetic result;
        including what the reverse pass recomputes.
      xla_flops: XLA's own count for what it compiled, loops times their trips. It is lower where XLA
        calls a library for matrix products, which it does not look into (GPU).
      xla_bytes: bytes that XLA's kernels read and write, loops times their trips. Data that stay in a
        cache between two kernels count too, so this is an upper estimate of the traffic to memory.
      loops_of_unknown_length: number of loops that count once because XLA does not know their trips.
      remark: why XLA's two figures are None, if its analysis is not available; else empty.
    """

    flops: float
    xla_flops: float | None
    xla_bytes: float | None
    loops_of_unknown_length: int
    remark: str = ""


def program_costs(jaxpr: Any, compiled: Any) -> Costs:
    """The costs of a program from its trace (a closed jaxpr) and its compilation."""
    flops, unknown = traced_flops(jaxpr)
    try:
        found, loops = _with_trips(compiled.as_text())
    except (ImportError, AttributeError, KeyError, ValueError, RuntimeError) as error:
        # XLA's analysis of a module is not public, and the form of a module's text is not guaranteed.
        remark = f"XLA's cost analysis cannot be used: {type(error).__name__}: {one_line(error)}"
        return Costs(flops, None, None, unknown, remark)
    return Costs(flops, found["flops"], found["bytes accessed"], max(unknown, loops))


def memory_bytes(compiled: Any) -> int:
    """Bytes a program needs at its peak: arguments, results and temporaries, per device."""
    m = compiled.memory_analysis()
    return int(
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        + m.temp_size_in_bytes
        - m.alias_size_in_bytes
    )


def _with_trips(text: str) -> tuple[dict[str, float], int]:
    """Operations and bytes of a module, given as text, with loop bodies times their trips.

    XLA's figure for a computation holds each loop in it once. For every further trip, the figure for
    the loop's body as a program of its own is added, and so on for loops within loops.
    """
    computations, entry = _split(text)
    keys = ("flops", "bytes accessed")
    known: dict[str, dict[str, float]] = {}
    unknown = 0

    def once(name: str) -> dict[str, float]:
        if name not in known:
            known[name] = _analyse(computations, name)
        return known[name]

    def total(name: str) -> dict[str, float]:
        nonlocal unknown
        result = {k: once(name).get(k, 0.0) for k in keys}
        for parts, trips in _loops(computations, name):
            if trips is None:
                unknown += 1
            for part in parts:
                full, counted = total(part), once(part)
                for k in keys:
                    result[k] += (trips or 1) * full[k] - counted.get(k, 0.0)
        return result

    return total(entry), unknown


def _split(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of an HLO module, and the name of its entry."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            current = computations.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        if current is not None:
            current.append(line)
            if line.startswith("}"):
                current = None
    return computations, entry


def _called(line: str) -> list[str]:
    names = _CALLS.findall(line)
    for group in _BRANCHES.findall(line):
        names += [name.strip().lstrip("%") for name in group.split(",")]
    return names


def _loops(computations: dict[str, list[str]], name: str) -> list[tuple[tuple[str, str], Any]]:
    """((body, condition), trips) of each loop in a computation and in those that it calls."""
    found: list[tuple[tuple[str, str], Any]] = []
    for line in computations[name]:
        loop = _WHILE.search(line)
        if loop:
            trips = _TRIPS.search(line)
            found.append(((loop[2], loop[1]), int(trips[1]) if trips else None))
            continue
        for called in _called(line):
            found += _loops(computations, called)
    return found


def _analyse(computations: dict[str, list[str]], name: str) -> dict[str, float]:
    """XLA's cost analysis of one computation, as the entry of a module of its own."""
    from jax._src.lib import xla_client

    needed, waiting = {name}, [name]
    while waiting:
        for line in computations[waiting.pop()]:
            loop = _WHILE.search(line)
            for called in [*_called(line), *(loop.groups() if loop else ())]:
                if called not in needed:
                    needed.add(called)
                    waiting.append(called)
    blocks = []
    for other, lines in computations.items():  # callees stand before their callers
        if other in needed:
            head = lines[0].removeprefix("ENTRY ")
            blocks.append("\n".join([f"ENTRY {head}" if other == name else head, *lines[1:]]))
    # stack_frame_id refers to tables at the top of the module, which are not copied.
    body = re.sub(r" stack_frame_id=\d+", "", "\n\n".join(blocks))
    xla: Any = xla_client._xla
    reader = getattr(xla_client, "hlo", xla)  # moved to its own module in jaxlib 0.12.0.1
    module = reader.hlo_module_from_text(f"HloModule part\n\n{body}\n")
    # A GPU's client cannot analyse modules; the CPU's can, any module (JAX_PLATFORMS=cuda hides it).
    return xla.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)


# Traced programs

# Primitives without arithmetic, which move data or do nothing.
_FREE = frozenset(
    {
        "bitcast_convert_type",
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "copy_p",
        "device_put",
        "dynamic_slice",
        "dynamic_update_slice",
        "gather",
        "iota",
        "name",
        "optimization_barrier",
        "pad",
        "random_unwrap",
        "random_wrap",
        "reshape",
        "rev",
        "slice",
        "split",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)


def traced_flops(jaxpr: Any) -> tuple[float, int]:
    """Arithmetic operations of a closed jaxpr, and the number of loops in it of unknown length.

    A matrix product counts 2·B·M·N·K; a reduction or scatter the size of its largest input; moving or
    reshaping data nothing; anything else one per element of the result. Of the branches of a
    conditional, the most expensive counts.
    """
    total, unknown = 0.0, 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        inner = [
            x
            for value in params.values()
            for x in (value if isinstance(value, tuple | list) else (value,))
            if hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")
        ]
        if name == "cond":
            parts = [traced_flops(x) for x in inner]
            total += max(flops for flops, _ in parts)
            unknown += sum(loops for _, loops in parts)
        elif inner and not name.startswith(("reduce", "scatter")):
            if name in ("custom_jvp_call", "custom_vjp_call"):
                inner = inner[:1]
            times = params["length"] if name == "scan" else 1
            unknown += name == "while"
            for x in inner:
                flops, loops = traced_flops(x)
                total, unknown = total + times * flops, unknown + loops
        elif name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            length = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * _size(equation.outvars[0]) * length
        elif name.startswith(("reduce", "scatter", "arg", "cum", "sort")):
            total += max(_size(x) for x in equation.invars)
        elif name not in _FREE:
            total += sum(_size(x) for x in equation.outvars)
    return total, unknown


def _size(variable: Any) -> int:
    return int(np.prod(getattr(variable.aval, "shape", ()), dtype=np.int64))
