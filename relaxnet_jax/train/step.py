"""The training and evaluation steps: pure functions made by factories."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from relaxnet_jax.config import Config
from relaxnet_jax.losses import (
    CellTargets,
    Targets,
    Term,
    coordinate_error,
    loss_terms,
    strain_error,
    weighted_loss,
)
from relaxnet_jax.model import network_of
from relaxnet_jax.models.precision import in_float32
from relaxnet_jax.potential import energies_and_forces
from relaxnet_jax.solver import Trajectory, solve_trajectory
from relaxnet_jax.strain import deform_positions
from relaxnet_jax.train.perturb import perturbed
from relaxnet_jax.train.state import TrainState, make_optimizer
from relaxnet_jax.typing import Graph, Params

Batch = tuple[Graph, Targets]


def make_loss(config: Config, scale: float, axis: str | None) -> Callable:
    """loss(params, batch, key) -> (loss, means of the terms).

    With ``axis`` the sums are added over devices before dividing, so the result (and the
    gradient, once added over devices) is that of one batch with all their structures.
    """
    network = network_of(config)

    @in_float32
    def loss(params: Params, batch: Batch, key: Array | None) -> tuple[Array, dict[str, Array]]:
        graph, targets = batch
        if key is not None and (config.train.noise or config.train.strain_noise):
            graph, targets = perturbed(config, network, graph, targets, key)
        if config.dynamics.latent == "direct":
            targets = _final_only(targets)
        prediction = solve_trajectory(network, params, _unit(scale, graph), graph, targets.times)
        terms = loss_terms(prediction, targets, graph, config.loss)
        errors = _errors(prediction, targets, graph)
        if axis is not None:
            terms, errors = jax.tree.map(_add_over(axis), (terms, errors), is_leaf=_is_term)
        total, means = weighted_loss(terms, config.loss)
        return total, means | {name: error.mean() for name, error in errors.items()}

    return loss


def _unit(scale: float, graph: Graph) -> Array:
    return jnp.asarray(scale, graph.nodes["positions"].dtype)


def make_static_loss(config: Config, scale: float, axis: str | None) -> Callable:
    """loss(params, batch, key) -> (loss, means of the terms): energies and forces, no ODE.

    One frame of each relaxation, drawn at random, is looked at where it truly is; so the terms
    that compare positions, or one frame with the next, are zero. Only for the implicit scheme and
    static models, whose energy is a function of the positions alone.
    """
    network = network_of(config)

    @in_float32
    def loss(params: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        graph, targets = batch
        draws = jax.random.uniform(key, targets.frame_mask.shape)
        frame = jnp.argmax(jnp.where(targets.frame_mask, draws, -1.0), axis=0)
        node, structures = graph.nodes["graph"], jnp.arange(frame.shape[0])
        atoms = jnp.arange(node.shape[0])
        truth = Targets(
            positions=jnp.asarray(targets.positions)[frame[node], atoms][None],
            forces=jnp.asarray(targets.forces)[frame[node], atoms][None],
            energies=jnp.asarray(targets.energies)[frame, structures][None],
            frame_mask=jnp.asarray(targets.frame_mask)[frame, structures][None],
            last=jnp.zeros_like(targets.last),
            cells=None
            if targets.cells is None
            else CellTargets(*(jnp.asarray(v)[frame, structures][None] for v in targets.cells)),
        )
        deformation = None if truth.cells is None else truth.cells.deformation[0]
        found = _at_frame(network, params, scale, graph, truth.positions[0], deformation)
        prediction = jax.tree.map(lambda value: value[None], found)
        terms = loss_terms(prediction, truth, graph, config.loss)
        if axis is not None:
            terms = jax.tree.map(_add_over(axis), terms, is_leaf=_is_term)
        return weighted_loss(terms, config.loss)

    return loss


def _at_frame(network, params, scale, graph, reference, deformation) -> Trajectory:
    """Energies, forces and virials at these reference positions (N, 3): a frame, without the axis
    of frames."""
    positions = reference
    if deformation is not None:
        positions = deform_positions(deformation, reference, graph.nodes["graph"])
    unit = _unit(scale, graph)
    latent = jnp.zeros((positions.shape[0], 0), positions.dtype)
    found = energies_and_forces(network, params, unit, graph, positions, latent, deformation)
    moving = positions, jnp.zeros_like(positions), found.energies, found.forces
    return Trajectory(
        *moving, *(() if deformation is None else (reference, deformation, found.virial))
    )


def _final_only(targets: Targets) -> Targets:
    """The targets of a direct predictor: of each structure nothing but its final frame."""
    slots = jnp.arange(targets.frame_mask.shape[0])[:, None]
    return targets._replace(frame_mask=targets.frame_mask & (slots == targets.last))


def _errors(prediction: Trajectory, targets: Targets, graph: Graph) -> dict[str, Term]:
    """Final-frame errors, and those of doing nothing."""
    ours, nothing = coordinate_error(prediction, targets, graph)
    errors = {"coordinates": ours, "nothing": nothing}
    if targets.cells is None:
        return errors
    ours, nothing = strain_error(prediction, targets, graph)
    return errors | {"strain": ours, "nothing_strain": nothing}


def _is_term(x) -> bool:
    return isinstance(x, Term)


def _add_over(axis: str) -> Callable[[Term], Term]:
    # The gradient of a psum over devices, seen from one device, is its own part of the sum:
    # the others' totals enter the value only.
    def add(term: Term) -> Term:
        others = jax.lax.stop_gradient(jax.lax.psum(term.total, axis) - term.total)
        return Term(term.total + others, jax.lax.stop_gradient(jax.lax.psum(term.number, axis)))

    return add


def make_train_step(
    config: Config, scale: float, axis: str | None = None, static: bool = False
) -> Callable:
    """step(state, batch, learning_rate, key) -> (state, metrics), of either loss.

    Static models know the static one only.

    A step whose loss or gradient is not finite changes nothing but the count of skipped steps.
    """
    static = static or config.dynamics.latent == "static"
    loss, optimizer, decay = (
        (make_static_loss if static else make_loss)(config, scale, axis),
        make_optimizer(config.train),
        config.train.ema,
    )

    def step(state: TrainState, batch: Batch, learning_rate: Array, key: Array):
        key = jax.random.fold_in(key, state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        (total, means), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        if axis is not None:
            gradient = jax.lax.psum(gradient, axis)
        norm = optax.tree.norm(gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        # Young averages are dominated by the initial parameters: warm the decay up.
        warm = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: warm * e + (1.0 - warm) * p, state.ema, params)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        new = TrainState(params, ema, optimizer_state, state.step + 1, state.skipped)
        old = state._replace(step=state.step + 1, skipped=state.skipped + 1)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        return state, means | {"loss": total, "gradient_norm": norm, "finite": finite}

    return step


STATIC_TERMS = ("energy", "forces", "stress")  # those that a frame has by itself


def make_eval_step(config: Config, scale: float, axis: str | None = None) -> Callable:
    """step(params, batch) -> sums and counts of the loss terms and coordinate errors.

    Of static models, `STATIC_TERMS` at all true frames instead.
    """
    network, latent = network_of(config), config.dynamics.latent

    @in_float32
    def static_step(params: Params, batch: Batch) -> dict[str, Term]:
        graph, targets = batch
        cells = () if targets.cells is None else (jnp.asarray(targets.cells.deformation),)

        def frame(values):
            reference, deformation = (*values, None)[:2]
            return _at_frame(network, params, scale, graph, reference, deformation)

        prediction = jax.lax.map(frame, (jnp.asarray(targets.positions), *cells))
        terms = loss_terms(prediction, targets, graph, config.loss)
        terms = {name: terms[name] for name in STATIC_TERMS if name in terms}
        return jax.lax.psum(terms, axis) if axis is not None else terms

    @in_float32
    def step(params: Params, batch: Batch) -> dict[str, Term]:
        graph, targets = batch
        if latent == "direct":
            targets = _final_only(targets)
        prediction = solve_trajectory(network, params, _unit(scale, graph), graph, targets.times)
        terms = loss_terms(prediction, targets, graph, config.loss)
        terms = terms | _errors(prediction, targets, graph)
        return jax.lax.psum(terms, axis) if axis is not None else terms

    return static_step if latent == "static" else step
