"""Initial parameters, drawn with NumPy from the shapes Flax reports.

With JAX, XLA would compile one random-number kernel per parameter, at about 0.15 s each on a CPU
(26 s for this network, measured); the shapes alone take about a second. Drawn with NumPy, the
parameters do not depend on the JAX version either.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from relaxnet_jax.models.elements import element_properties
from relaxnet_jax.models.energy import RelaxNetwork
from relaxnet_jax.programs import Program
from relaxnet_jax.typing import Graph, Params

SMALL = 0.1  # factor on the kernels of layers named small_*
OWN = 0.3  # noise in each element's embedding: separates elements with the same properties


@Program
def _zeros(network: RelaxNetwork, graph: Graph) -> Params:
    """Zeros, laid out like the parameters.

    A `Program` only so that the shapes are kept on disk: Flax takes a second or two to find them.
    """
    shapes = jax.eval_shape(
        lambda g: network.init(jax.random.key(0), g, method="initialise")["params"], graph
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def initial_parameters(
    network: RelaxNetwork, graph: Graph, seed: int = 0, dtype=np.float32
) -> Params:
    """Parameters of the network for graphs laid out like ``graph`` (its sizes do not matter).

    Kernels are uniform with variance 1/fan_in (LeCun), or a hundredth of that in layers named
    ``small_*``; biases and ``log_*`` scalars are zero; norm scales are one. Embeddings are a random
    projection of the elements' properties plus noise, so that similar elements start close together.
    """
    shapes = _zeros.shapes(network, graph)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        *modules, name = [entry.key for entry in path]
        if name.endswith("kernel"):
            scale = SMALL if modules[-1].startswith("small_") else 1.0
            bound = scale * np.sqrt(3.0 / leaf.shape[-2])  # stacked layers are axis 0
            values = rng.uniform(-bound, bound, leaf.shape)
        elif name == "embedding":
            known = element_properties()
            project = rng.standard_normal((known.shape[1], leaf.shape[1]))
            values = known @ project / np.sqrt(known.shape[1])
            values = values + OWN * rng.standard_normal(leaf.shape)
        elif name == "scale":
            values = np.ones(leaf.shape)
        elif name == "bias" or name.startswith("log_"):
            values = np.zeros(leaf.shape)
        else:
            raise ValueError(
                f"no initial value is known for parameter {jax.tree_util.keystr(path)}"
            )
        return values.astype(dtype)

    # One transfer of the whole tree: otherwise JAX would compile a conversion for every shape.
    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))
