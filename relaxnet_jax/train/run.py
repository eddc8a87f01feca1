"""What a training run has from its beginning to its end: data, compiled steps, batches, validation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from relaxnet_jax.config import Config
from relaxnet_jax.data.buckets import pack_epoch
from relaxnet_jax.data.dataset import Dataset
from relaxnet_jax.data.pipeline import epoch_iterator
from relaxnet_jax.errors import InputError
from relaxnet_jax.model import RelaxNet, save_model
from relaxnet_jax.runtime import usable_cores
from relaxnet_jax.train.beginning import Beginning
from relaxnet_jax.train.checkpoint import MODEL
from relaxnet_jax.train.checks import check_same_data
from relaxnet_jax.train.data import prepare
from relaxnet_jax.train.parallel import Devices
from relaxnet_jax.train.plan import Batches, remaining_runs
from relaxnet_jax.train.report import ConsoleReport, model_score
from relaxnet_jax.train.start import read_start, seen_by_start, start_facts
from relaxnet_jax.train.step import make_eval_step, make_train_step
from relaxnet_jax.train.tally import ValidationTally


class Run:
    """Everything that does not change from epoch to epoch."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        report: ConsoleReport,
        devices: Devices,
        shares: int = 1,
        began: Beginning | None = None,
    ) -> None:
        self.config, self.report = config, report
        self.devices, self.hosts, self.shares = devices, devices.hosts, shares
        if self.devices.n > 1 and config.dynamics.solver != "rk4":
            raise InputError(
                f"dynamics.solver={config.dynamics.solver!r} runs on one device, not on "
                f"{self.devices.n}; give --devices 1 or dynamics.solver=rk4"
            )
        if shares > 1:
            report(f"{shares} cores share each batch")
        t = config.train
        if t.static_epochs >= t.epochs:
            report(
                f"train.static_epochs={t.static_epochs} of train.epochs={t.epochs}: the ODE is never "
                "trained; give more epochs, or fewer static ones"
            )
        for reason, count in dataset.left_out.items():
            report(f"{count} relaxations left out: {reason}")
        if began is None:
            self.start = read_start(config)
            self.start_facts = start_facts(config) | seen_by_start(config, dataset.ids(), report)
        else:  # the start's folder may have moved, or hold another model by now
            self.start, self.start_facts = None, began.start
        self.data = prepare(config, dataset, report, self.start, shares, self.hosts, began)
        self.data.tell(report)
        self.unfit: set[int] = set()  # validation samples already reported as left out
        check_same_data(self.data, config, self.hosts)
        self.train_step, self.static_step = (
            self.devices.compile(
                make_train_step(config, self.data.scale, self.devices.axis, static, stored=True),
                "static training step" if static else "training step",
                (True, True, False, False),
                donate=(0,),
            )
            for static in (False, True)
        )
        self.eval_step = self.devices.compile(
            make_eval_step(config, self.data.scale, self.devices.axis, stored=True),
            "validation step",
            (True, True),
        )

    def beginning(self) -> Beginning:
        """What is fixed by the beginning of the run, for when it is resumed."""
        data = self.data
        return Beginning(
            data.dataset.trajectories.store.checksum,
            data.element_energies.tolist(),
            data.scale,
            self.start_facts,
        )

    def model(self, params: Any, validation: Mapping[str, float]) -> RelaxNet:
        """The model with these parameters, whose means on the validation split are ``validation``."""
        data = self.data
        statistics = {
            "data": data.dataset.name,
            "training_relaxations": data.relaxations,
            "later_starts": data.later_starts,
            "energy_scale_eV_per_atom": data.scale,
            "surroundings": data.surroundings(),
            "validation": model_score(validation, self.config),
        }
        return RelaxNet(
            params,
            data.element_energies,
            np.asarray(data.scale, np.float32),
            self.config,
            tuple(int(z) for z in np.flatnonzero(data.seen)),
            json.dumps(statistics | self.start_facts),
        )

    def export(self, params: Any, workdir: Path, validation: Mapping[str, float]) -> None:
        """Writes the model with these (replicated) parameters to ``workdir/model``; see `model`."""
        own = jax.device_get(self.devices.first(params))
        save_model(self.model(own, validation), workdir / MODEL)

    def finite(self, params: Any) -> bool:
        leaves = jax.tree.leaves(jax.device_get(self.devices.first(params)))
        return all(np.isfinite(leaf).all() for leaf in leaves)

    def batches(
        self, split: str, seed: tuple[int, int] | None, done: list[list[int]]
    ) -> tuple[Iterator[tuple[list[int], Any]], int]:
        """Iterates over the steps an epoch has left.

        Args:
          split: name of the split.
          seed: seed of the order; None for the order of the data.
          done: see `plan.remaining_runs`.

        Returns:
          An iterator over (sample indices, batch over all devices) of each step, and the number of
          steps.
        """

        data, devices = self.data, self.devices

        def pack(members: np.ndarray, n: int, shares: int) -> Batches:
            rng = None if seed is None else np.random.default_rng(seed)
            buckets = data.buckets_of(shares, self.config)
            return pack_epoch(buckets, data.samples.sizes, rng, members, n)

        members = data.members[split]
        runs = remaining_runs(pack, members, devices.n, devices.mine, done, self.shares)

        def iterate() -> Iterator[tuple[list[int], Any]]:
            mine = [batch for run in runs for batch in run.mine]
            threads = min(devices.loaders, usable_cores())
            loaded = epoch_iterator(mine, data.samples, data.buckets, self.config, threads)
            for run in runs:
                parts = [batch for _, _, batch in itertools.islice(loaded, devices.local)]
                yield run.indices, devices.stack(parts)

        return iterate(), len(runs)

    def validate(self, params: Any) -> tuple[dict[str, float], int]:
        """Evaluates parameters on the validation split.

        Batches whose terms are not finite are left out; their structures are reported once.

        Returns:
          Means of the loss, its terms and the coordinate errors, and how many batches were left out:
          process 0's numbers on all processes, so that decisions based on them are the same everywhere.
        """
        tally, unfit = ValidationTally(), []
        iterator, _ = self.batches("validation", None, [])
        for indices, batch in iterator:
            if not tally.add(jax.device_get(self.devices.first(self.eval_step(params, batch)))):
                unfit += [i for i in indices if i not in self.unfit]
        if unfit:
            self.unfit.update(unfit)
            names = ", ".join(self.data.samples.id(i) for i in unfit)
            self.report(f"left out of the validation loss: not finite with one of {names}")
        return self.hosts.share((tally.means(self.config.loss), tally.skipped))

    def tell_devices(self, devices: int, shares: int) -> None:
        """Reports how the size of a step has changed with the number of devices or shares, if it has."""
        n = self.devices.n
        if (devices, shares) != (n, self.shares):
            self.report(
                f"on {n} device(s) instead of {devices}: a step is now over {n / self.shares:g} batch(es) "
                f"instead of {devices / shares:g}"
            )
