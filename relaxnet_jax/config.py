"""Configuration: reads ``get_config()`` files, here and nowhere else, into frozen dataclasses.

A config file is a Python file with a function ``get_config()`` that returns a
nested dict with only the fields it changes, e.g. ``{"dynamics": {"latent": "implicit"}}``.
Unknown keys and values of the wrong type are errors that name the nearest valid key.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
import runpy
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from relaxnet_jax.errors import InputError

# Stands for the model shipped with the package wherever a model folder is expected; a user's own
# folder of that name is "./pretrained".
PRETRAINED = "pretrained"


@dataclasses.dataclass(frozen=True)
class GraphConfig:
    """Neighbour topology, built once per trajectory from the initial structure.

    Attributes:
      cutoff: Å, range of the pair interactions.
      triplet_cutoff: Å, range of the bonds that form triplets (at most ``cutoff``).
      skin: Å, by how much the neighbour lists reach beyond the cutoffs: two atoms may approach
        each other by this distance along the trajectory without a pair being missed.
    """

    cutoff: float = 5.0
    triplet_cutoff: float = 4.0
    skin: float = 0.5


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The energy network: bases, DTNN encoder, attention, head.

    Attributes:
      architecture: layers of the encoder: "dtnn", or "egnn" (a baseline without three-body
        messages; the fields of these and `update_positions` have no effect on it).
      features: width F of the scalar node features h.
      vector_features: number of vector channels of v.
      layers: number L of encoder layers.
      interaction: three-body messages through "moments" (the sum over the third atom is taken
        inside the MLP, by the addition theorem; the cost grows with the number of bonds) or
        "triplets" (one MLP evaluation per triplet).
      triplet_features: hidden width of the triplet MLPs.
      moment_channels: number of weights of the third atom, with "moments".
      pair_features: width of the pair pass that reads the geometry at every ODE step of
        the explicit scheme.
      n_gaussian: number of Gaussian radial basis functions.
      n_bessel: number of roots per degree of the spherical Bessel basis.
      l_max: highest degree of the spherical-harmonic edge expansion.
      l_angle: highest degree of the zonal harmonics of the triplet angles.
      expansion_channels: number of channels of the power-spectrum node features.
      attention: whether the attention block is used.
      attention_heads: number of attention heads.
      vector_messages: whether MLP_v, MLP_g and MLP_m of the TripletMPNN are used.
      update_positions: whether positions inside the encoder move by sum_j MLP_c(m_ij) r_ij/|r_ij|.
      envelope_power: exponent p of the polynomial cutoff envelope.
      charges: whether per-atom charges are an input.
      matmul: precision of the matrix products of dense layers: "float32", or "bfloat16" (accumulated
        in float32; for GPUs and TPUs, slower on a CPU). Geometry and sums stay in float32, and
        the same parameters serve both.
    """

    architecture: Literal["dtnn", "egnn"] = "dtnn"
    features: int = 64
    vector_features: int = 16
    layers: int = 2
    interaction: Literal["moments", "triplets"] = "moments"
    triplet_features: int = 32
    moment_channels: int = 16
    pair_features: int = 32
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
    matmul: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class DynamicsConfig:
    """The neural ODE dx/dt = u, du/dt = F/m.

    Attributes:
      latent: "explicit" (h is part of the ODE state) or "implicit" (h = encoder(x)); or, without an
        ODE, "static" (an interatomic potential E(x), trained on single frames: its paths are
        minimisations) or "direct" (the final positions and energy from one encoder pass).
      order: "second" (Newton) or "first" (dx/dt = mobility * F).
      mass: "atomic" (amu), "unit", or "learned": a mass for each atom, a function of its latent h,
        and likewise for each cell (explicit scheme). How far an atom moves under a force depends
        on the stiffness of its surroundings, not on its weight.
      friction: whether a friction is learned, du/dt = F/m - gamma u.
      time_scale: whether a scale s of pseudotime is learned, dx/dt = s u, du/dt = s F/m.
      cell: "fixed", or "variable": the lattice relaxes too (see `relaxnet_jax.strain`).
      max_speed: Å per unit of pseudotime (before ``time_scale``), speed at which the motion of atoms
        saturates, see `dynamics.limited` (0: no limit).
      max_strain_rate: per unit of pseudotime, likewise for the strain of the cell.
      solver: "rk4" (fixed steps) or "tsit5" (adaptive, with rtol and atol).
      substeps: number of RK4 steps between two frames.
      frames: number n of frames, at pseudotimes k/(n-1).
      rtol, atol: tolerances of the adaptive solver; no effect on rk4.
      max_steps: maximum number of steps of the adaptive solver.
    """

    latent: Literal["explicit", "implicit", "static", "direct"] = "explicit"
    order: Literal["second", "first"] = "second"
    mass: Literal["atomic", "unit", "learned"] = "atomic"
    friction: bool = False
    time_scale: bool = False
    cell: Literal["fixed", "variable"] = "fixed"
    max_speed: float = 10.0
    max_strain_rate: float = 1.0
    solver: Literal["rk4", "tsit5"] = "rk4"
    substeps: int = 1
    frames: int = 5
    rtol: float = 1e-3
    atol: float = 1e-3
    max_steps: int = 256


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the five terms of equation (7), of energy changes, and of two terms for variable cells.

    Attributes:
      energy: lambda_1, per eV (or eV/atom).
      energy_change: per eV (or eV/atom), weight of the energy differences from the final frame. An
        energy is mostly that of the composition, which few compositions teach poorly; the change
        along a path is small compared with that error and has to be learned as such. Applies to
        paths only: static models, static epochs and direct predictors have no energy changes.
      monotonicity: lambda_2, per eV (or eV/atom).
      forces: lambda_3, per (eV/Å)².
      positions: lambda_4, per Å².
      direction: lambda_5, dimensionless.
      stress: per (eV/Å³)², with dynamics.cell="variable" only.
      cell: per squared logarithmic strain, with dynamics.cell="variable" only.
      errors: how the errors of forces, positions, stresses and cells count: "squared", as in the
        paper, where the few largest displacements dominate the mean; or "norm", the length of each
        error vector (the Frobenius norm of a tensor), with weights per eV/Å, Å, eV/Å³ and
        logarithmic strain.
      huber_forces: eV/Å, width d of a pseudo-Huber loss d (√(1 + (|F - F̂|/d)²) - 1) of the forces,
        used instead of ``errors`` (0: not used). Where most frames are nearly relaxed, the plain
        length of the errors is smallest with no forces at all.
      energy_per: "atom" or "structure", what the energies of the first three terms are taken per.
    """

    energy: float = 1.0
    energy_change: float = 0.0
    monotonicity: float = 0.1
    forces: float = 1.0
    positions: float = 10.0
    direction: float = 0.1
    stress: float = 300.0
    cell: float = 300.0
    errors: Literal["squared", "norm"] = "squared"
    huber_forces: float = 0.0
    energy_per: Literal["atom", "structure"] = "atom"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which relaxations, and how they are split.

    Attributes:
      path: an HDF5 file written by ``relaxnet-jax data import``, or "emt" for the data that the
        package generates itself.
      frame_selection: "equidistant" (n frames on the grid k/(n-1), as in the paper) or
        "all" (every frame at its own pseudotime, up to ``max_frames``).
      max_frames: maximum number of frames per structure with frame_selection="all".
      splits: train, validation and test fractions of the structures (groups stay together).
      fold: which of the ``1/splits[2]`` rotations of the groups (or of the folds of ``split_file``)
        is the test split.
      seed: random seed of the split.
      split_file: a file written by ``relaxnet-jax data split``, or a run's splits.json, used instead
        of ``splits`` and ``seed`` ("": none).
      limit: maximum number of relaxations (0: all), drawn with ``seed``.
      later_starts: how many times each training relaxation is repeated from a later frame, at a
        half, a quarter, an eighth, … of its frames: the path from there is as valid as the whole.
        Meant for relaxations of many more frames than ``dynamics.frames``.
      variable_cell: what to do with relaxations whose cell changes where dynamics.cell is "fixed":
        raise an "error", or "drop" and count them.
      n_emt: number of relaxations in the generated data.
    """

    path: str = "emt"
    frame_selection: Literal["equidistant", "all"] = "equidistant"
    max_frames: int = 32
    splits: tuple[float, float, float] = (0.9, 0.05, 0.05)
    fold: int = 0
    seed: int = 0
    split_file: str = ""
    limit: int = 0
    later_starts: int = 0
    variable_cell: Literal["error", "drop"] = "error"
    n_emt: int = 600


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation.

    Attributes:
      batch_size: structures per batch and device.
      learning_rate, weight_decay: parameters of AdamW.
      clip_norm: largest global gradient norm.
      start_from: a model folder or training run whose parameters training starts from, e.g. to
        fine-tune on other data, or "pretrained" for the first model of the package ("": random
        parameters). Its layers and cutoffs must be those of this config.
      static_epochs: number of initial epochs that fit energies and forces at the data's own frames,
        one random frame of each relaxation, without solving the ODE: the training of an
        interatomic potential, at a fraction of the cost. Implicit scheme only (0: none).
      epochs: maximum number of epochs.
      max_minutes: wall-clock limit (0: none); the run then ends cleanly with a usable model.
      cooldown: with ``max_minutes``, the last fraction of the time (or of the epochs, where these
        end first) over which the learning rate falls linearly to zero. Nothing else ends such a
        run, and its last model is kept unless its validation loss is more than a tenth above the
        best. Not used by runs without a time limit.
      plateau_factor, plateau_patience: the learning rate is multiplied by the factor after
        more than ``plateau_patience`` epochs without a better validation loss.
      early_stop_patience: epochs without a better validation loss before training stops.
      ema: decay of the exponential moving average of the parameters, which is what is evaluated
        and exported (0: off).
      seed: random seed of initialisation and shuffling.
      max_buckets: maximum number of padded batch shapes (compilations).
      max_padding: fraction of padding below which no further bucket is opened.
      noise: Å, standard deviation of Gaussian noise on the initial positions (see `train.perturb`).
        Applies to paths only: static models and static epochs have no noise.
      strain_noise: likewise for a strain of the initial cell, where the cell relaxes.
      noise_share: share of the structures that get noise, drawn at every step.
      checkpoint_every: epochs between checkpoints.
      checkpoint_minutes: minutes after which a checkpoint is also written within an epoch.
      tensorboard: whether to write TensorBoard events, too (needs the ``tensorboard`` extra).
    """

    batch_size: int = 16
    learning_rate: float = 5e-4
    weight_decay: float = 5e-5
    clip_norm: float = 10.0
    start_from: str = ""
    static_epochs: int = 0
    epochs: int = 1000
    max_minutes: float = 0.0
    cooldown: float = 0.5
    plateau_factor: float = 0.8
    plateau_patience: int = 8
    early_stop_patience: int = 20
    ema: float = 0.99
    seed: int = 0
    max_buckets: int = 3
    max_padding: float = 0.2
    noise: float = 0.0
    strain_noise: float = 0.0
    noise_share: float = 0.5
    checkpoint_every: int = 1
    checkpoint_minutes: float = 30.0
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a run, apart from the data themselves."""

    name: str = "explicit"
    graph: GraphConfig = GraphConfig()
    model: ModelConfig = ModelConfig()
    dynamics: DynamicsConfig = DynamicsConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @property
    def is_potential(self) -> bool:
        """Whether the energy is a function of the positions alone, without other state: F = -dE/dx."""
        return self.dynamics.latent in ("implicit", "static")

    @property
    def triplet_skin(self) -> float:
        """Skin of the triplets, Å: zero where they are visited only at t = 0, else ``graph.skin``.

        A shorter list is cheaper: with a skin of 0.5 Å beyond 4 Å, rattled copper has up to
        35 bonds per atom instead of 18, and four times the triplets.
        """
        moves = self.is_potential or self.model.update_positions
        return self.graph.skin if moves else 0.0

    def with_skin(self, skin: float) -> Config:
        """The config with another ``graph.skin`` (Å). Raises InputError unless finite and at least 0."""
        if not 0 <= skin < math.inf:
            raise InputError(f"skin={skin}: give a length in Å, at least 0")
        return dataclasses.replace(self, graph=dataclasses.replace(self.graph, skin=float(skin)))


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Iterable[str] | Mapping = ()
) -> Config:
    """Reads a config file and applies overrides.

    Args:
      source: a path to a Python file with ``get_config()``, the name of a shipped one
        ("explicit.py", "implicit"), or a nested mapping. An existing path takes
        precedence over a shipped file of the same name.
      overrides: ``"section.field=value"`` strings (values as Python literals or bare
        words), or a nested or dotted mapping.

    Returns:
      A frozen `Config`.

    Raises:
      InputError: file not found, no ``get_config``, unknown key, wrong type or value.
    """
    if isinstance(source, Mapping):
        values: Any = source
        origin, name = "config", str(source.get("name", "custom"))
    else:
        path = find_config(source)
        origin, name = str(path), path.stem
        try:
            get_config = runpy.run_path(str(path)).get("get_config")
            values = get_config() if callable(get_config) else None
        except Exception as error:
            raise InputError(
                f"{path}: cannot be executed: {type(error).__name__}: {error}"
            ) from None
        if get_config is None:
            raise InputError(f"{path}: no function get_config(); see the shipped explicit.py")
        if not isinstance(values, Mapping):
            raise InputError(
                f"{path}: get_config() must return a dict, not {type(values).__name__}"
            )
    config = _update(Config(name=name), values, origin)
    if isinstance(overrides, Mapping):
        nested = _nest(overrides.items(), "overrides")
    else:
        nested = _nest((parse_override(item) for item in overrides), "--set")
    return check_config(_update(config, nested, "--set"))


def shipped_configs() -> Path:
    """Folder of the shipped config files (installed or in a source checkout)."""
    here = Path(__file__).resolve().parent
    installed = here / "_configs"
    return installed if installed.is_dir() else here.parent / "configs"


def find_config(name: str | Path) -> Path:
    """The config file at this path, else the shipped one of that name; InputError if neither exists."""
    path = Path(name)
    candidates = [path]
    if path.name == str(name):  # a bare name: a mistyped path must not find another file
        candidates += [shipped_configs() / path.name, shipped_configs() / f"{path.name}.py"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(p.name for p in shipped_configs().glob("*.py")))
    raise InputError(f"config {str(name)!r} not found; give a path or one of: {shipped}")


def to_dict(config: Config) -> dict[str, Any]:
    """The config as a nested plain dict, ready for JSON."""
    return dataclasses.asdict(config)


def to_json(config: Config) -> str:
    """The config as JSON text that `from_json` reads back."""
    return json.dumps(to_dict(config), indent=2)


def from_json(text: str, origin: str = "config.json") -> Config:
    """The `Config` in the text of `to_json`; raises InputError on anything else."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{origin}: not valid JSON ({error}); the model folder is damaged"
        ) from None
    return check_config(_update(Config(), values, origin))


def check_config(config: Config) -> Config:
    """Returns the config if its values make sense together, else raises InputError."""
    g, m, d, data, t = config.graph, config.model, config.dynamics, config.data, config.train

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise InputError(f"config {config.name!r}: {message}")

    require(0 < g.triplet_cutoff <= g.cutoff, "graph.triplet_cutoff must lie in (0, graph.cutoff]")
    require(g.skin >= 0, "graph.skin must not be negative")
    for field in (
        "features",
        "vector_features",
        "layers",
        "triplet_features",
        "moment_channels",
        "pair_features",
        "n_gaussian",
        "n_bessel",
        "expansion_channels",
        "attention_heads",
    ):
        require(getattr(m, field) >= 1, f"model.{field} must be at least 1")
    require(
        m.features % m.attention_heads == 0,
        "model.features must be a multiple of model.attention_heads",
    )
    require(
        1 <= m.l_max <= 8 and 0 <= m.l_angle <= 12,
        "model.l_max must be 1..8 and model.l_angle 0..12",
    )
    require(
        d.cell == "fixed" or m.l_max >= 2,
        "dynamics.cell='variable' needs model.l_max of at least 2: strain is a tensor of degree 2",
    )
    require(
        d.latent != "direct" or config.loss.forces == 0,
        "dynamics.latent='direct' predicts no forces: it needs loss.forces=0",
    )
    require(
        d.latent != "direct" or d.cell == "fixed" or config.loss.stress == 0,
        "dynamics.latent='direct' predicts no stresses: with variable cells it needs loss.stress=0",
    )
    require(
        d.latent in ("explicit", "implicit") or d.order == "second",
        f"dynamics.order='first' applies to the ODE, which dynamics.latent={d.latent!r} does not solve",
    )
    require(
        d.mass != "learned" or d.latent == "explicit",
        "dynamics.mass='learned' depends on the latent, which exists only with dynamics.latent='explicit'",
    )
    require(config.loss.huber_forces >= 0, "loss.huber_forces must not be negative")
    for field in (
        "energy",
        "energy_change",
        "monotonicity",
        "forces",
        "positions",
        "direction",
        "stress",
        "cell",
    ):
        weight = getattr(config.loss, field)
        require(0 <= weight < math.inf, f"loss.{field} must be finite and not negative")
    require(m.envelope_power >= 3, "model.envelope_power must be at least 3")
    require(
        d.max_speed >= 0 and d.max_strain_rate >= 0,
        "dynamics.max_speed and dynamics.max_strain_rate must not be negative (0: no limit)",
    )
    require(d.frames >= 2, "dynamics.frames must be at least 2")
    require(d.substeps >= 1, "dynamics.substeps must be at least 1")
    require(d.rtol > 0 and d.atol > 0, "dynamics.rtol and dynamics.atol must be positive")
    require(d.max_steps >= 1, "dynamics.max_steps must be at least 1")
    require(
        len(data.splits) == 3 and abs(sum(data.splits) - 1) < 1e-6 and min(data.splits) > 0,
        "data.splits must be three positive fractions that add up to 1",
    )
    require(data.limit >= 0, "data.limit must not be negative (0: all)")
    require(data.seed >= 0 and t.seed >= 0, "data.seed and train.seed must not be negative")
    require(data.max_frames >= 2, "data.max_frames must be at least 2")
    require(0 <= data.later_starts <= 16, "data.later_starts must lie in 0..16")
    require(t.batch_size >= 1, "train.batch_size must be at least 1")
    require(
        0 < t.learning_rate < math.inf and t.clip_norm > 0,
        "train.learning_rate and train.clip_norm must be positive, and train.learning_rate finite",
    )
    require(0 <= t.weight_decay < math.inf, "train.weight_decay must be finite and not negative")
    require(
        0 <= t.max_minutes < math.inf,
        "train.max_minutes must be finite and not negative (0: no limit)",
    )
    require(0 < t.plateau_factor <= 1, "train.plateau_factor must lie in (0, 1]")
    require(t.plateau_patience >= 0, "train.plateau_patience must not be negative")
    require(
        t.early_stop_patience >= 1,
        "train.early_stop_patience must be at least 1 (set it to train.epochs to never stop early)",
    )
    require(
        t.static_epochs == 0 or (t.static_epochs > 0 and d.latent == "implicit"),
        "train.static_epochs must not be negative, and above 0 only with dynamics.latent='implicit': in "
        "the explicit scheme the energy depends on the latent's history",
    )
    require(
        t.noise >= 0 and t.strain_noise >= 0 and 0 <= t.noise_share <= 1,
        "train.noise and train.strain_noise must not be negative, and train.noise_share must lie in [0, 1]",
    )
    require(0 <= t.cooldown <= 1, "train.cooldown must lie in [0, 1]")
    require(0 <= t.ema < 1, "train.ema must lie in [0, 1)")
    require(t.checkpoint_minutes >= 0, "train.checkpoint_minutes must not be negative")
    require(
        t.epochs >= 1 and t.checkpoint_every >= 1 and t.max_buckets >= 1,
        "train.epochs, train.checkpoint_every and train.max_buckets must be at least 1",
    )
    return config


def parse_override(item: str) -> tuple[str, Any]:
    """Key and value of ``KEY=VALUE``, with a Python literal or bare word as value; raises InputError."""
    key, separator, text = item.partition("=")
    if not separator:
        raise InputError(f"--set {item!r}: write it as section.field=value")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    return key.strip(), value


def _nest(items: Iterable[tuple[str, Any]], origin: str) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in items:
        *parents, leaf = str(key).split(".")
        node = nested
        section = isinstance(value, Mapping)
        for parent in (*parents, leaf) if section else parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(
                    f"{origin}: {key}: {parent!r} is also given as the value {node!r}; give only its fields"
                )
        if section:
            node.update(value)
        else:
            node[leaf] = value
    return nested


def _update(instance: Any, values: Mapping[str, Any], origin: str, prefix: str = "") -> Any:
    hints = typing.get_type_hints(type(instance))
    changes = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = (
                f"did you mean {prefix + near[0]!r}?" if near else f"known keys: {', '.join(hints)}"
            )
            raise InputError(f"{origin}: unknown config key {prefix + key!r}; {hint}")
        current = getattr(instance, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise InputError(
                    f"{origin}: {prefix + key!r} is a section; set its fields, e.g. "
                    f"{prefix + key}.{dataclasses.fields(current)[0].name}=…"
                )
            changes[key] = _update(current, value, origin, f"{prefix}{key}.")
        else:
            changes[key] = _coerce(value, hints[key], f"{origin}: {prefix + key}")
    return dataclasses.replace(instance, **changes)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """The value in the annotated type; int→float, number→str and list→tuple are the only conversions."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise InputError(f"{where}={value!r}: must be one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise InputError(f"{where}={value!r}: must be {len(args)} numbers")
        return tuple(_coerce(v, a, where) for v, a in zip(value, args))
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce(value, args[0], where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{where}={value!r}: must be of type {hint.__name__}")
    return value
