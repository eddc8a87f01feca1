"""Type aliases for arrays that cross module boundaries, with their shapes and units.

Dimensions: N atoms, E edges (ordered pairs of neighbours), P pairs (an edge and its reverse), B bonds
(the edges that form triplets), K bond slots per atom, G structures, n frames, F features.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jraph
import numpy as np

AnyArray: TypeAlias = jax.Array | np.ndarray
Positions: TypeAlias = jax.Array  # (N, 3) Å
Velocities: TypeAlias = jax.Array  # (N, 3) Å per unit pseudotime
Forces: TypeAlias = jax.Array  # (N, 3) eV/Å
Energies: TypeAlias = jax.Array  # (G,) eV
Times: TypeAlias = AnyArray  # (n,) or (n, G), pseudotime in [0, 1]
Latent: TypeAlias = jax.Array  # (N, F)
Params: TypeAlias = Any  # Flax parameter tree
Graph: TypeAlias = jraph.GraphsTuple  # the padded batch of structures, see graph.py
