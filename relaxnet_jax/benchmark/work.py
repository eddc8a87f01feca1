"""The work that is timed: the batches, model and steps of a training run on some data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from relaxnet_jax.batching import BatchShape, fitting_shape, largest_shape
from relaxnet_jax.benchmark.timing import Step
from relaxnet_jax.config import Config
from relaxnet_jax.data.buckets import pack_epoch
from relaxnet_jax.data.dataset import load_dataset
from relaxnet_jax.data.pipeline import collate_samples
from relaxnet_jax.data.sample import Sample
from relaxnet_jax.graph import Structure
from relaxnet_jax.losses import Targets
from relaxnet_jax.model import RelaxNet, create_model, solve_compiled
from relaxnet_jax.solver import solve_trajectory
from relaxnet_jax.train.data import prepare
from relaxnet_jax.train.parallel import Devices
from relaxnet_jax.train.state import initial_train_state
from relaxnet_jax.train.step import make_train_step
from relaxnet_jax.typing import Graph


@dataclasses.dataclass(frozen=True)
class BucketWork:
    """One bucket of an epoch over the training split.

    Attributes:
      shape: shape of its batches.
      batch: its fullest batch, on the device.
      samples: the samples in that batch.
      mean_structures, mean_atoms: real structures and atoms per batch, averaged over an epoch.
      batches: number of batches in an epoch.
      padding: fraction of the bucket's edge and triplet slots that are unused, over an epoch.
      atom_padding: the same for atom slots.
    """

    shape: BatchShape
    batch: tuple[Graph, Targets]
    samples: tuple[Sample, ...]
    mean_structures: float
    mean_atoms: float
    batches: int
    padding: float
    atom_padding: float

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The real structures of the batch."""
        return tuple(s.structure for s in self.samples)


@dataclasses.dataclass(frozen=True)
class Work:
    """The model of a configuration (untrained), and its buckets on some data."""

    config: Config
    data: str
    model: RelaxNet
    buckets: tuple[BucketWork, ...]

    @property
    def scale(self) -> float:
        """Energy scale in eV: the spread per atom in the training set."""
        return float(self.model.energy_scale)


def load_work(config: Config, report: Callable[[str], None]) -> Work:
    """Data, buckets and batches as a training run of this configuration would have them.

    Raises:
      InputError: the data are unusable, see `data.dataset.load_dataset`; or the training or validation
        split has no usable relaxation.
    """
    data = prepare(config, load_dataset(config, report), report)
    sizes, buckets, t = data.samples.sizes, data.buckets, config.train
    plan = pack_epoch(buckets, sizes, np.random.default_rng(t.seed), data.members["train"])
    made = []
    for index, shape in enumerate(buckets.shapes):
        batches = [members for bucket, members in plan if bucket == index]
        if not batches:  # a bucket for validation relaxations only
            continue
        fullest = max(batches, key=len)
        inside = [i for members in batches for i in members]
        atoms, cost = sizes.atoms[inside].sum(), sizes.cost[inside].sum()
        samples = [data.samples[i] for i in fullest]
        made.append(
            BucketWork(
                shape=shape,
                batch=jax.device_put(collate_samples(samples, shape, config)),
                samples=tuple(samples),
                mean_structures=len(inside) / len(batches),
                mean_atoms=float(atoms) / len(batches),
                batches=len(batches),
                padding=1.0 - float(cost) / (shape.cost * len(batches)),
                atom_padding=1.0 - float(atoms) / (shape.n_atoms * len(batches)),
            )
        )
    model = dataclasses.replace(
        create_model(config, t.seed),
        element_energies=data.element_energies,
        energy_scale=np.asarray(data.scale, np.float32),
    )
    return Work(config, data.dataset.name, model, tuple(made))


def training_step(work: Work, batch: tuple[Graph, Targets], static: bool = False) -> Step:
    """Forward, loss, backward and optimiser, as in training on one device."""
    state = initial_train_state(work.model.params, work.config.train)
    rate = jnp.asarray(work.config.train.learning_rate, jnp.float32)
    return Step(
        make_train_step(work.config, work.scale, static=static, stored=True),
        (state, batch, rate, jax.random.key(0)),
        donate=(0,),
        advance=lambda result, arguments: (result[0], *arguments[1:]),
        plain=make_train_step(work.config, work.scale, static=static),
    )


def shared_training(
    work: Work, bucket: BucketWork, report: Callable[[str], None]
) -> Callable[[], dict[str, Any]]:
    """A training step on the bucket's batch, divided among all local devices as `train` does on a CPU.

    Every call continues from the last and returns the metrics.
    """
    devices = Devices(log=report)
    parts = [bucket.samples[k :: devices.n] for k in range(devices.n)]
    shapes = [fitting_shape([s.structure for s in part]) for part in parts]
    # As much padding as the whole batch has, since a bucket of smaller batches is about as full.
    whole = dataclasses.asdict(bucket.shape)
    share = {k: v if k == "n_slots" else -(-v // devices.n) for k, v in whole.items()}
    shape = largest_shape([*shapes, BatchShape(**share)])
    batch = devices.stack([collate_samples(part, shape, work.config) for part in parts])
    step = devices.compile(
        make_train_step(work.config, work.scale, devices.axis, stored=True),
        "training step",
        (True, True, False, False),
        donate=(0,),
    )
    state = devices.replicate(initial_train_state(work.model.params, work.config.train))
    rate, key = np.float32(work.config.train.learning_rate), jax.random.key_data(jax.random.key(0))

    def run() -> dict[str, Any]:
        nonlocal state
        state, metrics = step(state, batch, rate, key)
        return jax.device_get(devices.first(metrics))

    return run


def inference_step(model: RelaxNet, graph: Graph) -> Step:
    """The trajectories of a batch on the configuration's frames."""

    scale = jnp.asarray(model.energy_scale)

    def solve(params, graph):
        return solve_compiled.inline(model.network, params, scale, graph)

    def plain(params, graph):
        return solve_trajectory(model.network, params, scale, graph)

    return Step(solve, (model.params, graph), plain=plain)
