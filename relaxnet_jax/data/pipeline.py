"""Padded training batches, prefetched by grain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from relaxnet_jax.batching import BatchShape, collate
from relaxnet_jax.config import Config
from relaxnet_jax.data.buckets import Buckets
from relaxnet_jax.data.sample import Sample, frame_slots
from relaxnet_jax.losses import CellTargets, Targets
from relaxnet_jax.typing import Graph


def collate_samples(
    samples: Sequence[Sample], shape: BatchShape, config: Config, dtype=np.float32
) -> tuple[Graph, Targets]:
    """Collates samples into a padded batch and its targets.

    Structures are centred at the coordinate origin, as in prediction: far from it, ``dtype`` would
    round distances.
    """
    n, N, G = frame_slots(config), shape.n_atoms, shape.n_graphs
    positions, forces = np.zeros((n, N, 3), dtype), np.zeros((n, N, 3), dtype)
    energies, times = np.zeros((n, G), dtype), np.zeros((n, G), dtype)
    frame_mask, last = np.zeros((n, G), bool), np.zeros(G, np.int32)
    offset = 0
    for index, s in enumerate(samples):
        rows = slice(offset, offset + s.structure.n_atoms)
        positions[:, rows] = s.positions - s.structure.origin
        forces[:, rows] = s.forces
        energies[:, index], times[:, index], frame_mask[:, index] = (
            s.energies,
            s.times,
            s.frame_mask,
        )
        last[index] = np.flatnonzero(s.frame_mask)[-1]
        offset = rows.stop
    cells = _cell_targets(samples, n, G, dtype) if config.dynamics.cell == "variable" else None
    own_times = times if config.data.frame_selection == "all" else None
    graph = collate([s.structure.centred() for s in samples], shape, dtype)
    return graph, Targets(positions, forces, energies, frame_mask, last, own_times, cells)


def _cell_targets(samples: Sequence[Sample], n: int, G: int, dtype) -> CellTargets:
    deformation = np.broadcast_to(np.eye(3), (n, G, 3, 3)).copy()
    stress, mask = np.zeros((n, G, 3, 3), dtype), np.zeros((n, G), bool)
    for index, s in enumerate(samples):
        deformation[:, index], stress[:, index] = s.deformations, s.stresses
        mask[:, index] = s.stress_mask
    inverse = np.linalg.inv(deformation)
    return CellTargets(deformation.astype(dtype), inverse.astype(dtype), stress, mask)


def epoch_iterator(
    plan: Sequence[tuple[int, list[int]]],
    samples: Sequence[Sample],
    buckets: Buckets,
    config: Config,
    threads: int = 1,
) -> Iterator[tuple[int, list[int], tuple[Graph, Targets]]]:
    """Yields (bucket, sample indices, batch) in the order of the plan, collated ahead in threads."""

    def load(entry):
        bucket, indices = entry
        chosen = [samples[i] for i in indices]
        return bucket, indices, collate_samples(chosen, buckets.shapes[bucket], config)

    dataset = grain.MapDataset.source(list(plan)).map(load)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * max(threads, 1))
    return iter(dataset.to_iter_dataset(options))
