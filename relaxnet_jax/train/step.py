"""The training and evaluation steps: pure functions made by factories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from relaxnet_jax.config import Config, LossConfig
from relaxnet_jax.losses import (
    CellTargets,
    Targets,
    Term,
    coordinate_error,
    force_error,
    loss_terms,
    strain_error,
    weighted_loss,
)
from relaxnet_jax.model import network_of
from relaxnet_jax.models.energy import RelaxNetwork
from relaxnet_jax.models.precision import in_float32
from relaxnet_jax.potential import energies_and_forces
from relaxnet_jax.programs import Program
from relaxnet_jax.solver import Trajectory, solve_trajectory
from relaxnet_jax.strain import deform_positions
from relaxnet_jax.train.perturb import perturbed
from relaxnet_jax.train.state import TrainState, make_optimizer
from relaxnet_jax.typing import Graph, Params

Batch = tuple[Graph, Targets]
Tree = TypeVar("Tree")
STATIC_TERMS = ("energy", "forces", "stress")  # those defined on a single frame


class Objective(NamedTuple):
    """What is compared with the true frames of a batch.

    Attributes:
      kind: "path": the predicted trajectory. "frame": energies and forces at the one true frame that
        each structure has left. "frames": energies and forces at all true frames.
    """

    network: RelaxNetwork
    loss: LossConfig
    kind: Literal["path", "frame", "frames"]


@Program
@in_float32
def batch_terms(objective: Objective, params: Params, unit: Array, batch: Batch) -> dict[str, Term]:
    """Sums and counts of the loss terms on one device.

    Objectives of kind "path" and "frames" also give the force errors, those of kind "path" the
    coordinate and strain errors too.

    Args:
      unit: energy scale, eV/atom.
    """
    graph, targets = batch
    network = objective.network
    if objective.kind == "path":
        prediction = solve_trajectory(network, params, unit, graph, targets.times)
        return _compare(prediction, batch, objective)
    cells = () if targets.cells is None else (jnp.asarray(targets.cells.deformation),)

    def at(values):
        reference, deformation = (*values, None)[:2]
        return _at_frame(network, params, unit, graph, reference, deformation)

    frames = jnp.asarray(targets.positions), *cells
    if objective.kind == "frame":  # a loop of one iteration would only add overhead
        found = at(jax.tree.map(lambda values: values[0], frames))
        return _compare(jax.tree.map(lambda value: value[None], found), batch, objective)
    return _compare(jax.lax.map(at, frames), batch, objective)


@Program
@in_float32
def batch_gradient(
    objective: Objective, params: Params, unit: Array, batch: Batch, numbers: dict[str, Array]
) -> tuple[Params, dict[str, Array]]:
    """One device's contribution to the gradient of the loss, and to the sums of its terms.

    Args:
      unit: energy scale, eV/atom.
      numbers: counts of the terms over the batches of all devices, so that the contributions add up
        to the gradient of the loss of one batch with all structures.
    """

    def part(params: Params) -> tuple[Array, dict[str, Array]]:
        terms = batch_terms.function(objective, params, unit, batch)
        shares = {name: Term(term.total, numbers[name]) for name, term in terms.items()}
        loss, _ = weighted_loss(shares, objective.loss)
        return loss, {name: term.total for name, term in terms.items()}

    return jax.grad(part, has_aux=True)(params)


@in_float32
def batch_numbers(objective: Objective, batch: Batch) -> dict[str, Array]:
    """Counts of the terms, which depend on the targets alone: they are those of any prediction."""
    _, targets = batch
    positions = jnp.asarray(targets.positions)
    energies = jnp.zeros(targets.frame_mask.shape, positions.dtype)
    prediction = Trajectory(positions, jnp.zeros_like(positions), energies, positions)
    if targets.cells is not None:
        deformation = jnp.asarray(targets.cells.deformation)
        prediction = prediction._replace(
            reference=positions, deformation=deformation, virial=jnp.zeros_like(deformation)
        )
    return {name: t.number for name, t in _compare(prediction, batch, objective).items()}


def _compare(prediction: Trajectory, batch: Batch, objective: Objective) -> dict[str, Term]:
    graph, targets = batch
    terms = loss_terms(prediction, targets, graph, objective.loss)
    if objective.kind == "path":
        return terms | _errors(prediction, targets, graph)
    if objective.kind == "frame":
        return terms
    static = {name: terms[name] for name in STATIC_TERMS if name in terms}
    return static | {"force_error": force_error(prediction, targets, graph)}


def _errors(prediction: Trajectory, targets: Targets, graph: Graph) -> dict[str, Term]:
    """Errors of the forces, and of the final frames beside those of doing nothing."""
    ours, nothing = coordinate_error(prediction, targets, graph)
    errors = {"force_error": force_error(prediction, targets, graph)}
    errors |= {"coordinates": ours, "nothing": nothing}
    if targets.cells is None:
        return errors
    ours, nothing = strain_error(prediction, targets, graph)
    return errors | {"strain": ours, "nothing_strain": nothing}


@in_float32
def _draw(config: Config, network: RelaxNetwork, batch: Batch, key: Array) -> Batch:
    """The batch a training step sees, with noise on the starts if the configuration asks for it."""
    graph, targets = batch
    if config.train.noise or config.train.strain_noise:
        graph, targets = perturbed(config, network, graph, targets, key)
    return _asked(config, (graph, targets))


def _asked(config: Config, batch: Batch) -> Batch:
    """Masks all frames but each structure's final one, for a direct predictor only."""
    graph, targets = batch
    if config.dynamics.latent != "direct":
        return batch
    slots = jnp.arange(targets.frame_mask.shape[0])[:, None]
    return graph, targets._replace(frame_mask=targets.frame_mask & (slots == targets.last))


def _draw_frames(batch: Batch, key: Array) -> Batch:
    """Keeps one true frame of each relaxation, drawn at random.

    The terms that compare positions, or one frame with the next, are therefore zero.
    """
    graph, targets = batch
    draws = jax.random.uniform(key, targets.frame_mask.shape)
    frame = jnp.argmax(jnp.where(targets.frame_mask, draws, -1.0), axis=0)
    node, structures = graph.nodes["graph"], jnp.arange(frame.shape[0])
    atoms = jnp.arange(node.shape[0])
    return graph, Targets(
        positions=jnp.asarray(targets.positions)[frame[node], atoms][None],
        forces=jnp.asarray(targets.forces)[frame[node], atoms][None],
        energies=jnp.asarray(targets.energies)[frame, structures][None],
        frame_mask=jnp.asarray(targets.frame_mask)[frame, structures][None],
        last=jnp.zeros_like(targets.last),
        cells=None
        if targets.cells is None
        else CellTargets(*(jnp.asarray(v)[frame, structures][None] for v in targets.cells)),
    )


def _at_frame(network, params, unit, graph, reference, deformation) -> Trajectory:
    """Energies, forces and virials at reference positions (N, 3): one frame, without a frame axis."""
    positions = reference
    if deformation is not None:
        positions = deform_positions(deformation, reference, graph.nodes["graph"])
    latent = jnp.zeros((positions.shape[0], 0), positions.dtype)
    found = energies_and_forces(network, params, unit, graph, positions, latent, deformation)
    moving = positions, jnp.zeros_like(positions), found.energies, found.forces
    return Trajectory(
        *moving, *(() if deformation is None else (reference, deformation, found.virial))
    )


def _unit(scale: float, graph: Graph) -> Array:
    return jnp.asarray(scale, graph.nodes["positions"].dtype)


def _added_up(tree: Tree, axis: str) -> Tree:
    """Sums over the devices; on a CPU all leaves as one array, since its devices synchronise for each."""
    if jax.default_backend() != "cpu":
        return jax.lax.psum(tree, axis)
    leaves, restore = ravel_pytree(tree)
    total = jax.lax.psum(leaves, axis)
    # A conditional with equal branches, which XLA does not fuse into what follows. If it did, each leaf's
    # offset in the array would give it kernels of its own; without, one compilation serves all leaves.
    return jax.lax.cond(jnp.isfinite(total[0]), restore, lambda x: restore(x), total)


def make_train_step(
    config: Config,
    scale: float,
    axis: str | None = None,
    static: bool = False,
    stored: bool = False,
) -> Callable:
    """step(state, batch, learning_rate, key) -> (state, metrics).

    A step whose loss or gradient is not finite changes only the counts of steps and of skipped steps.

    Args:
      config: what is trained.
      scale: energy scale, eV/atom.
      axis: name of the device axis over which everything is summed; None on a single device.
      static: whether the loss compares energies and forces at one true frame of each relaxation,
        without the ODE. For the implicit scheme and static models (which have no other loss), whose
        energy is a function of the positions alone.
      stored: whether the traced gradient is kept on disk and looked up there (`programs`).
    """
    network = network_of(config)
    static = static or config.dynamics.latent == "static"
    objective = Objective(network, config.loss, "frame" if static else "path")
    gradient_of = batch_gradient.inline if stored else batch_gradient.function
    optimizer, decay = make_optimizer(config.train), config.train.ema

    def step(state: TrainState, batch: Batch, learning_rate: Array, key: Array):
        key = jax.random.fold_in(key, state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        batch = _draw_frames(batch, key) if static else _draw(config, network, batch, key)
        numbers = batch_numbers(objective, batch)
        if axis is not None:
            numbers = _added_up(numbers, axis)
        unit = _unit(scale, batch[0])
        gradient, totals = gradient_of(objective, state.params, unit, batch, numbers)
        if axis is not None:
            gradient, totals = _added_up((gradient, totals), axis)
        terms = {name: Term(total, numbers[name]) for name, total in totals.items()}
        loss, _ = weighted_loss(terms, config.loss)
        means = {name: term.mean() for name, term in terms.items()}
        norm = optax.tree.norm(gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        # The decay is warmed up: early averages would be dominated by the initial parameters.
        warm = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: warm * e + (1.0 - warm) * p, state.ema, params)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = TrainState(params, ema, optimizer_state, state.step + 1, state.skipped)
        old = state._replace(step=state.step + 1, skipped=state.skipped + 1)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        return state, means | {"loss": loss, "gradient_norm": norm, "finite": finite}

    return step


def make_eval_step(
    config: Config, scale: float, axis: str | None = None, stored: bool = False
) -> Callable:
    """step(params, batch) -> sums and counts of the loss terms, force and coordinate errors.

    For static models, those of `STATIC_TERMS` and of the force errors at all true frames instead.
    The arguments are those of `make_train_step`.
    """
    static = config.dynamics.latent == "static"
    objective = Objective(network_of(config), config.loss, "frames" if static else "path")
    terms_of = batch_terms.inline if stored else batch_terms.function

    def step(params: Params, batch: Batch) -> dict[str, Term]:
        terms = terms_of(objective, params, _unit(scale, batch[0]), _asked(config, batch))
        return _added_up(terms, axis) if axis is not None else terms

    return step
