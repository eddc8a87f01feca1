"""The data a run trains and validates on: samples of a data set's splits, in buckets."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

from relaxnet_jax.config import Config
from relaxnet_jax.data.buckets import Buckets, plan_buckets
from relaxnet_jax.data.dataset import Dataset
from relaxnet_jax.data.references import fit_element_energies
from relaxnet_jax.data.sample_file import SampleFile, SampleView, prepare_samples
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import MAX_ATOMIC_NUMBER
from relaxnet_jax.model import RelaxNet
from relaxnet_jax.train.beginning import Beginning
from relaxnet_jax.train.hosts import Hosts
from relaxnet_jax.train.start import energy_scale

# eV/atom; a larger spread of energies about the composition energies suggests several sources. Within
# one source it was 0.005 to 0.4.
MIXED = 1.0


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The usable relaxations of the training and validation splits.

    Attributes:
      dataset: the data set that they belong to.
      samples: all samples, with energies relative to ``element_energies``.
      members: indices into ``samples``, by split; those of "train" include the later starts.
      buckets: batch shapes for the samples.
      shares: number of parts into which a batch of ``train.batch_size`` is divided in them.
      scale: eV/atom, the spread about ``element_energies``, or the scale of the model the run starts
        from.
      seen: (119,) bool, by atomic number, the elements of the training split.
      relaxations: number of relaxations among the training members.
      later_starts: number of later starts among the training members.
    """

    dataset: Dataset
    samples: SampleView
    members: dict[str, np.ndarray]
    buckets: Buckets
    shares: int
    scale: float
    seen: np.ndarray
    relaxations: int
    later_starts: int

    @property
    def element_energies(self) -> np.ndarray:
        """(119,) eV, fitted to the training split."""
        return self.samples.element_energies

    def buckets_of(self, shares: int, config: Config) -> Buckets:
        """The buckets for another number of shares, with which a part of an epoch was done."""
        return self.buckets if shares == self.shares else _plan(self.samples, shares, config)

    @property
    def digest(self) -> str:
        """A hash that is the same where epochs are planned alike."""
        found = hashlib.sha256()
        for array in (self.samples.rows, *self.samples.sizes, *self.members.values()):
            found.update(np.asarray(array, "<i8").tobytes())
        found.update(self.dataset.trajectories.store.checksum.encode())
        return found.hexdigest()

    def surroundings(self) -> dict[str, tuple[float, float]]:
        """Ranges (min, max) of the values of `trust.surroundings` over the first training frames."""
        atoms, edges, bonds, *_ = (v[self.members["train"]] for v in self.samples.sizes)
        means = {"density": edges / atoms, "coordination": bonds / atoms}
        return {name: (float(v.min()), float(v.max())) for name, v in means.items()}

    def tell(self, report: Callable[[str], None]) -> None:
        """Reports counts and batch shapes."""
        later = f" (and {self.later_starts} later starts of them)" if self.later_starts else ""
        report(
            f"{self.dataset.name}: {self.relaxations} training{later}, "
            f"{len(self.members['validation'])} validation, {len(self.dataset.splits['test'])} test "
            f"relaxations; {len(self.buckets.shapes)} bucket(s), padding "
            f"{100 * self.buckets.padding:.0f} %"
        )
        for shape in self.buckets.shapes:
            report(
                f"  bucket: {shape.n_graphs - 1} structures, {shape.n_atoms} atoms, {shape.n_edges} edges, "
                f"{shape.n_bonds} bonds"
            )


def prepare(
    config: Config,
    dataset: Dataset,
    report: Callable[[str], None],
    start: RelaxNet | None = None,
    shares: int = 1,
    hosts: Hosts | None = None,
    began: Beginning | None = None,
) -> TrainingData:
    """Prepares samples and buckets of the training and validation splits.

    Args:
      config: configuration of the run.
      dataset: relaxations and their splits.
      report: called with messages, such as what is left out.
      start: the model the run starts from, whose energy scale is kept.
      shares: number of parts into which a batch of ``train.batch_size`` is divided.
      hosts: the processes that train together.
      began: the beginning of a resumed run, whose composition energies and scale are kept.

    Raises:
      InputError: a split has no usable relaxation, or model.charges is on and no relaxation has any.
    """
    hosts = hosts or Hosts()
    found, splits = dataset.trajectories, dataset.splits
    energies, spread, seen = fit_element_energies(
        (found.store.energies(int(found.rows[i])) for i in splits["train"]), MAX_ATOMIC_NUMBER + 1
    )
    kept = energies.tolist(), energy_scale(start, spread)
    if began is not None:
        kept = began.element_energies, began.scale
    # All take process 0's: the last bits of a fit depend on the processor.
    energies, scale, spread = hosts.share([*kept, spread])
    if spread > MIXED:
        report(
            f"{config.data.path}: energies scatter by {spread:.3g} eV/atom around the composition "
            "energies: do they come from several codes, functionals or settings? Absolute energies of "
            "different ones must not be mixed in one training set; relaxnet-jax data info lists the sources"
        )
    if config.model.charges:
        _check_charges(config, dataset, report)
    every, later = found.with_later_starts(splits["train"], config.data.later_starts)
    file = hosts.in_turn(lambda: prepare_samples(every, config, report))
    used = _usable((*splits["train"], *splits["validation"], *later), file, seen, report)
    samples = SampleView(file, used, np.array(energies))
    in_train = np.isin(used, [*splits["train"], *later])
    members = {"train": np.flatnonzero(in_train), "validation": np.flatnonzero(~in_train)}
    for name, indices in members.items():
        if len(indices) == 0:
            raise InputError(
                f"{config.data.path}: no usable relaxation in the {name} split; import more data "
                "or change data.splits"
            )
    return TrainingData(
        dataset,
        samples,
        members,
        _plan(samples, shares, config),
        shares,
        scale,
        seen,
        relaxations=int(np.isin(used, splits["train"]).sum()),
        later_starts=int(np.isin(used, later).sum()),
    )


def _plan(samples: SampleView, shares: int, config: Config) -> Buckets:
    t = config.train
    batch = max(1, t.batch_size // shares)
    return plan_buckets(samples.sizes, batch, t.max_buckets, t.max_padding)


def _check_charges(config: Config, dataset: Dataset, report: Callable[[str], None]) -> None:
    """Checks that there are charges to train on; where they are missing, they count as zero."""
    found, splits = dataset.trajectories, dataset.splits
    rows = found.rows[[*splits["train"], *splits["validation"]]]
    bare = int((~found.store.has_charges()[rows]).sum())
    if bare == len(rows):
        raise InputError(
            f"model.charges: no relaxation of {config.data.path} has atomic charges; import runs with their "
            "OUTCAR, or structures with initial charges, or set model.charges=False"
        )
    if bare:
        report(f"{bare} of {len(rows)} relaxations have no atomic charges: they count as zero")


def _usable(
    wanted: tuple[int, ...], file: SampleFile, seen: np.ndarray, report: Callable[[str], None]
) -> np.ndarray:
    """The wanted rows that have samples, and only elements that the training split has."""
    unseen = file.has_any(~seen)
    used, foreign = [], []
    for i in map(int, wanted):
        if i in file.left_out:
            report(f"left out: {file.left_out[i]}")
        elif unseen[i]:
            foreign.append(file.id(i))
        else:
            used.append(i)
    if foreign:
        named = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        report(
            f"left out: {len(foreign)} validation relaxation(s) with an element that the "
            f"training split lacks ({named})"
        )
    return np.array(used, np.int64)
