"""The PyTorch peer of the benchmark computes what we compute; needs the ``bench`` extra."""

import argparse
import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.build import bulk
from tiny import batch, compiled, no_weights, systems, tiny_config, tiny_model

from relaxnet_jax import cli
from relaxnet_jax.benchmark import relaxers, report
from relaxnet_jax.benchmark_commands import peers_config
from relaxnet_jax.config import load_config
from relaxnet_jax.errors import InputError
from relaxnet_jax.losses import Targets, loss_terms, weighted_loss
from relaxnet_jax.solver import Trajectory
from relaxnet_jax.train.state import initial_train_state
from relaxnet_jax.train.step import make_train_step

torch = pytest.importorskip("torch")
pytest.importorskip("torchdiffeq")

from relaxnet_jax.benchmark import peer_basis, peer_network, peer_torch, peers  # noqa: E402

DOUBLE = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread", "optimised")


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def case(x64):
    """Our model and trajectories, and the peer with the same parameters."""
    config = tiny_config("explicit", dynamics__friction=True, dynamics__time_scale=True)
    model = tiny_model(config)
    graph = batch(systems(), config)
    return model, graph, compiled(config), peer_torch.peer_graph(graph, DOUBLE)


def real(values, graph):
    """The real atoms (axis -2) or structures (axis -1) of an array."""
    values, atoms = np.asarray(values), np.asarray(graph.nodes["mask"])
    return values[:, atoms] if values.ndim == 3 else values[:, np.asarray(graph.globals["mask"])]


def targets_for(graph, frames=3, seed=0):
    """Random frames, one of them absent."""
    rng = np.random.default_rng(seed)
    shape, n_graphs = (frames, *graph.nodes["positions"].shape), graph.n_node.shape[0]
    present = np.repeat(np.asarray(graph.globals["mask"])[None], frames, 0)
    present[1, 0] = False
    return Targets(
        np.asarray(graph.nodes["positions"]) + rng.normal(0, 0.1, shape),
        rng.normal(size=shape),
        rng.normal(size=(frames, n_graphs)),
        present,
        np.full(n_graphs, frames - 1),
    )


def test_harmonics_are_orthonormal(x64):
    """Integrals over the sphere by a grid that is exact for products of degree 4."""
    cosine, weights = np.polynomial.legendre.leggauss(8)
    angle = np.arange(16) * 2 * np.pi / 16
    sine = np.sqrt(1 - cosine**2)[:, None]
    grid = np.stack([sine * np.cos(angle), sine * np.sin(angle), cosine[:, None] + 0 * angle], -1)
    values = peer_basis.spherical_harmonics(torch.tensor(grid.reshape(-1, 3)), 4).numpy()
    integral = (values * np.repeat(weights * 2 * np.pi / 16, 16)[:, None]).T @ values
    np.testing.assert_allclose(integral, np.eye(25), atol=1e-12)


def test_trajectories_agree(case):
    """Positions, velocities, energies and forces of all frames; in double to rounding."""
    model, graph, ours, peer_graph = case
    expected = ours.trajectory(model, graph)
    network = peer_torch.peer_network(model, DOUBLE).requires_grad_(False)
    found = peer_torch.infer(network, peer_graph, float(model.energy_scale))
    for name in ("positions", "velocities", "energies", "forces"):
        theirs = getattr(found, name).numpy()
        np.testing.assert_allclose(theirs, real(getattr(expected, name), graph), atol=1e-9)
    assert float((found.positions[-1] - found.positions[0]).abs().max()) > 0.1
    single = peer_torch.peer_network(model).requires_grad_(False)
    plain = peer_torch.peer_graph(graph)
    found = peer_torch.infer(single, plain, float(model.energy_scale))
    for name in ("positions", "energies", "forces"):
        theirs = getattr(found, name).numpy()
        np.testing.assert_allclose(theirs, real(getattr(expected, name), graph), atol=1e-4)


@pytest.mark.heavy
def test_parameter_gradients_agree(case):
    """The gradient of a random linear function of everything predicted."""
    model, graph, ours, peer_graph = case
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=w.shape) for w in no_weights(graph)]
    weights = [w * (real_mask(w, graph)) for w in weights]
    (_, _), (expected, _) = ours.weighted(model, graph.nodes["positions"], graph, weights)
    network = peer_torch.peer_network(model, DOUBLE)
    found = peer_torch.solve(network, peer_graph, float(model.energy_scale))
    value = sum((torch.tensor(real(w, graph)) * y).sum() for w, y in zip(weights, found))
    value.backward(inputs=list(network.parameters()))
    theirs = peer_torch.peer_network(model.replace(params=expected.params), DOUBLE)
    for (name, a), b in zip(network.named_parameters(), theirs.parameters(), strict=True):
        scale = max(float(b.detach().abs().max()), 1e-6)
        np.testing.assert_allclose(a.grad / scale, b.detach() / scale, atol=1e-8, err_msg=name)


def real_mask(values, graph):
    """One on real atoms or structures, zero on padding."""
    shape, n_atoms = values.shape, graph.nodes["mask"].shape[0]
    mask = graph.nodes["mask"] if shape[1:2] == (n_atoms,) else graph.globals["mask"]
    return np.asarray(mask, float).reshape(1, -1, *[1] * (len(shape) - 2))


@pytest.mark.parametrize("errors", ["squared", "norm"])
def test_losses_agree(case, errors):
    model, graph, ours, peer_graph = case
    config = tiny_config(
        "explicit", dynamics__friction=True, dynamics__time_scale=True, loss__errors=errors
    )
    targets = targets_for(graph)
    prediction = ours.trajectory(model, graph)  # no element energies: relative to them already
    terms = loss_terms(Trajectory(*prediction[:4]), targets, graph, config.loss)
    expected, means = weighted_loss(terms, config.loss)
    network = peer_torch.peer_network(model, DOUBLE).requires_grad_(False)
    found = peer_torch.infer(network, peer_graph, float(model.energy_scale))
    loss, parts = peer_torch.peer_loss(
        found, peer_torch.peer_targets(graph, targets, DOUBLE), peer_graph, config
    )
    for name, mean in means.items():
        assert float(parts[name]) == pytest.approx(float(mean), rel=1e-9), name
    assert float(loss) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.heavy
def test_training_agrees(case):
    """Losses, parameters and their average after three whole steps."""
    model, graph, _, peer_graph = case
    config, scale = model.config, float(model.energy_scale)
    targets = targets_for(graph)
    step = jax.jit(make_train_step(config, scale))
    state = initial_train_state(model.params, config.train)
    trainer = peer_torch.PeerTraining(peer_torch.peer_network(model, DOUBLE), scale)
    peer_targets = peer_torch.peer_targets(graph, targets, DOUBLE)
    rate = jnp.asarray(config.train.learning_rate)
    for _ in range(3):
        state, metrics = step(state, (graph, targets), rate, jax.random.key(0))
        loss = trainer.step(peer_graph, peer_targets)
        assert loss == pytest.approx(float(metrics["loss"]), rel=1e-9)
    for params, theirs in ((state.params, trainer.parameters), (state.ema, trainer.average)):
        ours = peer_torch.peer_network(model.replace(params=params), DOUBLE).parameters()
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a.detach(), b.detach(), atol=1e-9)


def test_unknown_options_are_refused():
    refused = {
        "model.interaction": "triplets",
        "dynamics.order": "first",
        "dynamics.cell": "variable",
    }
    for field, value in refused.items():
        with pytest.raises(InputError, match=f"does not support {field}={value!r}"):
            peer_network.PeerNetwork(load_config("explicit.py", {field: value}))


def test_parameters_without_counterpart(case):
    model = case[0]
    network = peer_network.PeerNetwork(model.config)
    params = dict(model.params) | {"extra": {"kernel": np.zeros((2, 2))}}
    with pytest.raises(ValueError, match="extra"):
        peer_torch.copy_parameters(params, network)
    with pytest.raises(ValueError, match="without counterpart"):
        peer_torch.copy_parameters({}, network)


def test_the_core_does_not_need_torch():
    code = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "torchdiffeq", "chgnet"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import relaxnet_jax.benchmark_commands, relaxnet_jax.predict, relaxnet_jax.train.loop
import relaxnet_jax.benchmark.peers, relaxnet_jax.benchmark.speed
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.heavy
def test_relaxers_relax():
    """CHGNet under LBFGS and under torch-sim both end where the forces vanish."""
    pytest.importorskip("chgnet")
    model = relaxers.load_chgnet()
    atoms = [bulk(s, cubic=True) for s in ("Cu", "Al")]
    for k, a in enumerate(atoms):
        a.rattle(0.1, seed=k)
    seconds, steps, converged = relaxers.relax_with_lbfgs(model, atoms[0])
    assert converged and steps > 1 and seconds > 0
    pytest.importorskip("torch_sim")
    seconds, fmax = relaxers.relax_with_torch_sim(model, atoms)
    assert max(fmax) <= relaxers.FMAX and len(fmax) == 2 and seconds > 0


def test_missing_peers_are_named(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="torch-sim: missing torch, chgnet, torch_sim;"):
        peers._installed(["torch-sim"], print)
    with pytest.raises(InputError, match="no peer is installed"):
        peers._installed(None, print)
    assert "chgnet: missing torch, chgnet;" in capsys.readouterr().out
    assert cli.main(["benchmark", "peers", "--only", "fastest"]) == 2


def test_peers_that_differ_are_not_timed():
    with pytest.raises(RuntimeError, match="the losses of RelaxNet and of the PyTorch peer differ"):
        peers._check(float("nan"), "the losses")


def test_the_default_comparison_is_one_the_peer_knows():
    """Of the shipped config with all it trains with, but for the noise."""
    args = argparse.Namespace(config="explicit.py", data=None, fast=True)
    config = peers_config(args)
    peer_network.check_peer(config)
    noisy = dataclasses.replace(config, train=dataclasses.replace(config.train, noise=0.1))
    with pytest.raises(InputError, match=r"train\.noise"):
        peer_network.check_peer(noisy)


def test_ratios_are_of_turns(monkeypatch):
    """The ratio's extremes are those of the single turns, not of unlike moments."""
    turns = {"ours": [1.0 + peers.PAUSE, 2.0 + peers.PAUSE], "peer": [2.0 + peers.PAUSE] * 2}
    monkeypatch.setattr(peers, "measure_alternating", lambda *a, **k: turns)
    monkeypatch.setattr(peers, "_fastest_threads", lambda run: 1)
    bucket = type("Bucket", (), {"structures": (1, 2)})
    entry = peers._ratios(lambda: None, lambda: None, bucket)
    assert entry["ratio"] == pytest.approx({"min": 1.0, "median": 1.5, "max": 2.0})
    table = report.peers_table({"entries": {"x / inference": entry, "y": {"skipped": "no"}}})
    assert table.row_count == 1 and json.dumps(entry)
