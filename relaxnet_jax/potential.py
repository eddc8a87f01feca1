"""Energy -> (energy, forces), always by differentiation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from relaxnet_jax.models.energy import RelaxNetwork, call
from relaxnet_jax.typing import AnyArray, Energies, Forces, Graph, Latent, Params, Positions


class Evaluation(NamedTuple):
    """Energies (G,) eV relative to the composition energies, forces (N, 3) eV/Å, pair features."""

    energies: Energies
    forces: Forces
    pair: Array | None


def energies_and_forces(
    network: RelaxNetwork,
    params: Params,
    scale: AnyArray,
    graph: Graph,
    positions: Positions,
    latent: Latent,
) -> Evaluation:
    """Energies of all structures and F = -dE/dx.

    Explicit scheme: E(x; h) with the latent h held fixed, as in the ODE, where h is a state of
    its own. Implicit scheme: E(x) through the whole encoder; ``latent`` is not used.

    Args:
      scale: eV, the training set's energy spread per atom.
      positions: (N, 3) Å. latent: (N, F), or (N, 0) in the implicit scheme.

    Returns:
      Energies relative to the composition energies; raw forces, also on fixed atoms.
    """

    def total(x):
        if network.dynamics.latent == "implicit":
            h = call(network, params, "encode", graph, x).h
            energies, pair = call(network, params, "read_out", h, graph), None
        else:
            energies, pair = call(network, params, "explicit_energy", latent, graph, x)
        energies = energies * scale
        return jnp.sum(energies), (energies, pair)

    gradient, (energies, pair) = jax.grad(total, has_aux=True)(positions)
    return Evaluation(energies, -gradient, pair)
