"""Configuration: ``get_config()`` files in, frozen dataclasses out. Read here and nowhere else.

A config file is a Python file with a function ``get_config()`` that returns a
nested dict with only the fields it changes, e.g. ``{"dynamics": {"latent": "implicit"}}``.
Unknown keys and values of the wrong type are errors that name the nearest valid key.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import runpy
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from relaxnet_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class GraphConfig:
    """Neighbour topology, built once per trajectory from the initial structure.

    Attributes:
      cutoff: Å, range of the pair interactions.
      triplet_cutoff: Å, range of the bonds that form triplets (at most ``cutoff``).
      skin: Å, the lists reach this much further than the cutoffs, so that two atoms
        may approach by it during the trajectory without being missed.
    """

    cutoff: float = 5.0
    triplet_cutoff: float = 4.0
    skin: float = 0.5


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The energy network (DESIGN: bases, DTNN encoder, attention, head).

    Attributes:
      architecture: the encoder; only "dtnn" in this version.
      features: width F of the scalar node features h.
      vector_features: number of vector channels of v.
      layers: number L of DTNN layers.
      triplet_features: hidden width of the triplet MLPs.
      n_gaussian: Gaussian radial basis functions.
      n_bessel: roots per degree of the spherical Bessel basis.
      l_max: highest degree of the spherical-harmonic edge expansion.
      l_angle: highest degree of the zonal harmonics of the triplet angles.
      expansion_channels: channels of the power-spectrum node features.
      attention: switches the attention block.
      attention_heads: its heads.
      vector_messages: switches MLP_v, MLP_g and MLP_m of the TripletMPNN.
      update_positions: positions inside the encoder move by sum_j MLP_c(m_ij) r_ij/|r_ij|.
      envelope_power: p of the polynomial cutoff envelope.
      charges: per-atom charges are an input.
    """

    architecture: Literal["dtnn"] = "dtnn"
    features: int = 64
    vector_features: int = 16
    layers: int = 2
    triplet_features: int = 32
    n_gaussian: int = 16
    n_bessel: int = 6
    l_max: int = 3
    l_angle: int = 4
    expansion_channels: int = 16
    attention: bool = True
    attention_heads: int = 4
    vector_messages: bool = True
    update_positions: bool = False
    envelope_power: int = 6
    charges: bool = False


@dataclasses.dataclass(frozen=True)
class DynamicsConfig:
    """The neural ODE dx/dt = u, du/dt = F/m.

    Attributes:
      latent: "explicit" (h is part of the ODE state) or "implicit" (h = encoder(x)).
      order: "second" (Newton) or "first" (dx/dt = mobility * F).
      mass: "atomic" (amu) or "unit".
      friction: learned friction, du/dt = F/m - gamma u.
      time_scale: learned scale s of pseudotime, dx/dt = s u, du/dt = s F/m.
      solver: "rk4" (fixed steps) or "tsit5" (adaptive, with rtol and atol).
      substeps: RK4 steps between two frames.
      frames: number n of frames, at pseudotimes k/(n-1).
      rtol, atol: tolerances of the adaptive solver; no effect on rk4.
      max_steps: bound on the adaptive solver's steps.
    """

    latent: Literal["explicit", "implicit"] = "explicit"
    order: Literal["second", "first"] = "second"
    mass: Literal["atomic", "unit"] = "atomic"
    friction: bool = False
    time_scale: bool = False
    solver: Literal["rk4", "tsit5"] = "rk4"
    substeps: int = 1
    frames: int = 5
    rtol: float = 1e-3
    atol: float = 1e-3
    max_steps: int = 256


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the five terms of equation (7).

    Attributes:
      energy: lambda_1, per eV (or eV/atom).
      monotonicity: lambda_2, per eV (or eV/atom).
      forces: lambda_3, per (eV/Å)².
      positions: lambda_4, per Å².
      direction: lambda_5, dimensionless.
      energy_per: "atom" or "structure", for the first two terms.
    """

    energy: float = 1.0
    monotonicity: float = 0.1
    forces: float = 1.0
    positions: float = 10.0
    direction: float = 0.1
    energy_per: Literal["atom", "structure"] = "atom"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which relaxations, and how they are split.

    Attributes:
      path: an HDF5 file of ``relaxnet-jax data import``, or "emt" for the data the
        package generates itself.
      frame_selection: "equidistant" (n frames on the grid k/(n-1), the paper's) or
        "all" (every frame at its own pseudotime, up to ``max_frames``).
      max_frames: most frames per structure with frame_selection="all".
      splits: train, validation and test fractions of the groups.
      fold: which of ``1/splits[2]`` rotations of the groups is the test split.
      seed: of the split.
      limit: at most this many relaxations (0: all), drawn with ``seed``.
      variable_cell: relaxations whose cell changes are an "error" or "drop"ped (counted).
      n_emt: number of relaxations of the generated data.
    """

    path: str = "emt"
    frame_selection: Literal["equidistant", "all"] = "equidistant"
    max_frames: int = 32
    splits: tuple[float, float, float] = (0.9, 0.05, 0.05)
    fold: int = 0
    seed: int = 0
    limit: int = 0
    variable_cell: Literal["error", "drop"] = "error"
    n_emt: int = 600


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation.

    Attributes:
      batch_size: structures per batch and device.
      learning_rate, weight_decay: of AdamW.
      clip_norm: largest global gradient norm.
      epochs: most epochs.
      max_minutes: wall-clock limit (0: none); ends cleanly with a usable model.
      plateau_factor, plateau_patience: learning rate is multiplied by the factor after
        so many epochs without a better validation loss.
      early_stop_patience: epochs without a better validation loss before stopping.
      ema: decay of the exponential moving average of the parameters that is evaluated
        and exported (0: off).
      seed: of initialisation and shuffling.
      max_buckets: most padded batch shapes (compilations).
      max_padding: padding fraction below which no further bucket is opened.
      noise: Å, standard deviation of Gaussian noise on the initial positions.
      checkpoint_every: epochs between checkpoints.
      tensorboard: also write TensorBoard events (needs the ``tensorboard`` extra).
    """

    batch_size: int = 16
    learning_rate: float = 5e-4
    weight_decay: float = 5e-5
    clip_norm: float = 10.0
    epochs: int = 1000
    max_minutes: float = 0.0
    plateau_factor: float = 0.8
    plateau_patience: int = 8
    early_stop_patience: int = 20
    ema: float = 0.99
    seed: int = 0
    max_buckets: int = 3
    max_padding: float = 0.25
    noise: float = 0.0
    checkpoint_every: int = 1
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run is determined by, apart from the data themselves."""

    name: str = "explicit"
    graph: GraphConfig = GraphConfig()
    model: ModelConfig = ModelConfig()
    dynamics: DynamicsConfig = DynamicsConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
