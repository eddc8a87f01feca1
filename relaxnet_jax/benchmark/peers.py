"""``relaxnet-jax benchmark peers``: RelaxNet and other programs, side by side in one run.

The eager PyTorch peer has our parameters, batches and solver steps and the number of threads that suits it
best (one or all cores), and the two take turns. The relaxers predict something else for the same
structures, the minimum of a potential, so only their time is compared. Peers that are not installed are
named and left out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from relaxnet_jax.benchmark import machine, relaxers
from relaxnet_jax.benchmark.notebook import Notebook, conditions
from relaxnet_jax.benchmark.timing import compile_once, measure, measure_alternating, summary
from relaxnet_jax.benchmark.work import (
    BucketWork,
    Work,
    inference_step,
    load_work,
    shared_training,
    training_step,
)
from relaxnet_jax.config import Config
from relaxnet_jax.errors import InputError
from relaxnet_jax.predict import relax
from relaxnet_jax.runtime import usable_cores

PARTS = ("torch", "chgnet", "torch-sim")
# The modules that each part imports, and the extra that installs them.
NEEDS = {
    "torch": (("torch", "torchdiffeq"), "'relaxnet-jax[bench]'"),
    "chgnet": (("torch", "chgnet"), "'relaxnet-jax[chgnet]'"),
    "torch-sim": (("torch", "chgnet", "torch_sim"), "'relaxnet-jax[chgnet]' torch-sim-atomistic"),
}
PACKAGES = (*machine.PACKAGES, "torch", "torchdiffeq", "chgnet", "torch-sim-atomistic")
MINUTES, FAST_MINUTES = 10.0, 2.0
TOLERANCE = 1e-3  # for the loss and the trajectories, in single precision
PAUSE = 0.02  # s, before each run, until idle threads of the other program have stopped spinning
STRUCTURES, FAST_STRUCTURES = 8, 2  # relaxed by each relaxer
RELAX_SECONDS = 90.0  # s, after which no further relaxation begins


def run_peers(
    config: Config,
    path: Path,
    report: Callable[[str], None],
    fast: bool = False,
    only: Sequence[str] | None = None,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Runs the comparisons and returns the document, which is written to ``path`` as it grows.

    Args:
      config: a configuration with its data.
      path: the JSON file.
      report: called with one line for each remark.
      fast: one bucket and few structures only.
      only: which of `PARTS` to run; by default all that are installed.
      minutes: time after which no comparison begins (default 10, fast 2).

    Raises:
      InputError: the data are unusable, the peer does not implement the configuration, a part of
        ``only`` is not installed, or JAX is on an accelerator (PyTorch would run on the CPU).
    """
    if jax.devices()[0].platform != "cpu":
        raise InputError(
            "benchmark peers runs on CPUs only; set JAX_PLATFORMS=cpu in the environment"
        )
    parts = _installed(only, report)
    facts = machine.describe(PACKAGES)
    identity = conditions(facts, [config], fast=fast, only=parts, threads=usable_cores())
    if minutes is None:
        minutes = FAST_MINUTES if fast else MINUTES
    notebook = Notebook(path, identity, minutes, report)
    work = load_work(config, report)
    if "torch" in parts:
        for index, bucket in enumerate(work.buckets[: 1 if fast else None]):
            for kind, entry in (("training step", training_entry), ("inference", inference_entry)):
                notebook.entry(
                    f"eager PyTorch / {kind} / bucket {index}",
                    lambda e=entry, b=bucket: e(work, b),  # type: ignore[misc]
                )
    count = FAST_STRUCTURES if fast else STRUCTURES
    if "chgnet" in parts:
        notebook.entry("CHGNet + ASE LBFGS", lambda: chgnet_entry(work, count))
    if "torch-sim" in parts:
        notebook.entry("CHGNet + torch-sim FIRE", lambda: torch_sim_entry(work, count))
    notebook.finish()
    return notebook.document(not notebook.missing) | {"machine": facts}


def _installed(only: Sequence[str] | None, report: Callable[[str], None]) -> list[str]:
    found = []
    for part in only or PARTS:
        modules, extra = NEEDS[part]
        absent = [m for m in modules if importlib.util.find_spec(m) is None]
        if not absent:
            found.append(part)
            continue
        message = f"{part}: missing {', '.join(absent)}; pip install {extra}"
        if only:
            raise InputError(message)
        report(message)
    if not found:
        raise InputError("no peer is installed; pip install 'relaxnet-jax[bench]'")
    return found


# The same architecture in PyTorch


def training_entry(work: Work, bucket: BucketWork) -> dict[str, Any]:
    """A training step of both, after checking that they have the same loss.

    Ours runs as `train` does, with the batch divided among the cores, and also as one program.
    """
    from relaxnet_jax.benchmark import peer_torch

    graph, targets = bucket.batch
    peer_graph = peer_torch.peer_graph(graph)
    peer_targets = peer_torch.peer_targets(graph, targets)
    trainer = peer_torch.PeerTraining(peer_torch.peer_network(work.model), work.scale)
    shared = shared_training(work, bucket, lambda _: None)
    step = training_step(work, bucket.batch)
    _, compiled, _ = compile_once(step.function, step.arguments, step.donate)
    alone = step.runner(compiled)
    difference = 0.0
    for _ in range(3):
        theirs = trainer.step(peer_graph, peer_targets)
        for own in (shared()["loss"], alone()[1]["loss"]):
            difference = max(difference, abs(float(own) - theirs) / abs(theirs))
    _check(difference, "the losses of three steps")
    facts = {"loss_difference": difference, "cores_sharing": jax.local_device_count()}
    return facts | _ratios(
        shared, lambda: trainer.step(peer_graph, peer_targets), bucket, {"one_program": alone}
    )


def inference_entry(work: Work, bucket: BucketWork) -> dict[str, Any]:
    """The trajectories of a batch by both, after checking that they agree."""
    from relaxnet_jax.benchmark import peer_torch

    graph, _ = bucket.batch
    peer_graph = peer_torch.peer_graph(graph)
    network = peer_torch.peer_network(work.model).requires_grad_(False)
    step = inference_step(work.model, graph)
    _, compiled, _ = compile_once(step.function, step.arguments, step.donate)
    ours = step.runner(compiled)

    def theirs():
        return peer_torch.infer(network, peer_graph, work.scale)

    result, other = jax.device_get(ours()), theirs()
    atoms, structures = np.asarray(graph.nodes["mask"]), np.asarray(graph.globals["mask"])
    differences = {
        "positions_difference": _largest(result.positions[:, atoms], other.positions),
        "energies_difference": _largest(result.energies[:, structures], other.energies),
        "forces_difference": _largest(result.forces[:, atoms], other.forces),
    }
    _check(max(differences.values()), "the trajectories")
    return differences | _ratios(ours, theirs, bucket)


def _fastest_threads(run: Callable[[], Any]) -> int:
    """Sets PyTorch's threads to all cores or to one, whichever runs faster; returns the number.

    Both have all cores at their disposal; on small tensors PyTorch is often faster on one.
    """
    import torch

    seconds: dict[int, float] = {}
    for threads in sorted({1, usable_cores()}):
        torch.set_num_threads(threads)
        found = []
        for _ in range(3):  # the first run with a number of threads starts them
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
            if found[-1] > 3 * min(seconds.values(), default=np.inf):
                break
        seconds[threads] = min(found)
    best = min(seconds, key=seconds.__getitem__)
    torch.set_num_threads(best)
    return best


def _largest(ours: np.ndarray, theirs: Any) -> float:
    """Largest difference, relative where values exceed one."""
    other = theirs.numpy()
    return float((np.abs(ours - other) / np.maximum(np.abs(other), 1.0)).max())


def _check(difference: float, what: str) -> None:
    if not difference < TOLERANCE:
        raise RuntimeError(f"{what} of RelaxNet and of the PyTorch peer differ by {difference:.2g}")


def _ratios(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    bucket: BucketWork,
    more: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Any]:
    """Seconds of both and of ``more``, taking turns, and how many times longer the peer takes."""
    threads = _fastest_threads(theirs)

    def paused(run):
        def waiting():
            time.sleep(PAUSE)
            return run()

        return waiting

    runs = {k: paused(v) for k, v in {"ours": ours, "peer": theirs, **(more or {})}.items()}
    times = {
        name: [max(t - PAUSE, 1e-9) for t in values]
        for name, values in measure_alternating(runs, seconds=20.0, least=5).items()
    }
    return {
        "structures": len(bucket.structures),
        "peer_threads": threads,
        **{f"{k}_s": dataclasses.asdict(summary(v)) for k, v in times.items()},
        "ratio": _spread([b / a for a, b in zip(times["ours"], times["peer"])]),
    }


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}


# Relaxations with a potential


def chgnet_entry(work: Work, count: int) -> dict[str, Any]:
    """Seconds per structure of our predicted paths, and of CHGNet relaxations one after the other."""
    structures = [relaxers.atoms_of(s) for s in _some(work, count)]
    model = relaxers.load_chgnet()
    threads = _fastest_threads(lambda: relaxers.chgnet_energy(model, structures[0]))
    begin = time.perf_counter()
    taken: list[tuple[float, int, bool]] = []
    for atoms in structures:
        if taken and time.perf_counter() - begin > RELAX_SECONDS:
            break
        taken.append(relaxers.relax_with_lbfgs(model, atoms))
    seconds, steps, converged = zip(*taken)
    ours = _ours(work, structures[: len(taken)])
    return {
        "structures": len(taken),
        "peer_threads": threads,
        "atoms": [len(a) for a in structures[: len(taken)]],
        "steps": list(steps),
        "converged": sum(converged),
        "ours_s": {"median": ours},
        "peer_s": dataclasses.asdict(summary(list(seconds))),
        "ratio": _spread([s / ours for s in seconds]),
    }


def torch_sim_entry(work: Work, count: int) -> dict[str, Any]:
    """Seconds per structure of our predicted paths, and of one batched relaxation with torch-sim."""
    free = [s for s in _some(work, count) if not s.fixed_mask.any()]
    if not free:
        return {"skipped": "every structure has fixed atoms, which torch-sim does not support"}
    structures = [relaxers.atoms_of(s) for s in free]
    model = relaxers.load_chgnet()
    threads = _fastest_threads(lambda: relaxers.chgnet_energy(model, structures[0]))
    ours = _ours(work, structures)
    seconds, fmax = relaxers.relax_with_torch_sim(model, structures)
    each = seconds / len(structures)
    return {
        "structures": len(structures),
        "peer_threads": threads,
        "atoms": [len(a) for a in structures],
        "converged": sum(f <= relaxers.FMAX for f in fmax),
        "ours_s": {"median": ours},
        "peer_s": {"median": each},
        "ratio": _spread([each / ours]),
    }


def _some(work: Work, count: int) -> list[Any]:
    return [s for bucket in work.buckets for s in bucket.structures][:count]


def _ours(work: Work, structures: list[Any]) -> float:
    """Seconds per structure from ASE Atoms to paths, with neighbour lists but without compilation."""
    frames = work.config.dynamics.frames
    timing = measure(lambda: relax(work.model, structures, frames))
    return timing.median / len(structures)
