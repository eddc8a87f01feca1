"""Prediction of structures, and the model folder."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from tiny import crystal, molecule, slab, systems, tiny_config, tiny_model

import relaxnet_jax
from relaxnet_jax import memory, predict, solving
from relaxnet_jax.batching import BatchShape, fitting_shape, pack, shape_of, shared_shapes
from relaxnet_jax.committee import predict_members
from relaxnet_jax.config import load_config, to_dict
from relaxnet_jax.errors import InputError
from relaxnet_jax.model import (
    RelaxNet,
    create_model,
    load_model,
    predict_trajectory,
    save_model,
    stack_models,
)  # fmt: skip
from relaxnet_jax.neighbors import approach, pairs_within, skin_for
from relaxnet_jax.predict import judge, predict_structures, relax
from relaxnet_jax.solving import compiled_shapes

KNOWN = tuple(range(1, 90))


@pytest.fixture(scope="module")
def model():
    table = np.zeros(119)
    table[[1, 8, 78]] = -3.0, -5.0, -2.0
    made = tiny_model(tiny_config("explicit", model__layers=1), dtype=np.float32)
    return made.replace(element_energies=table)


def scaled(model, factor):
    """The model with its initial velocities multiplied."""
    head = jax.tree.map(lambda a: factor * a, model.params["velocity_gate"])
    return model.replace(params=model.params | {"velocity_gate": head})


def test_relax_one_and_many(model):
    """Order and names are kept; a structure's path does not depend on its company."""
    atoms = [slab(), molecule(), crystal(), slab()]
    atoms[1].info["traj_id"] = "my molecule"
    atoms[3].positions[-1] += 0.1
    many = relax(model, atoms, n_frames=4, batch_size=2)
    formulas = [a.get_chemical_formula() for a in atoms]
    assert [t.id for t in many] == [
        f"0-{formulas[0]}", "my molecule", f"2-{formulas[2]}", f"3-{formulas[3]}"]  # fmt: skip
    for a, t in zip(atoms, many):
        assert t.n_frames == 4 and t.times.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
        np.testing.assert_array_equal(t.atomic_numbers, a.numbers)
        np.testing.assert_array_equal(t.positions[0], a.positions)  # exact although float32
        np.testing.assert_array_equal(t.cells[-1], a.cell.array)
        assert t.pbc.tolist() == a.pbc.tolist()
        assert np.abs(t.positions[-1] - a.positions).max() > 0.01
        t.validate()
    for t in (many[0], many[3]):
        np.testing.assert_array_equal(t.positions[:, :2], np.repeat(t.positions[:1, :2], 4, 0))
        assert t.fixed_mask.tolist() == [True, True] + [False] * 4
    single = relax(model, slab(), n_frames=4)
    np.testing.assert_allclose(single.positions, many[0].positions, atol=2e-5)
    np.testing.assert_allclose(single.energies, many[0].energies, atol=1e-3)
    assert np.abs(many[3].positions[-1] - many[0].positions[-1]).max() > 0.05
    # Total energies: relative ones plus the composition energy -4·2 - 5 - 3.
    energy, forces = model.energy_and_forces(slab())
    np.testing.assert_allclose(single.energies[0], energy, rtol=1e-4)
    np.testing.assert_allclose(single.forces[0], forces, atol=1e-3 * np.abs(forces).max())
    assert model.composition_energy(slab().numbers) == pytest.approx(-16)


def test_frames_other_than_the_configuration(model):
    """n_frames only says where the one path is read."""
    coarse, fine = (relax(model, molecule(), n_frames=n) for n in (3, 5))
    assert model.config.dynamics.frames == 3
    np.testing.assert_allclose(fine.positions[::2], coarse.positions, atol=2e-5)
    np.testing.assert_allclose(fine.energies[::2], coarse.energies, atol=1e-3)
    (some,) = predict_structures(
        model, [model.structure(molecule())], np.array([0.75, 0.0, 1 - 1e-14])
    )
    np.testing.assert_allclose(some.positions, fine.positions[[3, 0, 4]], atol=2e-5)
    np.testing.assert_allclose(some.energies, fine.energies[[3, 0, 4]], atol=1e-3)
    assert some.times.tolist() == [0.75, 0.0, 1 - 1e-14] and some.forces.shape == (3, 7, 3)
    with pytest.raises(InputError, match="n_frames=1"):
        relax(model, molecule(), n_frames=1)
    for times in ([0.5, 1.5], [], [[0.0, 1.0]]):
        with pytest.raises(InputError, match="times"):
            predict_structures(model, [model.structure(molecule())], np.array(times))
    assert relax(model, [], n_frames=3) == []


def test_few_shapes(model):
    """Structures of many sizes share few compiled programs."""
    before = compiled_shapes()
    atoms = [molecule()[:n] for n in range(2, 8)] * 2
    relax(scaled(model, 0.2), atoms, n_frames=3, batch_size=4)
    assert 0 < compiled_shapes() - before <= 3


def test_skin_widens(model):
    """Where atoms may have approached by more than the skin, the list is made longer; the path
    is then that of a model whose skin was wide from the start."""
    fast = scaled(model, 1.5)
    atoms, other = molecule(), molecule()
    other.positions += [4.3, -2.8, 0.0]
    atoms += other  # their atoms meet on the way
    (path,) = predict_structures(fast, [fast.structure(atoms)])
    assert path.skin > 0.5 and approach(path.positions, path.cells, 4.0 + path.skin) <= path.skin
    config = fast.config
    graph = dataclasses.replace(config.graph, skin=path.skin)
    wide = fast.replace(config=dataclasses.replace(config, graph=graph))
    (reference,) = predict_structures(wide, [wide.structure(atoms)])
    assert reference.skin == path.skin
    np.testing.assert_allclose(path.positions, reference.positions, atol=1e-5)
    np.testing.assert_allclose(path.energies, reference.energies, atol=1e-5)
    (end,) = predict_structures(fast, [fast.structure(atoms)], np.array([1.0]))
    assert end.skin == path.skin  # however few of its frames are asked for
    np.testing.assert_allclose(end.positions[0], path.positions[-1], atol=1e-5)
    narrow = predict_trajectory(fast, fast.graph(atoms))
    assert np.abs(np.asarray(narrow.energies)[:, 0] - path.energies).max() > 5e-5
    (calm,) = predict_structures(model, [model.structure(crystal())])
    assert (calm.skin == 0.5) == (approach(calm.positions, calm.cells, 4.5) <= 0.5)


def meeting(offset):
    """Two molecules whose atoms meet on the way, and need a wider skin."""
    atoms, other = molecule(), molecule()
    other.positions += [4.3 + offset, -2.8, 0.0]
    return atoms + other


def test_wider_skins_take_compiled_shapes(model):
    """Solving again compiles nothing where the shapes there are have room, and changes no path."""
    fast = scaled(model, 1.5)
    structures = [fast.structure(meeting(d)) for d in (0.0, 0.1, 9.0)]
    structures += [fast.structure(molecule()) for _ in range(5)]
    before = compiled_shapes()
    paths = predict_structures(fast, structures, batch_size=8)
    assert all(path.skin > 0.5 for path in paths[:2])
    assert compiled_shapes() == before + 1
    for path, structure in zip(paths[:3], structures):
        (alone,) = predict_structures(fast, [structure])
        assert alone.skin == pytest.approx(path.skin, abs=1e-4)
        np.testing.assert_allclose(path.positions, alone.positions, atol=1e-4)


def test_divide(model):
    """Among the shapes used, the cheapest with room; smaller batches before a new shape."""
    small, large = model.structure(molecule()), model.structure(crystal().repeat((2, 2, 1)))
    of = dict(enumerate([small] * 5))
    (first,) = predict._divide(of, 8, [])
    shape = first[1]
    assert sorted(first[0]) == [0, 1, 2, 3, 4] and shape.holds(fitting_shape([small] * 5))
    roomy = dataclasses.replace(shape, n_edges=10 * shape.n_edges)
    assert predict._divide(of, 8, [roomy, shape]) == [(first[0], shape)]
    # Twice as many as there is room for are halved, and what does not fit gets a shape of its own.
    tight = dataclasses.replace(fitting_shape([small] * 4), n_graphs=9)
    divided = predict._divide(dict(enumerate([small] * 8)) | {8: large}, 9, [tight])
    assert sorted(i for members, _ in divided for i in members) == list(range(9))
    ((own, new),) = [pair for pair in divided if pair[1] != tight]
    assert own == [8] and new.holds(fitting_shape([large])) and not tight.holds(new)
    for members, found in divided:
        assert found.holds(fitting_shape([large if i == 8 else small for i in members]))


def test_leaving_the_skin_between_frames_is_flagged(model, monkeypatch):
    """However few frames are asked for, the solver's own are looked at."""
    monkeypatch.setattr(predict, "MAX_SKIN", 0.5)  # no wider list
    fast = scaled(model, 1.5)
    start = np.zeros(1)
    (path,) = predict_structures(fast, [fast.structure(meeting(0.0))], start)
    assert path.skin == 0.5 < path.approached
    times = np.linspace(0, 1, fast.config.dynamics.frames)
    (whole,) = predict_structures(fast, [fast.structure(meeting(0.0))], times)
    assert path.approached == pytest.approx(whole.approached, abs=1e-4)
    assert path.approached >= approach(whole.positions, whole.cells, 4.5) - 1e-4
    (one,) = judge(fast, [("a", fast.structure(meeting(0.0)))], 2)
    assert "skin exceeded" in [flag.name for flag in one.flags if flag.unusable]


@pytest.mark.parametrize(("strained", "skin"), [(False, 0.705), (True, 0.12)])
def test_leaving_the_skin_at_a_stage_between_frames(model, strained, skin):
    """RK4's stages evaluate the energy between the frames: there no pair may be missing either."""
    if strained:
        fast = tiny_model(tiny_config(dynamics__cell="variable"), dtype=np.float32)
        fast, atoms, stiffer = fast.replace(elements=KNOWN), crystal(), 30.0
    else:
        fast, atoms, stiffer = model, meeting(0.0), 10.0
    stiff = np.float32(stiffer * fast.energy_scale)
    fast = scaled(fast, 0.3).replace(energy_scale=stiff)
    (wide,) = predict_structures(_of_skin(fast, 5.0), [_of_skin(fast, 5.0).structure(atoms)])
    frames = approach(wide.positions, wide.cells, wide.listed.neighbors.reach)
    assert 5.0 > wide.approached > skin > frames
    narrow = _of_skin(fast, skin)
    (path,) = predict_structures(narrow, [narrow.structure(atoms)])
    assert path.skin > 1.2 * skin
    assert approach(path.positions, path.cells, path.listed.neighbors.reach) < skin
    np.testing.assert_allclose(path.positions, wide.positions, atol=1e-5)
    np.testing.assert_allclose(path.energies, wide.energies, atol=1e-5)


def test_direct_predictors_miss_no_pair(monkeypatch):
    """They look at the first positions only: wherever atoms end, nothing is solved again or flagged."""
    config = tiny_config("direct", dynamics__mass="unit", loss__forces=0.0, model__layers=1)
    model = scaled(tiny_model(config, dtype=np.float32), 30.0)
    monkeypatch.setattr(predict, "_with_skin", None)
    (path,) = predict_structures(model, [model.structure(molecule())])
    assert approach(path.positions, path.cells, 4.5) > 3 * config.graph.skin
    (one,) = judge(model, [("a", model.structure(molecule()))], 3)
    assert "skin exceeded" not in [flag.name for flag in one.flags]


def test_graphs_with_a_skin_hold_for_moved_atoms(model):
    """With a skin the list holds the bonds, too, of atoms that are put elsewhere; without, it says not."""
    atoms = Atoms("NaClO", [[0, 0, 0], [2.3, 0, 0], [0.5, 3.4, 0]])
    moved = atoms.copy()
    moved.positions[2, 1] -= 1.4  # from 3.44 Å to a bond

    def energies(graph, other):
        positions = graph.nodes["positions"].at[: len(other)].set(other.positions)
        return predict_trajectory(
            model, graph._replace(nodes=graph.nodes | {"positions": positions})
        ).energies[:, 0]

    truth = predict_trajectory(model, model.graph(moved)).energies[:, 0]
    np.testing.assert_allclose(energies(model.graph(atoms, skin=1.5), moved), truth, atol=1e-5)
    assert np.abs(energies(model.graph(atoms), moved) - truth).max() > 1e-3


def _of_skin(model, skin):
    return model.replace(config=model.config.with_skin(skin))


def test_graphs_and_models_stack(model):
    """Structures and committees under `jax.vmap` give what each gives by itself."""
    other = model.replace(
        params=jax.tree.map(lambda a: 0.9 * a, model.params), statistics="{}", elements=KNOWN,
        config=dataclasses.replace(model.config, name="other"),
    )  # fmt: skip
    atoms = [molecule(), crystal(), slab()]
    graphs, stacked = model.graphs(atoms), stack_models([model, other])
    assert stacked.elements == KNOWN and stacked.network == model.network
    every = jax.vmap(jax.vmap(predict_trajectory, (None, 0)), (0, None))(stacked, graphs)
    assert every.energies.shape[:2] == (2, 3)
    for i, one in enumerate((model, other)):
        for k, a in enumerate(atoms):
            alone = predict_trajectory(one, one.graph(a))
            np.testing.assert_allclose(every.energies[i, k, :, 0], alone.energies[:, 0], atol=1e-3)
            found = every.positions[i, k, :, : len(a)]
            np.testing.assert_allclose(found, alone.positions[:, : len(a)], atol=2e-5)
    with pytest.raises(InputError, match="no structure"):
        model.graphs([])
    with pytest.raises(InputError, match="no model"):
        stack_models([])
    with pytest.raises(InputError, match="no element"):
        stack_models([other, other.replace(elements=(99,))])
    wider = dataclasses.replace(model.config.graph, skin=0.7)
    with pytest.raises(InputError, match="different functions"):
        stack_models([model, model.replace(config=dataclasses.replace(model.config, graph=wider))])


def test_approach():
    """The two largest displacements; an atom's own images move with it."""
    positions = np.array([[0.0, 0, 0], [0, 0, 1.0]])
    path = np.stack([positions, positions + np.array([[0, 0, 0.2], [0, 0, -0.3]])])
    cells = np.repeat(4.0 * np.eye(3)[None], 2, axis=0)
    assert approach(path, cells, 5.0) == pytest.approx(0.5)
    assert approach(path[:, :1], cells, 5.0) == 0
    assert approach(np.full((2, 3, 3), np.nan), cells, 5.0) == np.inf
    # Atoms that stay in place in a cell that shrinks by 2 %: 2 % of the longest pair.
    cells[1] *= 0.98
    still = np.stack([positions, 0.98 * positions])
    assert approach(still, cells, 5.0) == pytest.approx(0.1)
    assert approach(still[::-1], cells[::-1], 5.0) < 1e-12  # growing brings nothing nearer


def test_a_list_reaches_far_enough_for_a_compressed_cell():
    """All pairs within the cutoff of a crystal compressed by 30 % are in the list of its reference."""
    model = create_model(tiny_config("explicit", dynamics__cell="variable"))
    reference, atoms = crystal(), crystal()
    atoms.set_cell(0.7 * atoms.cell.array, scale_atoms=True)
    atoms.positions[0] += 0.1
    structure, _, _ = model._from_reference(atoms, reference)
    listed, cutoff = structure.neighbors, model.config.graph.cutoff
    cells = np.stack([reference.cell.array, atoms.cell.array])
    x = np.stack([reference.positions, atoms.positions])
    assert approach(x, cells, listed.reach) <= listed.reach - cutoff
    assert approach(x, cells, listed.reach) == pytest.approx(listed.reach - cutoff)  # and no further
    pairs = set(zip(listed.receivers, listed.senders, *listed.shifts.T))
    i, j, shifts, _ = pairs_within(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)
    assert set(zip(i, j, *shifts.T)) <= pairs
    assert skin_for(x[[0, 0]], cells[[0, 0]], cutoff) == 0
    assert skin_for(x, cells * np.array([1.0, 0.0])[:, None, None], cutoff) == np.inf
    atoms.set_cell(0 * atoms.cell.array)
    with pytest.raises(InputError, match="no volume"):
        model._from_reference(atoms, reference)


def test_diverged_predictions_do_not_loop(model, monkeypatch):
    """A path that is not finite is handed back as it is: no wider list is tried."""
    monkeypatch.setattr(predict, "_with_skin", None)
    broken = model.replace(params=jax.tree.map(lambda a: a * np.nan, model.params))
    (path,) = predict_structures(broken, [broken.structure(molecule())])
    assert not np.isfinite(path.positions[-1]).all()


def test_batches_that_do_not_fit_are_split(model, monkeypatch):
    """A batch is halved until it fits; one structure that never does is named, the rest goes on."""
    atoms = [molecule()[:n] for n in (2, 3, 4, 5, 6)] + [molecule() + slab()]
    whole = relax(model, atoms[:5], n_frames=3, batch_size=4)
    real, tried = solving.solve_compiled, []

    def small_device(network, params, scale, graph, times):
        tried.append(int(graph.n_node[np.asarray(graph.globals["mask"])].sum()))
        if tried[-1] > 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return real(network, params, scale, graph, times)

    monkeypatch.setattr(solving, "solve_compiled", small_device)
    done = []
    structures = [model.structure(a) for a in atoms]
    paths = predict_structures(model, structures, np.linspace(0, 1, 3), 4, done.append)
    assert done[-1] == 6
    assert [bool(p.failure) for p in paths] == [False] * 5 + [True]
    assert "13 atoms do not fit" in paths[5].failure and np.isnan(paths[5].positions).all()
    for path, other in zip(paths, whole):
        np.testing.assert_allclose(path.positions, other.positions, atol=2e-5)
        np.testing.assert_allclose(path.energies, other.energies, atol=1e-3)
    # What failed once is split the next time without being tried: it would be compiled.
    assert len([n for n in tried if n > 8]) < len(tried) / 2
    with pytest.warns(RuntimeWarning, match="large: its 13 atoms do not fit"):
        atoms[5].info["traj_id"] = "large"
        assert np.isnan(relax(model, atoms[5], n_frames=3).energies).all()
    named = [(a.info.get("traj_id", f"small-{k}"), a) for k, a in enumerate(atoms)]
    results, bad = predict_members({"its model": model}, named, 3)
    assert len(results) == 5 and len(bad) == 1 and str(bad[0]).startswith("large: its 13 atoms")

    def broken(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(solving, "solve_compiled", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        relax(model, molecule(), n_frames=3)


def test_what_does_not_fit_is_tried_in_its_own_shape(model, monkeypatch):
    """Not only in one that it shared with larger structures."""
    structure = model.structure(crystal())
    own = solving.batch_shape([structure], 1)
    shared = dataclasses.replace(own, n_edges=2 * own.n_edges)
    real, tried = solving.solve_compiled, []

    def small_device(network, params, scale, graph, times):
        tried.append(shape_of(graph))
        if tried[-1].n_edges > room:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return real(network, params, scale, graph, times)

    monkeypatch.setattr(solving, "solve_compiled", small_device)
    batches = solving.Batches(model, np.linspace(0, 1, 3), 3)
    room = own.n_edges
    ((_, (path,)),) = batches.solve([solving.Batch([structure], shared)])
    assert not path.failure and np.isfinite(path.positions).all() and tried == [shared, own]
    room = 0
    ((_, (path,)),) = batches.solve([solving.Batch([structure], shared)])
    assert "do not fit" in path.failure and tried[2:] == [shared, own]


def test_unseen_elements(model):
    trained = model.replace(elements=(1, 6, 8))
    with pytest.raises(InputError, match="1-ClNaO: the model never saw Na, Cl"):
        relax(trained, [Atoms("H2O", np.eye(3)), crystal()])
    with pytest.raises(InputError, match="never saw"):
        trained.energy_and_forces(crystal())
    with pytest.raises(InputError, match="reference"):
        model.energy_and_forces(crystal(), reference=molecule())


def test_save_and_load(model, tmp_path):
    """Bit for bit, and a model already there is replaced as a whole."""
    trained = model.replace(elements=(1, 8, 78), statistics=json.dumps({"data": "none"}))
    save_model(create_model(tiny_config()), tmp_path / "model")
    save_model(trained, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert isinstance(loaded, RelaxNet)
    assert (loaded.config, loaded.elements, loaded.statistics) == (
        trained.config, trained.elements, trained.statistics)  # fmt: skip
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
    first, second = (relax(m, slab(), 3) for m in (trained, loaded))
    np.testing.assert_array_equal(first.positions, second.positions)
    np.testing.assert_array_equal(first.energies, second.energies)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]  # nothing temporary is left
    assert relaxnet_jax.load_model is load_model


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "parameters.npz").unlink(), "parameters.npz is missing"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (lambda f: (f / "parameters.npz").write_bytes(b"PK"), "damaged"),
    (lambda f: (f / "model.json").write_text("{"), "model.json: damaged"),
    (lambda f: (f / "model.json").write_text("[]"), "model.json: damaged"),
    (lambda f: (f / "model.json").write_text('{"format": 1}'), "model.json: damaged"),
    (lambda f: (f / "config.json").write_text("{,"), "not valid JSON"),
    (lambda f: edit(f / "config.json", model={"features": 16}), "do not fit"),
    (lambda f: edit(f / "config.json", extra=1), "unknown config key"),
    (lambda f: edit(f / "model.json", format=99), "format 99"),
    (lambda f: edit(f / "model.json", elements=["Xx"]), "damaged"),
])  # fmt: skip
def test_damaged_models(model, tmp_path, damage, message):
    save_model(model, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(InputError, match=message) as error:
        load_model(tmp_path / "model")
    assert str(tmp_path) in str(error.value)


def test_truncated_parameters(model, tmp_path):
    save_model(model, tmp_path / "model")
    file = tmp_path / "model" / "parameters.npz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        load_model(tmp_path / "model")
    with pytest.raises(InputError, match="no such folder"):
        load_model(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a model folder"):
        load_model(tmp_path / "empty")


def edit(path, **changes):
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            values[key].update(value)
        else:
            values[key] = value
    path.write_text(json.dumps(values))


def test_configuration_survives(model):
    assert load_config(to_dict(model.config)) == model.config


def test_systems_are_what_they_claim():
    """A guard: molecule without cell, slab with fixed atoms, crystal smaller than the cutoff."""
    a, b, c = systems()
    assert not a.pbc.any() and a.cell.rank == 0
    assert b.constraints and b.pbc.tolist() == [True, True, False]
    assert c.cell.lengths().max() < 4.2 and np.abs(c.cell.angles() - 90).max() > 5


def test_batches_of_unequal_crystals_have_one_shape():
    rng = np.random.default_rng(0)
    costs = rng.integers(50, 1500, 250).tolist()
    packed = pack(costs, 16)
    assert sorted(i for batch in packed for i in batch) == list(range(250))
    assert len(packed) == 16 and max(map(len, packed)) <= 16
    totals = [sum(costs[i] for i in batch) for batch in packed]
    assert max(totals) < 1.2 * min(totals)
    assert pack([], 4) == [] and pack([1, 9, 1], 1) == [[1], [0], [2]]

    sizes = [(5, 20, 100, 40), (5, 30, 90, 60), (5, 30, 40, 10), (3, 4, 10, 2)]
    shapes = shared_shapes([BatchShape(*size) for size in sizes])
    assert shapes[0] == shapes[1] == BatchShape(5, 30, 100, 60)
    assert shapes[2] == BatchShape(*sizes[2]) and shapes[3] == BatchShape(*sizes[3])
    assert shared_shapes([]) == []


def test_a_loop_over_structures_compiles_few_programs(model):
    """Each call finds a shape with room among those of earlier calls."""
    cells = [bulk("Cu", "fcc", a=a) * size for a in (3.5, 3.7, 3.9, 4.1) for size in ((1, 1, 1), (2, 1, 1))]
    expected = relax(model, cells, n_frames=3)
    before = compiled_shapes()
    found = [relax(model, atoms, n_frames=3) for atoms in cells]
    assert compiled_shapes() - before <= 2
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one.positions, other.positions, atol=1e-5)
        np.testing.assert_allclose(one.energies, other.energies, atol=1e-4)


def far(atoms):
    """The same, 1000 Å from the origin, where the next float32 is 6e-5 Å away."""
    away = atoms.copy()
    away.positions += [1000.0, -1000.0, 500.0]
    return away


@pytest.mark.parametrize("cell", ["fixed", "variable"])
def test_a_path_far_from_the_origin_is_the_same(cell):
    made = tiny_model(tiny_config("explicit", model__layers=1, dynamics__cell=cell), dtype=np.float32)
    near, away = relax(made, [crystal(), far(crystal())], n_frames=3)
    change = [t.positions - t.positions[:, :1] for t in (near, away)]
    assert np.abs(change[0] - change[0][:1]).max() > 0.01
    np.testing.assert_allclose(change[1], change[0], atol=2e-6)
    np.testing.assert_allclose(away.forces, near.forces, atol=2e-5 * np.abs(near.forces).max())
    np.testing.assert_allclose(away.cells, near.cells, atol=2e-6)
    if cell == "fixed":
        np.testing.assert_allclose(
            away.positions - far(crystal()).positions, near.positions - crystal().positions, atol=2e-6)
    forces = [made.energy_and_forces(a)[1] for a in (crystal(), far(crystal()))]
    np.testing.assert_allclose(forces[1], forces[0], atol=2e-5 * np.abs(forces[0]).max())


def test_predict_trajectory_compiles_once(model):
    """Without `jax.jit` too, and for models that differ in parameters and training alone."""
    graph = model.graph(crystal())
    first = predict_trajectory(model, graph, [0.0, 1.0])
    before = compiled_shapes()
    other = model.replace(statistics=json.dumps({"data": "others"}))
    again = predict_trajectory(other, graph, [0.0, 1.0])
    np.testing.assert_array_equal(first.positions, again.positions)
    train = dataclasses.replace(model.config.train, seed=7)
    trained = model.replace(
        params=jax.tree.map(lambda a: 0.9 * a, model.params),
        config=dataclasses.replace(model.config, name="other", train=train),
    )
    moved = predict_trajectory(trained, graph, [0.0, 1.0])
    assert compiled_shapes() == before
    assert np.abs(moved.positions[-1, :3] - first.positions[-1, :3]).max() > 0


@pytest.mark.parametrize("times", [[0.0, 1.5], [-0.1], [np.nan], [[0.5, 2.0]]])
def test_no_extrapolation(model, monkeypatch, times):
    """Of times that are known; traced ones are not."""
    with pytest.raises(InputError, match=r"times: must be pseudotimes in \[0, 1\]"):
        predict_trajectory(model, model.graph(crystal()), times)

    class ReachedError(Exception):
        pass

    def reached(*args):
        raise ReachedError

    monkeypatch.setattr(relaxnet_jax.model, "solve_compiled", reached)
    for inside in ([0.0, 1.0], np.linspace(0, 1, 7), [[0.5, 1.0]]):
        with pytest.raises(ReachedError):
            predict_trajectory(model, model.graph(crystal()), inside)
    with pytest.raises(ReachedError):
        jax.jit(lambda t: predict_trajectory(model, model.graph(crystal()), t))(np.array(times))


def test_graphs_of_a_given_shape_and_skin(model):
    wide = model.graph([slab(), molecule()], skin=1.5)
    plain = model.graph(crystal(), like=wide)
    assert shape_of(plain) == shape_of(wide)
    listed = [int(np.asarray(g.edges["mask"]).sum()) for g in (wide, model.graph([slab(), molecule()]))]
    assert listed[0] > listed[1]
    apart = predict_trajectory(model, model.graph(crystal()))
    roomy = predict_trajectory(model, plain)
    np.testing.assert_allclose(roomy.energies[:, 0], apart.energies[:, 0], atol=1e-4)
    with pytest.raises(InputError, match="no room for BatchShape"):
        model.graph([crystal()] * 9, like=plain)
    for skin in (-1.0, np.nan):
        with pytest.raises(InputError, match="skin="):
            model.graph(crystal(), skin=skin)


@pytest.mark.parametrize("given", ["POSCAR", [1.0], [crystal(), "POSCAR"]])
def test_structures_are_ase_atoms(model, given):
    for call in (model.graph, model.graphs, lambda atoms: relax(model, atoms, 3)):
        with pytest.raises(InputError, match=r"not ase\.Atoms: read files with ase\.io\.read"):
            call(given)


@pytest.mark.parametrize("given", ["explicit", [1, 2]])
def test_one_model_predicts(given):
    words = "relax_committee" if isinstance(given, list) else "load_model"
    with pytest.raises(InputError, match=rf"model: is of type \w+, not RelaxNet: .*{words}"):
        relax(given, crystal())


def test_bad_sizes(model):
    with pytest.raises(InputError, match="batch_size=0"):
        relax(model, [crystal()], 3, batch_size=0)
    with pytest.raises(InputError, match="no structure given"):
        model.graph([])
    with pytest.raises(InputError, match="jax_enable_x64"), jax.enable_x64(False):
        create_model(tiny_config(), dtype=np.float64)


def test_energies_do_not_mind_wrapping_relative_to_the_reference(model):
    """An atom on the other side of the cell is no atom that moved across it."""
    reference, atoms = crystal(), crystal()
    atoms.positions[0] += 0.05
    expected = model.energy_and_forces(atoms, reference)
    atoms.positions[1] += atoms.cell[0] - atoms.cell[2]
    found = model.energy_and_forces(atoms, reference)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
    structure, _, _ = model._from_reference(atoms, reference)
    assert structure.neighbors.n_edges == model.structure(reference).neighbors.n_edges
    atoms.positions[2] = np.nan
    with pytest.raises(InputError, match="positions are not finite"):
        model.energy_and_forces(atoms, reference)


def test_models_of_charges_say_where_there_are_none():
    charged = create_model(tiny_config(model__layers=1, model__charges=True), dtype=np.float32)
    atoms = crystal()
    (bare,) = judge(charged, [("bare", charged.structure(atoms))], 3)
    assert "no charges" in [flag.name for flag in bare.flags]
    atoms.set_initial_charges([0.5, -0.25, -0.25])
    (full,) = judge(charged, [("full", charged.structure(atoms))], 3)
    assert "no charges" not in [flag.name for flag in full.flags]
    atoms.set_initial_charges([np.nan, 0.0, 0.0])
    with pytest.raises(InputError, match="charges are not finite"):
        charged.structure(atoms)


def test_short_names_for_consoles(model):
    assert repr(model).startswith("RelaxNet(explicit, fixed cells, untrained, ")
    path = relax(model, crystal(), n_frames=3)
    assert repr(path) == "RelaxationTrajectory('0-ClNaO', ClNaO, 3 frames, one cell)"
    with pytest.raises(InputError, match=r"takes a graph, not Atoms; give model\.graph\(atoms\)"):
        predict_trajectory(model, crystal())


def test_batches_suit_the_device(model, monkeypatch):
    """Of the CPU 16 unless it is said otherwise; a GPU takes more."""
    sizes = []
    original = solving.Batches.solve

    def counted(self, batches):
        sizes.extend(len(batch.structures) for batch in batches)
        return original(self, batches)

    monkeypatch.setattr(solving.Batches, "solve", counted)
    relax(model, [crystal()] * 3, 3, batch_size=2)
    assert sorted(sizes) == [1, 2]
    assert [memory.batch_size_of(n) for n in (None, 1, 500)] == [16, 1, 500]
    monkeypatch.setattr(memory.jax, "default_backend", lambda: "gpu")
    assert memory.batch_size_of(None) == 128
    with pytest.raises(InputError, match="batch_size=-1: give at least 1"):
        memory.batch_size_of(-1)
