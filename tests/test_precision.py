"""Dense layers in bfloat16: a little off, as much as the format rounds; nothing else is."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cell_data import relaxation
from tiny import (
    SCHEMES,
    batch,
    compiled,
    crystal,
    random_rotation,
    split,
    systems,
    tiny_config,
    tiny_model,
)

from relaxnet_jax.batching import fitting_shape
from relaxnet_jax.data.pipeline import collate_samples
from relaxnet_jax.data.sample import make_sample
from relaxnet_jax.model import create_model, predict_trajectory
from relaxnet_jax.models import precision
from relaxnet_jax.models.precision import LayerNorm, bfloat16_product, on_rows
from relaxnet_jax.solver import solve_trajectory
from relaxnet_jax.train.step import Objective, batch_terms

ROUNDING = 2.0**-8  # of one factor, at most half of that


def test_products_and_their_derivatives_round_once():
    x, y, g = np.random.default_rng(0).normal(size=(3, 32, 32)).astype(np.float32)

    def both(product):
        value, back = jax.vjp(product, x, y)
        # A derivative of a derivative, as forces in a loss need it.
        second = jax.grad(
            lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(product(x, y))))(x) ** 2)
        )
        return value, *back(g), second(x)

    for k, (ours, exact) in enumerate(zip(both(bfloat16_product), both(jnp.matmul))):
        off = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
        assert 1e-4 < off < (ROUNDING if k < 3 else 10 * ROUNDING), k
        assert ours.dtype == np.float32


def test_rows_of_accelerators(monkeypatch):
    """Written as a product with ones, what a bias adds is the same, to the second derivative; and the sum
    over rows in its gradient is a matrix product."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)), jnp.float32)
    b = jnp.linspace(-1.0, 1.0, 5)

    def value(x, b):
        return jnp.sum(jnp.sin(x * on_rows(b, 7)) + jnp.cos(x + on_rows(b, 7)))

    def all_of_it():
        of_force = jax.grad(lambda x, b: jnp.sum(jax.grad(value)(x, b) ** 2), argnums=(0, 1))
        found = value(x, b), *jax.grad(value, argnums=(0, 1))(x, b), *of_force(x, b)
        return found, str(jax.make_jaxpr(jax.grad(lambda b: jnp.sum(jnp.sin(on_rows(b, 7)))))(b))

    exact, sums = all_of_it()
    monkeypatch.setattr(precision, "_on_cpu", lambda: False)
    found, products = all_of_it()
    for ours, theirs in zip(found, exact, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert products.count("dot_general") == 2 and "dot_general" not in sums


def test_the_networks_gradients_are_the_same_on_accelerators(monkeypatch):
    """Through scans, checkpoints and second derivatives; also of models that are stacked."""
    # Not the compiled one: its trace, made for the CPU, would be found again and no other be made.
    monkeypatch.setattr("relaxnet_jax.model.solve_compiled", solve_trajectory)
    config, asked = tiny_config("explicit", model__layers=2), []

    def on_accelerator():
        asked.append(True)
        return False

    with jax.enable_x64(True):  # so that sums in another order are no difference
        model, graph = tiny_model(config, factor=1.0), batch(systems(), config)

        def loss(params, graph):
            path = predict_trajectory(model.replace(params=params), graph)
            real = jnp.asarray(graph.nodes["mask"])[:, None]
            return jnp.sum(jnp.where(real, path.forces, 0.0) ** 2) + jnp.sum(path.energies[:, :3])

        def gradients():
            two = jax.tree.map(lambda p: jnp.stack([p, 0.9 * p]), model.params)
            return jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None)))(two, graph)

        exact = gradients()
        monkeypatch.setattr(precision, "_on_cpu", on_accelerator)
        found = gradients()
    assert asked
    for ours, theirs in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
        size = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * size + 1e-10)


def test_layer_norm_is_that_of_flax():
    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32) + 3.0
    params = {"scale": jnp.linspace(0.5, 2.0, 8), "bias": jnp.linspace(-1.0, 1.0, 8)}
    shapes = [jax.tree.map(jnp.shape, m.init(jax.random.key(0), x)) for m in (LayerNorm(), nn.LayerNorm())]
    assert shapes[0] == shapes[1]

    def found(module):
        def value(params, x):
            return jnp.sum(jnp.sin(module.apply({"params": params}, x)))

        return module.apply({"params": params}, x), *jax.tree.leaves(jax.grad(value, (0, 1))(params, x))

    for ours, theirs in zip(found(LayerNorm()), found(nn.LayerNorm()), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module", params=SCHEMES)
def case(request):
    """The same model in both precisions, and their predictions."""
    exact = tiny_model(tiny_config(request.param), dtype=np.float32, factor=1.0)
    model = dataclasses.replace(exact.config.model, matmul="bfloat16")
    reduced = exact.replace(config=dataclasses.replace(exact.config, model=model))
    found = [
        compiled(m.config).trajectory(m, batch(systems(), m.config, dtype=np.float32))
        for m in (exact, reduced)
    ]
    return exact, reduced, *found


def test_predictions_are_a_little_off(case):
    *_, exact, reduced = case
    for name in ("positions", "energies", "forces"):
        pairs = [np.asarray(getattr(p, name)) for p in (exact, reduced)]
        if name == "positions":
            pairs = [p - p[:1] for p in pairs]
        rows = slice(None, sum(map(len, systems()))) if name != "energies" else slice(None, 3)
        a, b = (p[:, rows] for p in pairs)
        off = np.linalg.norm(a - b) / np.linalg.norm(a)
        assert 1e-5 < off < 0.05, (name, off)
        assert b.dtype == np.float32


def test_only_dense_layers_are_rounded(case):
    exact, reduced, *_ = case
    graph = batch(systems(), exact.config, dtype=np.float32)
    texts = [str(jax.make_jaxpr(compiled(m.config).trajectory)(m, graph)) for m in (exact, reduced)]
    assert "bf16" not in texts[0]
    # bfloat16 occurs as the rounded factors of products only, whose results are float32.
    assert "bf16" in texts[1]
    kept = set(re.findall(r":bf16\[[^\]]*\] = (\w+)", texts[1]))
    assert kept and kept <= {"convert_element_type", "transpose"}
    assert "preferred_element_type=float32" in texts[1]


def test_the_laws_hold_as_far_as_it_rounds(case):
    _, model, _, reference = case
    q, turned = random_rotation(4), systems()
    for atoms in turned:
        atoms.positions = atoms.positions @ q.T
        atoms.set_cell(atoms.cell.array @ q.T)
    found = compiled(model.config).trajectory(model, batch(turned, model.config, dtype=np.float32))
    for ours, theirs in zip(split(found.forces, turned), split(reference.forces, turned)):
        assert np.linalg.norm(ours - theirs @ q.T) < 0.02 * np.linalg.norm(theirs)
    np.testing.assert_allclose(
        found.energies[:, :3], reference.energies[:, :3], rtol=0.02, atol=0.02
    )


def products(jaxpr):
    """All matrix products of a traced program, those of the programs in it too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("matmul", ["float32", "bfloat16"])
def test_geometry_is_in_full_float32(matmul):
    """Of cells and positions too: the default of GPUs and TPUs is less."""
    model = tiny_model(
        tiny_config("explicit", dynamics__cell="variable", model__matmul=matmul), dtype=np.float32
    )
    graph = batch(systems(), model.config)
    found = list(products(jax.make_jaxpr(predict_trajectory)(model, graph).jaxpr))
    rounded = [e for e in found if e.invars[0].aval.dtype == jnp.bfloat16]
    assert bool(rounded) == (matmul == "bfloat16") and len(found) > len(rounded) + 5
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert {e.params["precision"] for e in found if e not in rounded} == {highest}


def test_the_loss_is_in_full_float32():
    """Its products of cells and stresses, beside those of the path."""
    config = tiny_config("explicit", dynamics__cell="variable", model__layers=1)
    model, sample = create_model(config), make_sample(relaxation(crystal(), "a"), config)
    graph, targets = collate_samples([sample], fitting_shape([sample.structure]), config)
    objective, unit = Objective(model.network, config.loss, "path"), np.float32(1.0)

    def path(params, graph, targets):
        return solve_trajectory(model.network, params, unit, graph)

    def loss(params, graph, targets):
        return batch_terms.function(objective, params, unit, (graph, targets))

    alone, found = (
        list(products(jax.make_jaxpr(f)(model.params, graph, targets).jaxpr)) for f in (path, loss))
    assert len(found) > len(alone) + 5
    assert {e.params["precision"] for e in found} == {(jax.lax.Precision.HIGHEST,) * 2}
