"""Training that begins with another model's parameters."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from test_training import config_of, quiet
from tiny import TINY, molecule, tiny_config, tiny_model

from relaxnet_jax.config import load_config, to_dict
from relaxnet_jax.data.generate import default_dataset
from relaxnet_jax.errors import InputError
from relaxnet_jax.evaluate.run import evaluate_workdir, write_evaluation
from relaxnet_jax.model import create_model, load_model, save_model
from relaxnet_jax.predict import relax
from relaxnet_jax.train.beginning import FILE
from relaxnet_jax.train.loop import train
from relaxnet_jax.train.start import SEEN, energy_scale, read_start, seen_by_start, start_parameters


def saved(config, tmp_path, seed=5, scale=0.37):
    model = create_model(config, seed).replace(
        energy_scale=np.asarray(scale, np.float32), elements=(1, 29)
    )
    return model, str(save_model(model, tmp_path / "start" / "model"))


def test_a_run_starts_where_the_model_is(tmp_path):
    """With a learning rate of nearly nothing it ends there too: with the start's energy unit, but the
    composition energies and elements of its own data."""
    start, _ = saved(config_of(), tmp_path)
    config = config_of(epochs=1, learning_rate=1e-12, start_from=str(tmp_path / "start"))
    report, _ = quiet()
    result = train(config, tmp_path / "run", report=report)
    model = load_model(result.model_folder)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), model.params, start.params
    )
    assert float(model.energy_scale) == np.float32(0.37)
    assert 1 not in model.elements and len(model.elements) > 3
    assert np.asarray(model.element_energies)[list(model.elements)].all()
    assert json.loads(model.statistics)["started_from"] == json.loads(
        (tmp_path / "start" / "model" / "model.json").read_text())["sha256"]  # fmt: skip


def test_no_start():
    config = tiny_config()
    assert read_start(config) is None and energy_scale(None, 0.5) == 0.5
    fresh = create_model(config, config.train.seed).params
    drawn = start_parameters(config, None, print)
    jax.tree.map(np.testing.assert_array_equal, fresh, drawn)


def test_functions_the_start_lacks_are_drawn(tmp_path):
    """A potential becomes the encoder and head of a model whose cells relax."""
    static = tiny_config("static")
    start, folder = saved(static, tmp_path)
    config = load_config(
        TINY,
        {"dynamics.latent": "explicit", "dynamics.cell": "variable", "train.start_from": folder},
    )
    told = []
    params = start_parameters(config, read_start(config), told.append)
    fresh = create_model(config, config.train.seed).params
    for name in ("encoder", "head", "attention"):
        jax.tree.map(np.testing.assert_array_equal, params[name], start.params[name])
    for name in ("strain_gate", "velocity_gate", "rate"):
        assert name in told[0]
        jax.tree.map(np.testing.assert_array_equal, params[name], fresh[name])
    assert jax.tree.structure(params) == jax.tree.structure(fresh) and len(told) == 1


@pytest.mark.parametrize("cells", [("variable", "fixed"), ("fixed", "variable")])
def test_between_relaxing_and_fixed_cells(tmp_path, cells):
    """What keeps its cell moves as the start has it move: the strain rate's inputs are zero there."""
    theirs, ours = (tiny_config("explicit", dynamics__cell=cell, model__layers=1) for cell in cells)
    start = tiny_model(theirs, dtype=np.float32)
    folder = str(save_model(start, tmp_path / "start" / "model"))
    config = dataclasses.replace(ours, train=dataclasses.replace(ours.train, start_from=folder))
    told = []
    params = start_parameters(config, read_start(config), told.append)
    fresh = create_model(config, config.train.seed).params
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh)
    if cells[0] == "variable":
        (message,) = told
        assert message.endswith("left out the inputs that rate has there but not here")
    else:
        assert "strain_gate, some inputs of rate: initialised at random" in told[0]
        kernel = params["rate"]["Dense_0"]["kernel"]
        np.testing.assert_array_equal(kernel[-2:], fresh["rate"]["Dense_0"]["kernel"][-2:])
    (one,) = relax(start, [molecule()])
    (other,) = relax(start.replace(params=params, config=config), [molecule()])
    assert np.abs(one.positions[-1] - one.positions[0]).max() > 0.01
    np.testing.assert_allclose(other.positions, one.positions, atol=1e-6)
    np.testing.assert_allclose(other.energies, one.energies, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"model.features": 16}, "model.features"), ({"graph.cutoff": 4.5}, "graph.cutoff")],
)
def test_other_layers_are_refused(tmp_path, change, named):
    _, folder = saved(tiny_config(), tmp_path)
    config = load_config(TINY, {"train.start_from": folder} | change)
    with pytest.raises(InputError, match=f"train.start_from: .*{named} is .* there"):
        read_start(config)


def test_no_such_model(tmp_path):
    config = load_config(TINY, {"train.start_from": str(tmp_path / "nothing")})
    with pytest.raises(InputError, match=r"train\.start_from: .*no such folder"):
        read_start(config)


def facts_of(start, ids, **splits):
    """What a run from this start says, and is told, with these splits; the start was trained on ids."""
    (start.parent / "splits.json").write_text(
        json.dumps({"train": ids, "validation": ["v"], "test": ["t"]})
    )
    told = []
    config = load_config(TINY, {"train.start_from": str(start.parent)})
    splits = {"train": ["x"], "validation": [], "test": []} | splits
    return seen_by_start(config, splits, told.append), told


def test_a_start_trained_on_what_is_tested_is_told(tmp_path):
    folder = Path(saved(tiny_config(), tmp_path)[1])
    facts, told = facts_of(
        folder, ["a", "b", "c"], train=["a"], validation=["b", "v"], test=["t", "c"]
    )
    assert facts[SEEN] == {"validation": 1, "test": 1} and len(told) == 1
    assert "was trained on 1 of the 2 validation and 1 of the 2 test relaxations" in told[0]
    assert f"data.split_file={folder.parent / 'splits.json'}" in told[0]
    # The start was validated and tested on them, or knows other data only.
    for splits in ({"validation": ["v"], "test": ["t"]}, {"test": ["elsewhere"]}):
        facts, told = facts_of(folder, ["a", "b", "c"], **splits)
        assert not facts and not told


def test_what_the_start_started_from_counts(tmp_path):
    """Unless the folder has another model by now."""
    first = Path(saved(tiny_config(), tmp_path / "first")[1])
    (first.parent / "splits.json").write_text(
        json.dumps({"train": ["a"], "validation": [], "test": []})
    )
    config = load_config(TINY, {"train.start_from": str(first.parent)})
    of_first = json.loads((first / "model.json").read_text())["sha256"]
    model = create_model(config, 1).replace(statistics=json.dumps({"started_from": of_first}))
    second = save_model(model, tmp_path / "second" / "model")
    facts, told = facts_of(second, ["b"], test=["a"])
    assert facts[SEEN] == {"test": 1} and str(first.parent) in told[0]
    save_model(model, first)
    facts, told = facts_of(second, ["b"], test=["a"])
    assert not facts and not told


def test_a_fold_of_its_own_is_told_and_recorded(tmp_path):
    """In the log, in the model, and when the model is evaluated; not with the splits of the start."""
    (tmp_path / "start").mkdir()
    first = train(config_of(epochs=1), tmp_path / "start", report=quiet()[0])
    changes = {"train.start_from": str(first.workdir), "train.epochs": 1}
    other = load_config(to_dict(config_of()), changes | {"data.seed": 5})
    report, text = quiet()
    result = train(other, tmp_path / "other", report=report)
    assert text.getvalue().count("was trained on") == 1
    seen = json.loads(load_model(result.model_folder).statistics)[SEEN]
    notes = []
    found = evaluate_workdir(result.workdir, report=notes.append)
    assert found.seen == seen["test"] > 0
    assert sum("used to train the model it started from" in note for note in notes) == 1
    write_evaluation(found, tmp_path / "eval")
    written = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert written["trained_on"] == found.seen
    # Every relaxation of the set: those the run and its start were trained on are told.
    notes.clear()
    every = evaluate_workdir(result.workdir, data="emt", report=notes.append)
    trained = [
        json.loads((r.workdir / "splits.json").read_text())["train"] for r in (first, result)
    ]
    assert every.seen == len(set(trained[0] + trained[1])) > len(trained[1])
    assert sum(f"{every.seen} of the" in note for note in notes) == 1
    splits = json.loads((result.workdir / "splits.json").read_text())
    changed = splits | {"test": [*splits["test"], "gone"]}
    (result.workdir / "splits.json").write_text(json.dumps(changed))
    notes.clear()
    evaluate_workdir(result.workdir, report=notes.append)
    assert sum(f"1 of the {len(changed['test'])} test relaxations" in note for note in notes) == 1
    (result.workdir / "splits.json").write_text("{}")
    assert evaluate_workdir(result.workdir, data="emt", report=notes.append).seen == 0
    same = load_config(to_dict(other), {"data.split_file": str(first.workdir / "splits.json")})
    report, text = quiet()
    result = train(same, tmp_path / "same", report=report)
    assert "was trained on" not in text.getvalue()
    assert evaluate_workdir(result.workdir, report=notes.append).seen == 0


def test_a_resumed_run_does_not_need_its_start(tmp_path):
    """It keeps the scale and facts it began with: by then the start may have moved, as may the data."""
    _, folder = saved(config_of(), tmp_path)
    changes = {"start_from": folder, "max_buckets": 1}
    report, _ = quiet()
    first = train(config_of(epochs=1, **changes), tmp_path / "run", report=report, devices=1)
    before = load_model(first.model_folder)
    Path(folder).rename(tmp_path / "elsewhere")
    staged = shutil.copy(default_dataset(24), tmp_path / "staged.h5")
    longer = config_of(epochs=2, **changes)
    longer = load_config(to_dict(longer), {"data.path": str(staged)})
    result = train(longer, first.workdir, resume=True, report=report, devices=1)
    after = load_model(result.model_folder)
    assert after.energy_scale == before.energy_scale == np.float32(0.37)
    np.testing.assert_array_equal(after.element_energies, before.element_energies)
    facts = [json.loads(m.statistics)["started_from"] for m in (before, after)]
    assert facts[0] == facts[1]
    # The same relaxations with other energies are other data, which only the checksum tells.
    file = first.workdir / FILE
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"checksum": "0" * 64}))
    with pytest.raises(InputError, match=r"staged\.h5: its content has changed since the run began"):
        train(longer, first.workdir, resume=True, report=report, devices=1)
    file.write_text("{")
    with pytest.raises(InputError, match=r"beginning\.json: damaged"):
        train(longer, first.workdir, resume=True, report=report, devices=1)
