"""``relaxnet-jax benchmark speed``: steps of every configuration and bucket, and scaling curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from relaxnet_jax.benchmark import machine
from relaxnet_jax.benchmark.costs import memory_bytes, program_costs
from relaxnet_jax.benchmark.kernels import device_kernels
from relaxnet_jax.benchmark.notebook import Notebook, conditions
from relaxnet_jax.benchmark.scaling import scaling_entries
from relaxnet_jax.benchmark.timing import compile_twice, measure
from relaxnet_jax.benchmark.work import BucketWork, Step, Work, inference_step, load_work
from relaxnet_jax.benchmark.work import training_step as make_training_step
from relaxnet_jax.config import Config

PARTS = ("steps", "atoms", "frames", "training")
MINUTES, FAST_MINUTES = 10.0, 2.0


def run_speed(
    configs: Sequence[Config],
    path: Path,
    report: Callable[[str], None],
    fast: bool = False,
    only: Sequence[str] = PARTS,
    minutes: float | None = None,
    kernels: bool = False,
) -> dict[str, Any]:
    """Runs the measurements and returns the document, which is written to ``path`` as it grows.

    An interrupted run continues if it is given the same configurations, data, device, versions and
    parts; a complete one is measured again.

    Args:
      configs: the configurations, each with its data.
      path: the JSON file.
      report: called with one line for each remark.
      fast: measures the first bucket of each configuration only, and few points of the first one's
        curves.
      only: which of `PARTS` to measure: steps (training and inference by bucket), atoms and frames
        (curves of inference), training (curve of the training step).
      minutes: time after which no measurement begins (default 10, fast 2).
      kernels: whether steps are profiled too.

    Raises:
      InputError: the data cannot be used, or the output cannot be written.
    """
    parts = tuple(only)
    facts = machine.describe()
    identity = conditions(facts, configs, fast=fast, only=parts, kernels=kernels)
    if minutes is None:
        minutes = FAST_MINUTES if fast else MINUTES
    notebook = Notebook(path, identity, minutes, report)
    ceilings = notebook.entry("ceilings", lambda: machine.ceilings(0.5 if fast else 2.0))
    first, *others = configs

    def steps(config: Config) -> None:
        if "steps" in parts:
            buckets = 1 if fast else None
            _steps(config, notebook, ceilings or {}, report, buckets, kernels)

    def curves(*wanted: str) -> None:
        # Only for the first configuration, since each point is a program to compile.
        for key, entry in scaling_entries(first, fast, tuple(p for p in parts if p in wanted)):
            notebook.entry(key, entry)

    # The most informative first, since the time may run out.
    steps(first)
    curves("atoms", "frames")
    for config in others:
        steps(config)
    curves("training")
    notebook.finish()
    return notebook.document(not notebook.missing) | {"machine": facts}


def _steps(
    config: Config,
    notebook: Notebook,
    ceilings: dict[str, Any],
    report: Callable[[str], None],
    buckets: int | None,
    kernels: bool,
) -> None:
    work = load_work(config, report)
    for index, bucket in enumerate(work.buckets[:buckets]):
        for kind, step in step_kinds(work, bucket).items():
            key = f"{config.name} / {kind} / bucket {index}"
            notebook.entry(
                key,
                lambda b=bucket, s=step: step_entry(work, b, s, ceilings, kernels),  # type: ignore[misc]
            )


def step_kinds(work: Work, bucket: BucketWork) -> dict[str, Step]:
    """The steps that are timed on a bucket, by name."""
    kinds = {"training step": make_training_step(work, bucket.batch)}
    if work.config.train.static_epochs:
        kinds["static training step"] = make_training_step(work, bucket.batch, static=True)
    return kinds | {"inference": inference_step(work.model, bucket.batch[0])}


def step_entry(
    work: Work,
    bucket: BucketWork,
    step: Step,
    ceilings: dict[str, Any],
    kernels: bool = False,
) -> dict[str, Any]:
    """Compilation, time, throughput, costs and memory of a step on one bucket; if wanted, its kernels.

    Throughput counts real structures and atoms, as many as a batch of this bucket holds on average. The
    time of a step does not depend on how full its batch is.
    """
    frames = work.config.dynamics.frames
    peak = machine.device_peak_bytes()
    jaxpr, compiled, compilation = compile_twice(step)
    need = memory_bytes(compiled)
    if reason := machine.no_room(need):
        return {"skipped": reason}
    costs = program_costs(jaxpr, compiled)
    runner = step.runner(compiled)
    timing = measure(runner)
    risen = machine.device_peak_bytes()
    found: dict[str, Any] = {
        "data": work.data,
        "shape": dataclasses.asdict(bucket.shape),
        "mean_structures": bucket.mean_structures,
        "mean_atoms": bucket.mean_atoms,
        "frames": frames,
        "batches_per_epoch": bucket.batches,
        "padding": bucket.padding,
        "atom_padding": bucket.atom_padding,
        "seconds": dataclasses.asdict(timing),
        "structures_per_s": bucket.mean_structures / timing.median,
        "atom_frames_per_s": bucket.mean_atoms * frames / timing.median,
        "compile_s": dataclasses.asdict(compilation),
        "memory_bytes": need,
        # A peak since the process began, which tells something of this step only if it has risen.
        "device_peak_bytes": risen if risen != peak else None,
        "costs": dataclasses.asdict(costs),
    }
    if kernels:
        found["kernels"] = device_kernels(runner)
    if ceilings:
        rates = {
            "share_of_matmul": (costs.flops, "matmul_flops_per_s"),
            "share_of_copy": (costs.xla_bytes, "copy_bytes_per_s"),
            "share_of_cache_copy": (costs.xla_bytes, "cache_copy_bytes_per_s"),
        }
        for name, (amount, ceiling) in rates.items():
            if amount is not None:
                found[name] = amount / timing.median / ceilings[ceiling]
    return found
