"""Training: it learns, resumes exactly, survives what goes wrong, and means the same on two devices."""

import dataclasses
import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ase.build import bulk
from processes import printed_on_devices
from rich.console import Console
from tiny import TINY

from relaxnet_jax.config import TrainConfig, load_config, to_dict, to_json
from relaxnet_jax.data.dataset import load_dataset, read_trajectories
from relaxnet_jax.data.files import atomic_folder, atomic_path, held, no_space, remove_leftovers
from relaxnet_jax.data.sample_file import SampleView
from relaxnet_jax.errors import InputError
from relaxnet_jax.losses import TERMS, Term
from relaxnet_jax.model import create_model, load_model
from relaxnet_jax.predict import relax
from relaxnet_jax.runtime import usable_cores
from relaxnet_jax.train import data as training_data
from relaxnet_jax.train import loop
from relaxnet_jax.train.checkpoint import LATEST, Checkpoints, has_checkpoint
from relaxnet_jax.train.clock import Clock
from relaxnet_jax.train.epochs import Epochs
from relaxnet_jax.train.loop import train
from relaxnet_jax.train.parallel import Devices
from relaxnet_jax.train.report import ConsoleReport, MetricsLog
from relaxnet_jax.train.run import Run
from relaxnet_jax.train.state import (
    Cooling,
    Plateau,
    cooling_factor,
    initial_train_state,
    make_optimizer,
)
from relaxnet_jax.train.tally import ValidationTally
from relaxnet_jax.trust import surroundings

CHANGES = {
    # Nothing here depends on what the network can do: what compiles fast is enough.
    "model": {"layers": 1, "attention": False, "vector_messages": False, "l_max": 1, "l_angle": 1},
    "data": {"n_emt": 24, "splits": [0.7, 0.15, 0.15], "seed": 2},
    "train": {
        "batch_size": 4, "epochs": 6, "learning_rate": 5e-3, "max_buckets": 2, "max_padding": 0.0,
    },
}  # fmt: skip


def config_of(**train_changes):
    values = {k: dict(v) for k, v in TINY.items()}
    for section, fields in CHANGES.items():
        values.setdefault(section, {}).update(fields)
    return load_config(values, {"train": train_changes})


def quiet():
    """A report, and what it has been told."""
    text = io.StringIO()
    return ConsoleReport(Console(file=text, width=1000)), text


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    """Every number that training computes, by epoch."""
    return [(r["epoch"], r["train"], r["validation"], r["learning_rate"], r["best"], r["skipped"])
            for r in records(workdir)]  # fmt: skip


def final_state(workdir, config):
    """Leaves of the latest checkpoint."""
    checkpoints = Checkpoints(workdir)
    like = initial_train_state(create_model(config, config.train.seed).params, config.train)
    state, progress = checkpoints.restore(like)
    checkpoints.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)], progress["epoch"]


def same_run(a, b, config):
    assert losses(a) == losses(b)
    (state_a, epoch_a), (state_b, epoch_b) = final_state(a, config), final_state(b, config)
    assert epoch_a == epoch_b == config.train.epochs - 1
    for x, y in zip(state_a, state_b, strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(*(jax.tree.leaves(load_model(w / "model")) for w in (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


def same_when_resumed(result, workdir, where):
    """Resumes a run from where it was left; it is then the uninterrupted one."""
    report, text = quiet()
    train(config_of(), workdir, resume=True, report=report, devices=1)
    assert f"resuming {where}" in text.getvalue()
    same_run(result.workdir, workdir, config_of())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for runs; the generated relaxations are cached in it."""
    path = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELAXNET_JAX_CACHE", str(path / "cache"))
        yield path


@pytest.fixture(scope="module")
def run(folder):
    """Six epochs in one go."""
    report, text = quiet()
    result = train(config_of(), folder / "whole", report=report, devices=1)
    return result, text.getvalue()


def test_loss_goes_down(run):
    result, _ = run
    found = records(result.workdir)
    assert [r["epoch"] for r in found] == list(range(6))
    # Of the training split batches of one structure with large forces make the mean.
    assert found[-1]["validation"]["loss"] < 0.98 * found[0]["validation"]["loss"]
    assert found[-1]["train"]["direction"] < 0.5 * found[0]["train"]["direction"]
    assert result.best < found[0]["validation"]["loss"]
    assert result.epochs == 6 and result.reason == "epochs"
    assert result.best == min(r["validation"]["loss"] for r in found)
    assert found[0]["best"] and all(r["skipped"] == 0 and not r["partial"] for r in found)
    for name in ("energy", "monotonicity", "forces", "positions", "direction", "coordinates", "force_error"):
        assert all(
            math.isfinite(r[split][name]) for r in found for split in ("train", "validation")
        )
    assert found[0]["validation"]["nothing"] > 0.01


def test_one_compilation_per_bucket(run):
    """Training and validation steps are compiled once for each bucket they use."""
    result, text = run
    assert "2 bucket(s)" in text
    assert result.compilations["training step"] == 2
    assert 1 <= result.compilations["validation step"] <= 2
    assert text.count("compiled training step") == 2


def test_the_model_that_is_left(run):
    """The best epoch's averaged parameters, the element energies, elements and facts."""
    result, _ = run
    model = load_model(result.model_folder)
    assert model.config == config_of()
    assert len(model.elements) >= 5 and (np.asarray(model.element_energies) != 0).sum() == len(
        model.elements)  # fmt: skip
    facts = json.loads(model.statistics)
    assert facts["training_relaxations"] > 10 and facts["later_starts"] == 0
    best = max(r["epoch"] for r in records(result.workdir) if r["best"])
    states, _ = final_state(result.workdir, config_of())
    if best == 5:
        parameters = jax.tree.leaves(model.params)
        n = len(parameters)
        for ours, ema in zip(parameters, states[n : 2 * n]):
            np.testing.assert_array_equal(ours, ema)
    splits = json.loads((result.workdir / "splits.json").read_text())
    ids = [i for split in splits.values() for i in split]
    assert len(ids) == len(set(ids)) == 24
    mean = next(r["validation"] for r in records(result.workdir) if r["epoch"] == best)
    score = facts["validation"]
    assert score["positions_over_nothing"] == pytest.approx(mean["coordinates"] / mean["nothing"], 1e-3)
    assert score["energy_mae_eV_per_atom"] == pytest.approx(mean["energy"], 1e-3)
    assert score["forces_mae_eV_per_angstrom"] == pytest.approx(mean["force_error"], 1e-3)
    known = facts["surroundings"]
    data, _ = read_trajectories("emt", model.config, lambda _: None)
    trained = [
        surroundings(t.positions[0], t.cells[0], t.pbc, model.config)
        for t in data.named(set(splits["train"]))
    ]
    assert set(known) == {"density", "coordination"}
    for name, ends in known.items():
        values = [one[name] for one in trained]
        assert ends == pytest.approx([min(values), max(values)]) and ends[0] < ends[1]


def test_exact_resume(run, folder):
    """Three epochs and three more are six, bit for bit."""
    result, _ = run
    workdir = folder / "parts"
    report, text = quiet()
    train(config_of(epochs=3), workdir, report=report, devices=1)
    assert [r["epoch"] for r in records(workdir)] == [0, 1, 2]
    # What a kill leaves behind: an epoch begun, a line cut short.
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(records(workdir)[0] | {"epoch": 3}) + '\n{"epoch": 4, "tr')
    train(config_of(), workdir, resume=True, report=report, devices=1)
    assert "resuming after epoch 2" in text.getvalue()
    assert (workdir / "config.json").read_text() == to_json(config_of())  # not its first end
    same_run(result.workdir, workdir, config_of())


def test_resume_after_a_kill(run, folder):
    """SIGKILL in the middle of an epoch; the resumed run is the uninterrupted one."""
    result, _ = run
    workdir, file = folder / "killed", folder / "config.json"
    file.write_text(to_json(config_of()))
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from relaxnet_jax.config import from_json
        from relaxnet_jax.train.loop import train
        from relaxnet_jax.train.run import Run
        original = Run.validate
        def slow(self, params):  # so that the kill comes before the end
            time.sleep(1.0)
            return original(self, params)
        Run.validate = slow
        train(from_json(Path({str(file)!r}).read_text()), {str(workdir)!r}, devices=1)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 560
        log = workdir / "metrics.jsonl"
        while not (log.exists() and len(log.read_text().splitlines()) >= 2):
            assert process.poll() is None, process.stderr.read()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(records(workdir)) < 6
    same_when_resumed(result, workdir, "")


@pytest.fixture(params=[0, 1])
def ahead(request, monkeypatch):
    """Steps that are begun before the last one's metrics are read: none on a CPU, one elsewhere."""
    original = Devices.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        assert self.ahead == 0
        self.ahead = request.param

    monkeypatch.setattr(Devices, "__init__", patched)
    return request.param


def test_resume_within_an_epoch(run, folder, monkeypatch, ahead):
    """An error after a checkpoint in the middle of an epoch: taken up at the next batch.

    The error does not end the process before the checkpoint, written in the background, is whole.
    """
    result, _ = run
    workdir = folder / f"within-{ahead}"
    original = Checkpoints.save

    def save(self, state, progress):
        original(self, state, progress)
        if progress["tally"]["batches"] == 2 and progress["epoch"] == 1:
            raise RuntimeError("killed")

    config = config_of(checkpoint_minutes=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        with pytest.raises(RuntimeError, match="killed"):
            train(config, workdir, report=quiet()[0], devices=1)
    assert [r["epoch"] for r in records(workdir)] == [0, 1]
    same_when_resumed(result, workdir, "within epoch 2, after 2 batches")


def test_sigterm_writes_a_checkpoint(run, folder, ahead):
    """Told to stop within an epoch: it ends after the steps it has begun, and goes on there."""
    result, _ = run
    workdir = folder / f"told-{ahead}"
    report, text = quiet()
    before = signal.getsignal(signal.SIGTERM)

    class Telling(ConsoleReport):
        def batch(self, done, loss, rate):
            if done == 1 and len(records(workdir)) == 1:  # the second epoch's first step
                os.kill(os.getpid(), signal.SIGTERM)

    stopped = train(config_of(), workdir, report=Telling(report.console), devices=1)
    assert stopped.stopped and stopped.epochs == 2 and not result.stopped
    assert "stopped by SIGTERM within epoch 1" in text.getvalue()
    assert len(records(workdir)) == 1 and signal.getsignal(signal.SIGTERM) is before
    same_when_resumed(result, workdir, f"within epoch 1, after {2 + ahead} batches")


def test_sigterm_within_the_last_batch_of_an_epoch(run, folder):
    """Nothing is left of the epoch: it is validated and recorded as in the uninterrupted run."""
    result, _ = run
    workdir = folder / "last batch"
    report, text = quiet()

    class Telling(ConsoleReport):
        def start_epoch(self, epoch, batches):
            self.last = batches - 1 if epoch == 1 else None

        def batch(self, done, loss, rate):
            if done == self.last:
                os.kill(os.getpid(), signal.SIGTERM)

    stopped = train(config_of(), workdir, report=Telling(report.console), devices=1)
    assert stopped.stopped and "stopped by SIGTERM after epoch 1" in text.getvalue()
    assert [r["partial"] for r in records(workdir)] == [False, False]
    same_when_resumed(result, workdir, "after epoch 1")


def test_ctrl_c_writes_a_checkpoint(run, folder):
    """As SIGTERM does, but the exception is not swallowed: no script goes on as if the run had ended."""
    result, _ = run
    workdir = folder / "interrupted"
    report, text = quiet()

    class Interrupting(ConsoleReport):
        def batch(self, done, loss, rate):
            if done == 2 and not records(workdir):
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config_of(), workdir, report=Interrupting(report.console), devices=1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopping with a checkpoint; Ctrl-C again to stop at once" in text.getvalue()
    assert "stopped by Ctrl-C within epoch 0" in text.getvalue()
    same_when_resumed(result, workdir, "within epoch 0, after 3 batches")


def test_a_second_ctrl_c_is_at_once():
    """And a SIGINT that the process ignores or handles itself is left alone."""
    devices = SimpleNamespace(hosts=SimpleNamespace(count=1))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    said = []

    def to_nobody(text):  # as rich does where nobody reads any more
        said.append(text)
        raise SystemExit(1)

    try:
        with Clock(devices, 0.0, to_nobody) as clock:
            signal.raise_signal(signal.SIGINT)
            assert not clock.stop and clock.interrupted and len(said) == 1  # despite the error
            clock.tick()
            assert clock.stop
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Clock(devices, 0.0) as clock:
            signal.raise_signal(signal.SIGINT)
            assert not clock.told
    finally:
        signal.signal(signal.SIGINT, before)


HOLDING = """
import sys
from relaxnet_jax.data.files import held
with held(sys.argv[1], "train", "--workdir"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time(folder):
    """A second job on a workdir is told so, and leaves it as it is; the first one's death frees it."""
    workdir = folder / "twice"
    command = [sys.executable, "-c", HOLDING, str(workdir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(InputError, match=r"twice: another process is using it \(train\)"):
                train(config_of(), workdir, resume=resume, report=quiet()[0])
        assert [file.name for file in workdir.iterdir()] == [".lock"]
        other.kill()
    with pytest.raises(InputError, match="holds no run to resume"):
        train(config_of(), workdir, resume=True, report=quiet()[0])
    assert not workdir.exists()


def test_a_held_folder_leaves_nothing_empty(tmp_path):
    """Neither the folders made for it nor a lock; what was there before stays."""
    with held(tmp_path / "runs" / "explicit", "train", "--workdir"):
        assert (tmp_path / "runs" / "explicit" / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "mine" / "run", tmp_path / "mine"):
        with held(folder, "train", "--workdir"):
            pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_leftovers_of_another_name_stay(tmp_path):
    """Another process may be writing them."""
    for name in (".set.12-0af3.tmp.h5", ".set.v2.12-0af3.tmp.h5", ".set.tmp.h5"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "set.h5")
    assert {path.name for path in tmp_path.iterdir()} == {".set.v2.12-0af3.tmp.h5", ".set.tmp.h5"}
    with pytest.raises(RuntimeError, match="killed"), atomic_path(tmp_path / "set.h5") as temporary:
        shutil.copy(temporary, kept := tmp_path / temporary.name.replace("-", "-0"))
        raise RuntimeError("killed")
    assert kept.exists()
    remove_leftovers(tmp_path / "set.h5")
    assert not kept.exists()


def test_sigterm_while_validating(folder, monkeypatch):
    """No step of the next epoch is waited for; there is a checkpoint, though none was due."""
    original, called = Run.validate, []

    def told(self, params):
        called.append(params)
        if len(called) in (2, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, params)

    config = config_of(epochs=4, max_buckets=1, checkpoint_every=9, learning_rate=1e-30)
    report, text = quiet()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "validate", told)
        stopped = train(config, folder / "validating", report=report, devices=1)
        shutil.copytree(stopped.workdir, folder / "last")
        last = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=3))
        ended = train(last, folder / "last", resume=True, report=report, devices=1)
    assert stopped.stopped and stopped.told and stopped.epochs == 2
    # Nothing is left to stop after the last epoch, but whoever trains other runs must know.
    assert ended.told and not ended.stopped and ended.reason == "epochs"
    assert "stopped by SIGTERM after epoch 1" in text.getvalue()
    assert [r["best"] for r in records(stopped.workdir)] == [True, False]
    assert final_state(stopped.workdir, config)[1] == 1


def test_bad_structures_are_skipped_and_named(folder, monkeypatch):
    """A batch whose loss is not finite changes nothing, is counted, and its ids are told; one of
    validation is no part of its loss."""
    bad = []

    class Poisoned(SampleView):
        def __getitem__(self, k):
            sample = super().__getitem__(k)
            if k in (0, len(self) - 1):  # of training, and of validation
                sample.forces[:] = np.nan
                bad.append(sample.id)
            return sample

    monkeypatch.setattr(training_data, "SampleView", Poisoned)
    report, text = quiet()
    config = config_of(epochs=2, max_buckets=1)
    result = train(config, folder / "poisoned", report=report, devices=1)
    found = records(result.workdir)
    assert [r["skipped"] for r in found] == [1, 1]
    assert all(math.isfinite(r["train"]["loss"]) for r in found)
    skips = [line for line in text.getvalue().splitlines() if "step skipped" in line]
    assert len(skips) == 2 and all(bad[0] in line and "?" not in line for line in skips)
    assert 1 <= len(skips[0].split("structures: ")[1].split(", ")) <= 4
    assert [r["validation_skipped"] for r in found] == [1, 1]
    (told,) = (line for line in text.getvalue().splitlines() if "left out of the validation" in line)
    assert bad[1] in told
    leaves = jax.tree.leaves(load_model(result.model_folder).params)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    state, _ = final_state(result.workdir, config)
    assert int(state[-1]) == 2  # TrainState.skipped


def test_time_limit(folder):
    """The run ends cleanly within its first epoch and leaves a model that predicts."""
    report, _ = quiet()
    config = config_of(max_minutes=1e-4, epochs=1000, max_buckets=1)
    result = train(config, folder / "short", report=report, devices=1)
    assert result.reason.startswith("train.max_minutes") and result.epochs == 1
    (record,) = records(result.workdir)
    assert record["partial"]
    model = load_model(result.model_folder)
    path = relax(model, bulk("Cu") if 29 in model.elements else bulk("Al"), n_frames=3)
    assert np.isfinite(path.positions).all()
    # Gone on with, the run takes the epoch up where it was, and knows how good its model is.
    assert has_checkpoint(result.workdir) and math.isfinite(result.best)
    checkpoints = Checkpoints(result.workdir)
    _, progress = checkpoints.restore(initial_train_state(model.params, config.train))
    checkpoints.close()
    assert progress["plateau"]["best"] == result.best == record["validation"]["loss"]
    assert (progress["epoch"], progress["tally"]["batches"]) == (-1, 1)


def test_early_stop(folder):
    """With a learning rate of nothing the second epoch is no better: two more, then the end."""
    report, text = quiet()
    config = config_of(
        learning_rate=1e-30, early_stop_patience=2, epochs=50, max_buckets=1, checkpoint_every=9)  # fmt: skip
    result = train(config, folder / "early", report=report, devices=1)
    assert result.epochs == 3 and "no better validation loss for 2 epochs" in result.reason
    assert [r["best"] for r in records(result.workdir)] == [True, False, False]
    assert "best validation loss" in text.getvalue()
    # The last epoch has a checkpoint, though none was due. With the same patience nothing is left to do.
    assert final_state(result.workdir, config)[1] == 2
    again = train(config, result.workdir, resume=True, report=report, devices=1)
    assert again.epochs == 3 and again.reason == result.reason and len(records(result.workdir)) == 3


def test_workdirs_are_guarded(run, folder):
    result, _ = run
    report, _ = quiet()
    with pytest.raises(InputError, match="already holds a run"):
        train(config_of(), result.workdir, report=report)
    with pytest.raises(InputError, match="no run to resume"):
        train(config_of(), folder / "nothing", resume=True, report=report)
    with pytest.raises(InputError, match=r"train\.batch_size is 4 there, 5 here"):
        train(config_of(batch_size=5), result.workdir, resume=True, report=report)
    assert not (folder / "nothing").exists()
    with pytest.raises(InputError, match="model: is a model folder; give another --workdir"):
        train(config_of(), result.model_folder, report=report)
    other = folder / "of something else"
    other.mkdir()
    (other / "config.json").write_text('{"port": 80}')
    with pytest.raises(InputError, match=r"config\.json: is not of a run, or of another version's, and would"):
        train(config_of(), other, report=report)
    (other / "config.json").rename(other / "settings.json")
    for name in ("model", LATEST / "12", "splits.json", "metrics.jsonl"):
        (other / name).mkdir(parents=True)
        with pytest.raises(InputError, match=r"else/.*: exists, without the config\.json of a run"):
            train(config_of(), other, report=report)
        (other / name).rmdir()
    assert (other / "settings.json").read_text() == '{"port": 80}'


def test_resume_refuses_other_splits(run, folder):
    """With other data, or other splits of them, it would train on what it is tested on."""
    result, _ = run
    workdir = folder / "moved"
    shutil.copytree(result.workdir, workdir)
    file = workdir / "splits.json"
    splits = json.loads(file.read_text())
    splits["test"].append(splits["train"].pop())
    file.write_text(json.dumps(splits))
    report, _ = quiet()
    with pytest.raises(InputError, match=r"was in test by .*splits\.json, is in train"):
        train(config_of(epochs=7), workdir, resume=True, report=report, devices=1)
    splits["train"].append(splits["test"].pop())
    splits["test"].append("gone")
    file.write_text(json.dumps(splits))
    with pytest.raises(InputError, match=r"gone was in test by .*, is in none"):
        train(config_of(epochs=7), workdir, resume=True, report=report, devices=1)
    file.unlink()
    with pytest.raises(InputError, match=r"splits\.json: missing"):
        train(config_of(epochs=7), workdir, resume=True, report=report, devices=1)


def test_checkpoints_that_a_kill_left_unfinished(folder):
    """They are no run to resume, and are removed when one begins."""
    unfinished = folder / "unfinished" / LATEST / "12.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    (unfinished / "state").mkdir()
    assert not has_checkpoint(folder / "unfinished")
    whole = unfinished.with_name("3")
    whole.mkdir()
    assert has_checkpoint(folder / "unfinished")
    Checkpoints(folder / "unfinished").close()
    assert whole.exists() and not unfinished.exists()


def test_killed_before_the_first_model(folder, monkeypatch):
    """There is a checkpoint then: the run can be gone on with, though nothing is left to do."""
    workdir, config = folder / "modelless", config_of(epochs=1, max_buckets=1, checkpoint_every=9)

    def killed(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "export", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(config, workdir, report=quiet()[0], devices=1)
    assert has_checkpoint(workdir) and not (workdir / "model").exists()
    result = train(config, workdir, resume=True, report=quiet()[0], devices=1)
    states, _ = final_state(workdir, config)
    model = load_model(result.model_folder)
    parameters = jax.tree.leaves(model.params)
    n = len(parameters)
    for ours, average in zip(parameters, states[n : 2 * n]):
        np.testing.assert_array_equal(ours, average)
    mean = records(workdir)[-1]["validation"]
    score = json.loads(model.statistics)["validation"]
    assert score["positions_over_nothing"] == pytest.approx(mean["coordinates"] / mean["nothing"], 1e-3)


def test_a_kill_while_the_model_is_replaced(run, folder):
    """Between two renames there is no model: the older one comes back when the run is gone on with."""
    result, _ = run
    workdir = folder / "between"
    shutil.copytree(result.workdir, workdir)
    (workdir / "model").rename(workdir / ".model.old-1-ab.tmp")
    shutil.copytree(workdir / ".model.old-1-ab.tmp", workdir / ".model.new-1-ab.tmp")
    train(config_of(), workdir, resume=True, report=quiet()[0], devices=1)
    assert not list(workdir.glob(".model*"))
    same_run(result.workdir, workdir, config_of())


def test_a_folder_that_cannot_be_replaced(tmp_path, monkeypatch):
    """The one that was there stays."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    original = Path.replace

    def replace(self, target):
        if ".new-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(OSError, match="Input/output"), atomic_folder(tmp_path / "model") as new:
            (new / "new").touch()
    assert [file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()] == [
        Path("model", "old")]  # fmt: skip


def test_a_full_disk_is_told(folder, monkeypatch):
    """With the way out, whoever says so: the system, or tensorstore in the background."""
    assert no_space(ValueError("RESOURCE_EXHAUSTED: Error writing local file"))
    assert no_space(ValueError("OUT_OF_RANGE: Error writing: File too large [os_error_code='27']"))
    assert not no_space(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert not no_space(OSError(errno.EACCES, "denied")) and not no_space(ValueError("other"))

    def execute(*_):
        raise RuntimeError("of a thread") from None

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    config = config_of(epochs=1, max_buckets=1)
    with monkeypatch.context() as patch:
        patch.setattr(Epochs, "execute", full)
        with pytest.raises(InputError, match=r"full: no space left; free some and start again"):
            train(config, folder / "full", report=quiet()[0], devices=1)
        patch.setattr(Epochs, "execute", execute)
        with pytest.raises(RuntimeError, match="of a thread"):
            train(config, folder / "full", report=quiet()[0], devices=1)


def test_batches_that_do_not_fit_are_told(folder, monkeypatch):
    """Of a device without memory left, with the way out; no other error of JAX's is taken for that."""
    config, text = config_of(), "RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"
    for error, message in (
        (jax.errors.JaxRuntimeError(text), r"big: .*train\.batch_size=4 .* start again with --set train\.batch_size=2"),
        (MemoryError(), r"start again with --set train\.batch_size=2"),
        (jax.errors.JaxRuntimeError("INTERNAL: other"), None),
    ):  # fmt: skip
        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(Epochs, "execute", fail)
        kind = InputError if message else type(error)
        with pytest.raises(kind, match=message):
            train(config, folder / "big", report=quiet()[0], devices=1)
    monkeypatch.setattr(loop, "has_checkpoint", lambda _: True)
    told = loop._does_not_fit(config, Path("run"))
    assert "start again in another --workdir with --set train.batch_size=2" in told  # there is no model yet
    (folder / "big" / "model").mkdir()
    told = loop._does_not_fit(config, folder / "big")
    assert f"with --set train.start_from={folder / 'big'} train.batch_size=2" in told
    assert "use a device with more memory" in loop._does_not_fit(config_of(batch_size=1), folder)


def test_an_ode_that_is_never_trained_is_told(folder, monkeypatch):
    monkeypatch.setattr(Epochs, "execute", lambda *_: None)
    changes = {"dynamics.latent": "implicit", "train.max_buckets": 1, "train.epochs": 2}
    for static, told in ((1, False), (2, True)):
        config = load_config(to_dict(config_of()), changes | {"train.static_epochs": static})
        report, text = quiet()
        train(config, folder / f"static-{static}", report=report, devices=1)
        assert ("the ODE is never trained" in text.getvalue()) == told


def test_records_survive_a_full_disk(tmp_path, monkeypatch):
    lines = "".join(json.dumps({"epoch": k, "partial": False}) + "\n" for k in range(3))
    (tmp_path / "metrics.jsonl").write_text(lines)

    def full(path, _):
        path.open("w").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            MetricsLog(tmp_path, 1, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    MetricsLog(tmp_path, 1, tensorboard=False)
    assert [r["epoch"] for r in records(tmp_path)] == [0, 1]


@pytest.mark.parametrize("devices", [None, 2])
def test_cores_of_a_cpu_train_together(folder, devices):
    """By default they share a batch; --devices gives each its own. One core goes on with the run."""
    if usable_cores() < 2:
        pytest.skip("one core only")
    workdir = folder / f"cores-{devices}"
    file = folder / f"cores-{devices}.json"
    config = config_of(batch_size=8, epochs=1, max_buckets=1)
    file.write_text(to_json(config))
    more = [] if devices is None else ["--devices", str(devices)]
    script = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from relaxnet_jax import cli, commands
        from relaxnet_jax.config import from_json
        commands._run_of = lambda args: (from_json(Path({str(file)!r}).read_text()), Path({str(workdir)!r}))
        sys.exit(cli.main(["train", "--config", "x.py", *{more!r}]))
        """
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared = min(usable_cores(), 2)
    assert "2 device(s): cpu" in done.stderr
    assert (f"{shared} cores share each batch" in done.stderr) == (devices is None)
    (bucket,) = (line for line in done.stderr.splitlines() if "  bucket: " in line)
    held = int(bucket.split("bucket: ")[1].split()[0])
    assert held <= 6 if devices is None else held > 6  # half as many more than on average, at most
    (record,) = records(workdir)
    assert math.isfinite(record["train"]["loss"]) and record["skipped"] == 0
    report, text = quiet()
    longer = config_of(batch_size=8, epochs=2, max_buckets=1)
    result = train(longer, workdir, resume=True, report=report, devices=1)
    assert result.epochs == 2 and "resuming after epoch 0" in text.getvalue()


def test_cooling_ends_with_the_time_or_the_epochs():
    """Whichever is nearer; without a time limit there is none."""

    def factor(seconds, epochs, **changes):
        cooled = TrainConfig(**{"max_minutes": 10.0, "cooldown": 0.5, "epochs": 100} | changes)
        return cooling_factor(cooled, seconds, 60 * cooled.max_minutes or math.inf, epochs)

    assert factor(0, 0) == factor(299, 49) == 1.0
    assert factor(450, 0) == pytest.approx(0.5) and factor(600, 1) == factor(700, 1) == 0.0
    assert factor(0, 75) == pytest.approx(0.5) and factor(0, 100) == 0.0
    assert factor(0, 75, max_minutes=0.0) == factor(0, 75, cooldown=0.0) == 1.0


def test_a_run_taken_up_after_its_end_has_not_cooled():
    """Its last model is no better than where it was: only one whose rate fell has settled."""
    ended, whole = Cooling(), Cooling()
    assert not ended.annealed
    assert [ended.take(0.0) for _ in range(2)] == [0.0, 0.0] and not ended.annealed
    assert whole.take(1.0) == 1.0 and not whole.annealed
    assert whole.take(0.1) == whole.last == 0.1 and whole.annealed


def test_the_console_tells_force_errors_of_their_own():
    """Whatever the loss makes of them: a pseudo-Huber value is smaller."""
    report, text = quiet()
    validation = {"loss": 2.0, "energy": 0.01, "forces": 0.004, "force_error": 0.0523}
    record = {"epoch": 3, "train": {"loss": 1.0}, "validation": validation, "best": True,
              "structures_per_second": 5.0}  # fmt: skip
    report.epoch(record, "1 min left", "atom")
    assert "1.0000, validation 2.0000  E 10.0 meV/atom  F 52 meV/Å" in text.getvalue()
    assert text.getvalue().rstrip().endswith("*")


def test_tensorboard_has_the_learning_rate(tmp_path, monkeypatch):
    told = []
    writer = SimpleNamespace(add_scalar=lambda *a: told.append(a), flush=lambda: None)
    module = SimpleNamespace(SummaryWriter=lambda _, purge_step: told.append(purge_step) or writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    log = MetricsLog(tmp_path, -1, tensorboard=True)
    record = {"epoch": 2, "train": {"loss": 1.0}, "validation": {"loss": math.nan}}
    log.write(record | {"learning_rate": 1e-4, "partial": False})
    assert told == [0, ("learning_rate", 1e-4, 2), ("train/loss", 1.0, 2)]
    assert records(tmp_path)[0]["validation"] == {"loss": None}


def test_mixed_energies_are_told(folder, monkeypatch):
    """Half of the relaxations 40 eV/atom off, as another code's would be."""
    fit = training_data.fit_element_energies

    def mixed(relaxations, n):
        rows = [(z, e + 40.0 * len(z) * (k % 2)) for k, (z, e) in enumerate(relaxations)]
        return fit(rows, n)

    monkeypatch.setattr(training_data, "fit_element_energies", mixed)
    config = config_of(max_buckets=1)
    # Also where the scale is that of a start, whose own data were of one.
    for start in (None, SimpleNamespace(energy_scale=0.1)):
        told = []
        data = training_data.prepare(config, load_dataset(config), told.append, start)
        assert sum("from several codes, functionals or settings?" in line for line in told) == 1
        assert (data.scale == 0.1) == (start is not None)


def test_adaptive_solver_runs_on_one_device(folder):
    config = config_of()
    config = dataclasses.replace(
        config, dynamics=dataclasses.replace(config.dynamics, solver="tsit5")
    )
    report, _ = quiet()
    with pytest.raises(InputError, match=r"'tsit5' runs on one device, not on 2; give --devices 1"):
        train(config, folder / "adaptive", report=report, devices=2)
    assert not (folder / "adaptive").exists()


def test_weight_decay_is_on_kernels_only():
    """Not on biases and norms, which are matrices too where layers are stacked, nor embeddings."""
    params = create_model(config_of()).params
    optimizer = make_optimizer(TrainConfig(weight_decay=0.5))
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    kernels = 0
    for (path, update), value in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        kernel = path[-1].key.endswith("kernel")
        kernels += kernel
        np.testing.assert_allclose(update, 0.5 * value if kernel else 0 * value, rtol=1e-6)
    assert kernels > 10


def test_plateau():
    """Reduced after `patience` epochs without progress, again after as many; NaN is none."""
    config = TrainConfig(plateau_factor=0.5, plateau_patience=2, early_stop_patience=7)
    plateau, scales, best = Plateau(), [], []
    for epoch, loss in enumerate([3.0, 2.0, 2.0, math.nan, 2.5, 2.1, 2.2, 2.3, 1.0]):
        best.append(plateau.update(loss, epoch, config))
        scales.append(plateau.scale)
        assert plateau.exhausted(epoch, config) == (epoch - plateau.best_epoch >= 7)
    assert best == [True, True, False, False, False, False, False, False, True]
    assert scales == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    never = Plateau()
    assert not any(never.update(math.nan, epoch, config) for epoch in range(3))
    assert not never.exhausted(6, config) and never.exhausted(7, config)
    later = dataclasses.replace(config, static_epochs=3)
    assert not never.exhausted(9, later) and never.exhausted(10, later)
    # A loss over fewer batches says less: it is no better than one over more of them.
    partly = Plateau()
    found = [partly.update(loss, k, config, skipped) for k, (loss, skipped) in enumerate(
        [(3.0, 1), (2.0, 2), (4.0, 0), (1.0, 1), (3.5, 0)])]  # fmt: skip
    assert found == [True, False, True, False, True] and partly.best == 3.5


def test_validation_without_what_is_not_finite():
    config = config_of().loss
    tally, whole = ValidationTally(), ValidationTally()
    good = [{name: Term(np.float32(k), np.float32(2)) for name in TERMS} for k in (3, 5)]
    assert all(tally.add(terms) and whole.add(terms) for terms in good)
    assert not tally.add(good[0] | {"forces": Term(np.float32(np.nan), np.float32(2))})
    assert tally.means(config) == whole.means(config) and (tally.batches, tally.skipped) == (3, 1)
    assert tally.means(config)["forces"] == 2.0
    nothing = ValidationTally()
    assert not nothing.add(good[0] | {"energy": Term(np.float32(np.inf), np.float32(2))})
    means = nothing.means(config)
    assert set(means) == {"loss", *TERMS} and all(map(math.isnan, means.values()))


TWO_DEVICES = """
import sys
sys.path.insert(0, {tests!r})
import jax, numpy as np
from pathlib import Path
from relaxnet_jax.batching import fitting_shape
from relaxnet_jax.config import from_json
from relaxnet_jax.data.pipeline import collate_samples
from relaxnet_jax.data.sample import make_sample
from relaxnet_jax.data.generate import emt_relaxations
from relaxnet_jax.model import create_model
from relaxnet_jax.train.parallel import Devices
from relaxnet_jax.train.state import initial_train_state
from relaxnet_jax.train.step import make_eval_step, make_train_step

assert jax.local_device_count() == 2
config = from_json(Path({config!r}).read_text())
samples = [make_sample(t, config) for t in emt_relaxations(5, 1)]
key = jax.random.key_data(jax.random.key(0))
shape = fitting_shape([s.structure for s in samples])
ways = []
for n in (1, 2):
    devices = Devices(n)
    stored = n == 2  # as `train` does it
    evaluate = devices.compile(make_eval_step(config, 1.0, devices.axis, stored=stored), "eval",
                               (True, True))
    step = devices.compile(make_train_step(config, 1.0, devices.axis, stored=stored), "train",
                           (True, True, False, False))
    ways.append((devices, evaluate, step))
# Three structures on one device, two on the other; and none at all on the other.
for parts in ([samples[:3], samples[3:]], [samples, []]):
    found = []
    for devices, evaluate, step in ways:
        groups = [samples] if devices.n == 1 else parts
        batches = devices.stack([collate_samples(g, shape, config) for g in groups])
        state = devices.replicate(initial_train_state(create_model(config).params, config.train))
        terms = devices.first(evaluate(state.params, batches))
        for _ in range(2):
            state, metrics = step(state, batches, np.float32(1e-3), key)
        if devices.n == 2:  # the copies stay equal, one on each device
            for leaf in jax.tree.leaves(state):
                assert len(leaf.sharding.device_set) == 2
                np.testing.assert_array_equal(leaf[0], leaf[1])
        found.append(jax.device_get((devices.first(metrics), devices.first(state), terms)))
    (m1, s1, t1), (m2, s2, t2) = found
    assert m1["finite"] and m2["finite"] and m1["gradient_norm"] > 1e-3
    for name in m1:
        np.testing.assert_allclose(m2[name], m1[name], rtol=2e-5, err_msg=name)
    for name in t1:
        np.testing.assert_allclose(t2[name], t1[name], rtol=2e-5, err_msg=name)
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.optimizer)]) for s in (s1, s2)]
    error = np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[0])
    assert error < 1e-5, error
    # Adam divides by the gradient's own size, so tiny gradients carry their rounding along.
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.params)]) for s in (s1, s2))
    start = np.concatenate([np.ravel(x) for x in jax.tree.leaves(create_model(config).params)])
    assert np.linalg.norm(a - start) > 1e-3
    assert np.linalg.norm(b - a) < 1e-2 * np.linalg.norm(a - start)
print("same")
"""


def test_two_devices_are_one_large_batch(tmp_path):
    """Loss, gradient and step over two devices equal those of one with all structures."""
    file = tmp_path / "config.json"
    config = config_of()
    file.write_text(to_json(config))
    script = TWO_DEVICES.format(config=str(file), tests=os.path.dirname(__file__))
    assert printed_on_devices(2, script) == "same"
