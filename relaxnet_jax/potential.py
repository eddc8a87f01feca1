"""From an energy to (energy, forces, virial), always by differentiation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from relaxnet_jax.graph import deform
from relaxnet_jax.models.energy import RelaxNetwork, call
from relaxnet_jax.models.precision import in_float32
from relaxnet_jax.programs import Program, storable
from relaxnet_jax.strain import deform_positions, symmetric
from relaxnet_jax.typing import AnyArray, Energies, Forces, Graph, Latent, Params, Positions


@storable
class Evaluation(NamedTuple):
    """Output of the network for one state.

    Attributes:
      energies: (G,) eV, relative to the composition energies.
      forces: (N, 3) eV/Å.
      pair: (N, P) pair features of the explicit scheme, else None.
      virial: (G, 3, 3) eV, dE/d(strain), symmetric; None for fixed cells.
    """

    energies: Energies
    forces: Forces
    pair: Array | None
    virial: Array | None = None


@in_float32
def energies_and_forces(
    network: RelaxNetwork,
    params: Params,
    scale: AnyArray,
    graph: Graph,
    positions: Positions,
    latent: Latent,
    deformation: Array | None = None,
) -> Evaluation:
    """Energies of all structures, F = -dE/dx and, with a deformation, the virial dE/d(strain).

    In the explicit scheme the energy is E(x; h) at fixed latent h, as in the ODE, where h is a
    state of its own. Otherwise it is E(x) through the whole encoder, and ``latent`` is not used.

    Args:
      scale: eV, the energy spread per atom of the training set.
      positions: (N, 3) Å, Cartesian.
      latent: (N, F), or (N, 0) in the implicit scheme.
      deformation: (G, 3, 3), by which the lattices of the graph are deformed; None for the graph's
        own lattices, without a virial.

    Returns:
      Energies relative to the composition energies; raw forces, also on fixed atoms.
    """

    def energy(graph, x):
        if network.dynamics.latent != "explicit":
            h = call(network, params, "encode", graph, x).h
            energies, pair = call(network, params, "read_out", h, graph), None
        else:
            energies, pair = call(network, params, "explicit_energy", latent, graph, x)
        energies = energies * scale
        return jnp.sum(energies), (energies, pair)

    if deformation is None:
        gradient, (energies, pair) = jax.grad(energy, argnums=1, has_aux=True)(graph, positions)
        return Evaluation(energies, -gradient, pair)

    def strained(x, strain):
        # A strain e moves everything from r to (1 + e) r, on top of the given deformation.
        change = jnp.eye(3, dtype=x.dtype) + symmetric(strain)
        x = deform_positions(change, x, graph.nodes["graph"])
        return energy(deform(graph, change @ deformation), x)

    (gradient, virial), (energies, pair) = jax.grad(strained, argnums=(0, 1), has_aux=True)(
        positions, jnp.zeros_like(deformation)
    )
    return Evaluation(energies, -gradient, pair, virial)


# Shared by all callers outside a traced program, so that each shape is compiled only once.
evaluate = Program(energies_and_forces)


def program_kind(network: RelaxNetwork, dtype: Any) -> tuple[Any, ...]:
    """What `evaluate` depends on besides the shape of a batch, see `batching.known_shape`."""
    return "evaluate", network, np.dtype(dtype).name


def compiled_shapes() -> int:
    """Number of padded shapes for which `evaluate` has been compiled in this process."""
    return evaluate.cache_size()
