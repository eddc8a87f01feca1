"""Predictions on several devices at once are those on one."""

import os

from processes import printed_on_devices

SEVERAL = """
import sys
sys.path.insert(0, {tests!r})
import jax, numpy as np
from tiny import crystal, molecule, slab, tiny_config, tiny_model
from relaxnet_jax import solving
from relaxnet_jax.predict import predict_structures

assert jax.local_device_count() == 3
model = tiny_model(tiny_config("explicit", model__layers=1), dtype=np.float32)
faster = jax.tree.map(lambda a: 1.5 * a, model.params["velocity_gate"])
model = model.replace(params=model.params | {{"velocity_gate": faster}})
atoms = [crystal(), molecule(), slab(), *(molecule()[:n] for n in range(2, 7))]
structures = [model.structure(a) for a in atoms]
assert solving.usable_devices(model) == 3
bound = model.replace(params=jax.device_put(model.params, jax.devices()[1]))
assert solving.usable_devices(bound) == 1
together = predict_structures(model, structures, batch_size=2)
made = len(solving._everywhere(model.network, 3).compiled)
assert made >= 1
apart = predict_structures(bound, structures, batch_size=2)
assert solving._everywhere.cache_info().currsize == 1
for one, other in zip(together, apart, strict=True):
    np.testing.assert_allclose(one.skin, other.skin, atol=1e-5)  # a length, of float32 positions
    np.testing.assert_allclose(one.positions, other.positions, atol=1e-5)
    np.testing.assert_allclose(one.energies, other.energies, atol=1e-4)
    np.testing.assert_allclose(one.forces, other.forces, atol=1e-4)
assert any(path.skin > model.config.graph.skin for path in together)  # some were solved again

# A single batch takes a program that is there for all devices.
(again,) = predict_structures(model, structures[:1], batch_size=2)
np.testing.assert_allclose(again.positions, together[0].positions, atol=1e-5)
assert len(solving._everywhere(model.network, 3).compiled) == made

# What does not fit is solved in parts, and the rest goes on.
real = solving._Everywhere.__call__
def small(self, params, scale, graph, times):
    if graph.nodes["mask"].sum(axis=1).max() > 7:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    return real(self, params, scale, graph, times)
solving._Everywhere.__call__ = small
large = model.structure(slab() + molecule())
paths = predict_structures(model, [*structures, large], batch_size=4)
assert [bool(path.failure) for path in paths] == [False] * len(structures) + [True]
for one, other in zip(paths, together):
    np.testing.assert_allclose(one.positions, other.positions, atol=1e-5)
print("same")
"""


def test_three_devices_predict_what_one_does():
    script = SEVERAL.format(tests=os.path.dirname(__file__))
    assert printed_on_devices(3, script) == "same"
