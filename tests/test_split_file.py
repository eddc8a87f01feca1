"""Splits saved beside a set."""

import dataclasses
import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.spacegroup import crystal
from test_pipeline import relaxation
from tiny import TINY

from relaxnet_jax.cli import main
from relaxnet_jax.config import load_config
from relaxnet_jax.data.dataset import load_dataset
from relaxnet_jax.data.prototypes import prototype
from relaxnet_jax.data.split_file import make_folds, read_splits, run_splits, split_of_run
from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.data.store_write import write_store
from relaxnet_jax.errors import InputError


@pytest.fixture
def path(tmp_path):
    """30 diatomics of 15 formulas of 6 elements; the groups are pairs of formulas."""
    symbols = ["H", "C", "N", "O", "F", "S"]
    pairs = [(a, b) for i, a in enumerate(symbols) for b in symbols[:i]]
    made = []
    for k in range(30):
        a, b = pairs[k % 15]
        atoms = Atoms([a, b], [[0, 0, 0], [1.2, 0, 0.1]])
        t = relaxation(atoms, n=3, name=f"r{k}", seed=k)
        made.append(dataclasses.replace(t, group=f"g{k % 15 // 2}"))
    write_store(tmp_path / "set.h5", made)
    return tmp_path / "set.h5"


@pytest.mark.parametrize("by", ["group", "formula", "elements"])
def test_folds_are_disjoint_and_whole(path, by):
    with TrajectoryStore(path) as store:
        folds = make_folds(store, 4, by, seed=1)
        labels = {
            "group": store.groups,
            "formula": [store[i].formula for i in range(30)],
            "elements": [tuple(sorted(set(store[i].atomic_numbers))) for i in range(30)],
        }[by]
    assert sorted(np.concatenate([f.test for f in folds])) == list(range(30))
    for fold in folds:
        assert sorted(np.concatenate(fold)) == list(range(30)) and min(map(len, fold)) > 0
        kinds = [{labels[i] for i in rows} for rows in fold]
        assert not (kinds[0] & kinds[1] or kinds[0] & kinds[2] or kinds[1] & kinds[2])


def relaxed(name, atoms, **fields):
    """A relaxation that ends at a structure, nearly."""
    noise = 0.02 * np.random.default_rng(len(name)).uniform(-1, 1, atoms.positions.shape)
    t = relaxation(atoms, n=3, name=name)
    return dataclasses.replace(t, positions=t.positions - t.positions[-1] + atoms.positions + noise)


def test_prototypes(tmp_path):
    rutile = {"symbols": ["Ti", "O"], "basis": [(0, 0, 0), (0.3, 0.3, 0)], "spacegroup": 136}
    oxide = crystal(**rutile, cellpar=[4.6, 4.6, 2.95, 90, 90, 90])
    fluoride = crystal(**rutile | {"symbols": ["Mg", "F"]}, cellpar=[4.7, 4.7, 3.1, 90, 90, 90])
    fluorite = bulk("CaF2", "fluorite", a=5.46)
    water = Atoms("OH2", [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    structures = {"a": oxide, "b": fluoride, "c": fluorite, "d": fluorite * (2, 1, 1), "e": water}
    made = {name: relaxed(name, atoms) for name, atoms in structures.items()}
    assert {name: prototype(t) for name, t in made.items()} == {
        "a": "A-B2 136", "b": "A-B2 136", "c": "A-B2 225", "d": "A-B2 225", "e": "A-B2",
    }  # fmt: skip
    write_store(tmp_path / "set.h5", made.values())
    with TrajectoryStore(tmp_path / "set.h5") as store:
        folds = make_folds(store, 3, "prototype")
    tests = {tuple(fold.test.tolist()) for fold in folds}
    assert tests == {(0, 1), (2, 3), (4,)}


def test_command_and_training_agree(path, capsys):
    assert main(["data", "split", str(path), "--folds", "3", "--by", "formula", "--seed", "5"]) == 0
    out = path.with_name("set.splits.json")
    assert f"data.split_file={out}" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["by"] == "formula" and len(content["folds"]) == 3
    settings = {"data.path": str(path), "data.split_file": str(out), "data.fold": 2}
    dataset = load_dataset(load_config(TINY, settings))
    assert {k: sorted(v) for k, v in dataset.ids().items()} == {
        k: sorted(v) for k, v in content["folds"][2].items()
    }
    assert not dataset.left_out
    first = out.read_bytes()
    again = ["data", "split", str(path), "--folds", "3", "--by", "formula", "--seed"]
    assert main([*again, "5"]) == 0  # nothing to replace
    assert main([*again, "6"]) == 2
    assert f"{out}: exists; give another --out, or --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == first
    assert main([*again, "6", "--overwrite"]) == 0
    assert out.read_bytes() != first


@pytest.mark.parametrize("of_run", [False, True])
def test_like_another_set(path, capsys, of_run):
    """A second set of the same formulas and more: what the first tests on is not trained on in it."""
    with TrajectoryStore(path) as store:
        first = list(store)
    more = boron("H", "C", "N")
    again = [dataclasses.replace(t, id=f"again-{t.id}") for t in first[:25]]
    other = path.with_name("other.h5")
    write_store(other, [*again, *more])
    folds, by = (1, "formula") if of_run else (3, "elements")
    main(["data", "split", str(path), "--folds", str(folds), "--by", by, "--fractions", "0.6", "0.2", "0.2"])
    record = splits = path.with_name("set.splits.json")
    content = json.loads(splits.read_text())["folds"]
    if of_run:
        record = path.with_name("splits.json")
        record.write_text(json.dumps(content[0]))
    assert main(["data", "split", str(other), "--by", by, "--like", str(path), str(record)]) == 0
    out = path.with_name("other.splits.json")
    assert f"data.split_file={out}" in capsys.readouterr().out
    formulas = {t.id: t.formula for t in [*first, *again, *more]}
    made = json.loads(out.read_text())["folds"]
    assert len(made) == len(content) == folds
    for theirs, ours in zip(content, made):
        kinds = {name: {formulas[i] for i in names} for name, names in theirs.items()}
        assert sorted(i for names in ours.values() for i in names) == sorted(t.id for t in [*again, *more])
        for name in ("validation", "test"):
            assert {formulas[i] for i in ours[name]} == kinds[name]
        assert {t.id for t in more} <= set(ours["train"])
        settings = {"data.path": str(other), "data.split_file": str(out), "data.fold": made.index(ours)}
        assert load_dataset(load_config(TINY, settings)).ids() == ours


def boron(*symbols):
    return [relaxation(Atoms([a, "B"], [[0, 0, 0], [1.2, 0, 0.1]]), n=3, name=f"b{a}") for a in symbols]


def test_one_split_of_another_set_is_enough(path):
    """What is tested on there is held out here though nothing is validated on; that is dealt from the rest."""
    splits, other = path.with_name("set.splits.json"), path.with_name("other.h5")
    main(["data", "split", str(path), "--by", "formula"])
    theirs = json.loads(splits.read_text())["folds"][0]
    with TrajectoryStore(path) as store:
        first = {t.id: t for t in store}
    shared = [dataclasses.replace(first[i], id=f"again-{i}") for i in theirs["test"]]
    more = boron("H", "C", "N", "O", "F", "S")
    write_store(other, [*shared, *more])
    assert main(["data", "split", str(other), "--like", str(path), str(splits)]) == 0
    ours = json.loads(path.with_name("other.splits.json").read_text())
    assert ours["by"] == "formula"
    (fold,) = ours["folds"]
    assert sorted(fold["test"]) == sorted(t.id for t in shared)
    assert len(fold["validation"]) == 1 and len(fold["train"]) == 5


def test_nothing_like_another_set(path, capsys):
    splits, other = path.with_name("set.splits.json"), path.with_name("other.h5")
    main(["data", "split", str(path), "--by", "formula"])
    write_store(other, boron("H"))
    command = ["data", "split", str(other), "--like", str(path), str(splits)]
    assert main(command) == 2
    said = "the set shares no formula with the validation and test splits there: there is nothing to keep apart"
    assert said in capsys.readouterr().err
    assert main(["data", "split", str(other), "--like", str(other), str(splits)]) == 2
    assert "--like: not the splits of that set? " in capsys.readouterr().err
    assert main([*command, "--folds", "1", "--seed", "0"]) == 2
    assert "--like: makes no random split; leave out --folds, --seed" in capsys.readouterr().err
    with TrajectoryStore(path) as store:
        held = set(json.loads(splits.read_text())["folds"][0]["test"])
        write_store(other, [t for t in store if t.id in held])
    assert main(command) == 2
    assert "every formula of the set is in the validation or test split there; add others" in capsys.readouterr().err
    assert not path.with_name("other.splits.json").exists()


def test_relaxations_no_split_names_are_counted(path):
    main(["data", "split", str(path)])
    out = path.with_name("set.splits.json")
    content = json.loads(out.read_text())
    gone = content["folds"][0]["train"].pop()
    out.write_text(json.dumps(content))
    dataset = load_dataset(
        load_config(TINY, {"data.path": str(path), "data.split_file": str(out)}))  # fmt: skip
    assert list(dataset.left_out.values()) == [1]
    assert all(gone not in names for names in dataset.ids().values())


def test_the_splits_of_a_run_are_a_file_of_splits(tmp_path):
    """Whose data may have had more: what they name beside these is passed over."""
    file = tmp_path / "splits.json"
    of_run = {"train": ["a", "of another set"], "validation": ["b"], "test": ["c"]}
    file.write_text(json.dumps(of_run))
    splits, unnamed = read_splits(file, ["c", "b", "new", "a"])
    assert [s.tolist() for s in splits] == [[3], [1], [0]] and unnamed == 1
    with pytest.raises(InputError, match="nothing is left of the validation split"):
        read_splits(file, ["a", "c"])
    with pytest.raises(InputError, match="has folds 0 to 0"):
        read_splits(file, ["a", "b", "c"], fold=1)
    (tmp_path / "model").mkdir()
    assert run_splits(tmp_path) == run_splits(tmp_path / "model") == (file, of_run)
    assert split_of_run(tmp_path, "test") == ["c"]
    file.write_text('{"train": ["a"]}')
    with pytest.raises(InputError, match=r"splits.json: damaged .*give the folder of a whole"):
        split_of_run(tmp_path, "test")
    with pytest.raises(InputError, match=r"splits.json: damaged \(KeyError\)"):
        run_splits(tmp_path)
    file.unlink()
    assert run_splits(tmp_path / "model") is None


def test_bad_files_are_named(tmp_path):
    file = tmp_path / "s.json"
    good = {"train": ["a"], "validation": ["b"], "test": ["c"]}

    def write(**changes):
        file.write_text(json.dumps({"format": "relaxnet_jax splits", "folds": [good | changes]}))

    ids = ["a", "b", "c"]
    write()
    splits, unnamed = read_splits(file, [*ids, "d"])
    assert [s.tolist() for s in splits] == [[0], [1], [2]] and unnamed == 1
    write(train=["a", "gone"])
    assert read_splits(file, ids, known={"gone"})[1] == 0
    with pytest.raises(InputError, match="'gone' is not in the set"):
        read_splits(file, ids)
    write(train=["gone"])
    with pytest.raises(InputError, match="nothing is left of the train split"):
        read_splits(file, ids, known={"gone"})
    write(test=["c", "a"])
    with pytest.raises(InputError, match="'a' is in train and test"):
        read_splits(file, ids)
    write()
    with pytest.raises(InputError, match=r"folds 0 to 0, data\.fold is 1"):
        read_splits(file, ids, fold=1)
    file.write_text(json.dumps(good))  # what a training run leaves in its folder
    assert [s.tolist() for s in read_splits(file, ids)[0]] == [[0], [1], [2]]
    for text in ("{", "[]", '{"folds": []}', '{"format": "relaxnet_jax splits", "folds": 3}'):
        file.write_text(text)
        with pytest.raises(InputError, match="not a file of splits"):
            read_splits(file, ids)
    with pytest.raises(InputError, match="No such file"):
        read_splits(tmp_path / "none.json", ids)


@pytest.mark.parametrize("folds", [1, 3])
def test_splits_that_training_refuses(path, capsys, folds):
    command = ["data", "split", str(path), "--folds", str(folds), "--fractions", "0.8", "0", "0.2"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "--fractions 0.8 0 0.2: training needs relaxations in all three splits: give" in error
    assert [p.name for p in path.parent.iterdir()] == ["set.h5"]


def test_impossible_folds(path):
    with TrajectoryStore(path) as store:
        with pytest.raises(InputError, match="8 kinds of group: give 8 folds"):
            make_folds(store, 20)
        with pytest.raises(InputError, match="--folds 0"):
            make_folds(store, 0)


def test_a_set_of_one_composition(tmp_path, capsys):
    """It has one group, whatever belongs together; alone, by their ids, relaxations can be split."""
    path, out = tmp_path / "one.h5", tmp_path / "one.splits.json"
    atoms = Atoms("CuAu", [[0, 0, 0], [2.5, 0, 0.1]])
    write_store(path, [relaxation(atoms, n=3, name=f"r{k}", seed=k) for k in range(12)])
    ways = ["1 group(s)", "import --groups CSV", "data split --by id, for data.split_file"]
    with pytest.raises(InputError) as error:
        load_dataset(load_config(TINY, {"data.path": str(path)}))
    assert all(word in str(error.value) for word in [f"data.path {path}: ", *ways])
    for by in ("group", "formula", "elements", "prototype"):
        assert main(["data", "split", str(path), "--by", by]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in [f"{path}, --by {by}: ", *ways])
    assert main(["data", "split", str(path), "--by", "id"]) == 0
    dataset = load_dataset(load_config(TINY, {"data.path": str(path), "data.split_file": str(out)}))
    assert {name: len(rows) for name, rows in dataset.splits.items()} == {
        "train": 10, "validation": 1, "test": 1,
    }  # fmt: skip
    with TrajectoryStore(path) as store:
        tests = [fold.test.tolist() for fold in make_folds(store, 12, "id")]
    assert sorted(tests) == [[k] for k in range(12)]
