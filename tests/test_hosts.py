"""Several processes: they find each other, compute what one would, and end together."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from relaxnet_jax import cli
from relaxnet_jax.config import load_config
from relaxnet_jax.data.buckets import Sizes, pack_epoch, plan_buckets
from relaxnet_jax.data.dataset import load_dataset
from relaxnet_jax.data.sample_file import SampleView, prepare_samples
from relaxnet_jax.errors import InputError
from relaxnet_jax.train.hosts import Place, find_place
from relaxnet_jax.train.plan import remaining_runs
from relaxnet_jax.train.tally import Tally

ROOT = Path(__file__).parents[1]
SMALL = [
    "data.n_emt=24", "data.splits=(0.75,0.2,0.05)", "train.epochs=2", "train.batch_size=3",
    "train.max_buckets=1", "train.learning_rate=5e-3", "dynamics.frames=3", "graph.cutoff=4.0",
    "graph.triplet_cutoff=3.0", "model.features=8", "model.vector_features=2", "model.layers=1",
    "model.triplet_features=4", "model.pair_features=4", "model.n_gaussian=4", "model.n_bessel=3",
    "model.l_max=1", "model.l_angle=2", "model.expansion_channels=2", "model.attention=false",
    "model.vector_messages=false",
]  # fmt: skip
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For runs; the generated relaxations are cached in it."""
    path = tmp_path_factory.mktemp("hosts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELAXNET_JAX_CACHE", str(path / "cache"))
        yield path


def start(command, folder, **environment):
    """A Python process, one device unless XLA_FLAGS says otherwise."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "XLA_FLAGS"))}
    clean |= {"JAX_PLATFORMS": "cpu", "EQX_ON_ERROR": "nan"}
    return subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=clean | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(processes, timeout=500):
    """(exit code, stdout, stderr) of each; none is left behind."""
    end = time.monotonic() + timeout
    try:
        outputs = [p.communicate(timeout=max(end - time.monotonic(), 1)) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs)]


def train_command(workdir, *more, settings=()):
    return ["-m", "relaxnet_jax.cli", "train", "--config", "explicit.py", "--workdir", workdir, *more,
            "--set", *SMALL, *settings]  # fmt: skip


def start_pair(workdir, folder, *more, settings=(), n=2):
    """Processes that are told their places by options."""
    at = f"localhost:{free_port()}"
    return [
        start(train_command(workdir, "--coordinator", at, "--processes", str(n), "--process-id", str(i),
                            *more, settings=settings), folder)
        for i in range(n)
    ]  # fmt: skip


def records(workdir):
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# What one computes two compute

STEPS = """
import json, os, signal, sys, time
from pathlib import Path
from relaxnet_jax.runtime import enable_compilation_cache
enable_compilation_cache()
import jax, jax.numpy as jnp, numpy as np
from relaxnet_jax.train.checkpoint import Checkpoints
from relaxnet_jax.train.clock import Clock
from relaxnet_jax.train.hosts import Hosts, Place, joined
from relaxnet_jax.train.parallel import AXIS, Devices
from relaxnet_jax.train.state import TrainState

def step(state, batch, rate):  # least squares; sums over all rows on all devices
    x, y, mask = batch
    error = (x @ state.params["w"] - y) * mask
    loss, gradient = jax.lax.psum((error @ error, x.T @ error), AXIS)
    params = {"w": state.params["w"] - rate * gradient}
    return state._replace(params=params, step=state.step + 1), {"loss": loss}

index = int(sys.argv[1])
with joined(Place("localhost:" + sys.argv[2], 2, index)):
    devices = Devices(2)
    assert (devices.local, devices.n, devices.mine) == (2, 4, slice(2 * index, 2 * index + 2))
    data = np.load("data.npz")
    batches = [[a[k] for a in (data["x"], data["y"], data["mask"])] for k in range(4)]
    run = devices.compile(step, "step", (True, True, False), donate=(0,))
    start = TrainState({"w": data["w"]}, {}, (), np.int32(3), np.int32(0))
    state, losses = devices.replicate(start), []
    for _ in range(3):
        state, metrics = run(state, devices.stack(batches[devices.mine]), np.float32(0.01))
        losses.append(float(devices.first(metrics)["loss"]))
    assert devices.compilations == {"step": 1}
    last = devices.first(state)
    # What process 0 alone has on disk comes to all.
    if index == 0:
        checkpoints = Checkpoints(Path("steps"))
        checkpoints.save(last, {"epoch": 5})
        checkpoints.wait()
        found, progress = checkpoints.restore(start)
        checkpoints.close()
    else:
        found, progress = jax.tree.map(np.zeros_like, start), None
    assert devices.hosts.share(progress) == {"epoch": 5}
    for a, b in zip(jax.tree.leaves(devices.total(found)), jax.tree.leaves(last), strict=True):
        assert a.dtype == b.dtype and (a == b).all()
    # Process 0's clock, anyone's SIGTERM.
    with Clock(devices, 100.0 * (index + 1)) as clock:
        clock.tick()
        assert not clock.stop and 100 <= clock.seconds < 190
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        clock.tick()
        assert clock.stop
    print(json.dumps([losses, last.params["w"].tolist(), int(last.step), clock.seconds]))
"""


def test_steps_over_two_processes(folder):
    """Two processes on two of their three devices; the last has an empty batch. As NumPy has it for all rows."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 5, 3)).astype("f4"), rng.normal(size=(4, 5)).astype("f4")
    mask = np.arange(5) < np.array([5, 5, 2, 0])[:, None]
    w = rng.normal(size=3).astype("f4")
    np.savez(folder / "data.npz", x=x, y=y, mask=mask, w=w)
    port, three = str(free_port()), "--xla_force_host_platform_device_count=3"
    found = finish([start(["-c", STEPS, i, port], folder, XLA_FLAGS=three) for i in "01"])
    assert [code for code, _, _ in found] == [0, 0], found
    a, b = (json.loads(out.splitlines()[-1]) for _, out, _ in found)
    assert a == b
    losses = []
    for _ in range(3):
        error = x[mask] @ w - y[mask]
        losses.append(error @ error)
        w = w - 0.01 * x[mask].T @ error
    np.testing.assert_allclose(a[0], losses, rtol=1e-5)
    np.testing.assert_allclose(a[1], w, rtol=1e-5)
    assert a[2] == 6


@pytest.mark.heavy
def test_two_processes_are_one_with_two_devices(folder):
    """Losses, parameters and splits agree; the last batches are unequal. Places come from SLURM."""
    config = load_config("explicit.py", SMALL)
    dataset = load_dataset(config)
    train, validation = dataset.splits["train"], dataset.splits["validation"]
    rows = np.concatenate([train, validation])
    view = SampleView(prepare_samples(dataset.trajectories, config), rows, np.zeros(119))
    t = config.train
    buckets = plan_buckets(view.sizes, t.batch_size, t.max_buckets, t.max_padding)
    order = np.random.default_rng((t.seed, 0))  # of the first epoch
    for members, rng in (
        (np.arange(len(train)), order),
        (len(train) + np.arange(len(validation)), None),
    ):
        assert [] in [batch for _, batch in pack_epoch(buckets, view.sizes, rng, members, 2)]

    port = str(free_port())
    tasks = {"SLURM_NTASKS": "2", "JAX_COORDINATOR_PORT": port} | SLURM
    pair = [
        start(train_command("two"), folder, SLURM_PROCID=i, SLURM_LOCALID=i, **tasks) for i in "01"
    ]
    two = "--xla_force_host_platform_device_count=2"
    ((code, _, error), (code_1, out_1, error_1)) = finish(pair)
    assert code == code_1 == 0, error + error_1
    ((code_one, _, error_one),) = finish([start(train_command("one"), folder, XLA_FLAGS=two)])
    assert code_one == 0, error_one
    # Process 1 prints nothing; Gloo, on stdout, is none of ours.
    assert "2 device(s) of 2 processes" in error and "2 device(s): cpu" in error_one
    assert not [line for line in (out_1 + error_1).splitlines() if "[Gloo]" not in line]

    one, both = folder / "one", folder / "two"
    assert (one / "splits.json").read_text() == (both / "splits.json").read_text()
    assert len(records(both)) == 2
    for a, b in zip(records(one), records(both), strict=True):
        assert a["train"]["loss"] > 0 and a["skipped"] == b["skipped"] == 0
        for split in ("train", "validation"):
            for name, value in a[split].items():
                np.testing.assert_allclose(
                    b[split][name], value, rtol=1e-4, atol=1e-7, err_msg=name
                )
    parameters = [np.load(w / "model" / "parameters.npz") for w in (one, both)]
    for name in parameters[0].files:
        np.testing.assert_allclose(*(p[name] for p in parameters), rtol=1e-4, atol=1e-6)


@pytest.mark.heavy
def test_a_killed_process_ends_the_run_which_can_be_resumed(folder):
    """SIGKILL for either process; then on with one, and with three."""
    for victim in (1, 0):
        workdir = folder / f"killed-{victim}"
        pair = start_pair(workdir.name, folder, settings=["train.epochs=500"])
        try:
            end = time.monotonic() + 400
            while len(records(workdir)) < 2 and pair[0].poll() is None and time.monotonic() < end:
                time.sleep(0.1)
            assert len(records(workdir)) >= 2
            pair[victim].send_signal(signal.SIGKILL)
            killed = time.monotonic()
        finally:
            if len(records(workdir)) < 2:
                [p.kill() for p in pair]
        found = finish(pair, 100)
        assert time.monotonic() - killed < 90
        code, _, error = found[1 - victim]
        assert code not in (0, -signal.SIGKILL)
        # The second is JAX's own, where the coordinator is gone before the next collective.
        assert "another process was lost" in error or "another task died" in error, error
    before, workdir = 2, folder / "killed-1"
    for n in (1, 3):
        last = records(workdir)[-1]["epoch"]
        settings = [f"train.epochs={last + 2}"]
        found = finish(start_pair(workdir.name, folder, "--resume", settings=settings, n=n))
        assert [code for code, _, _ in found] == [0] * n, found
        assert f"on {n} device(s) instead of {before}" in found[0][2]
        assert records(workdir)[-1]["epoch"] == last + 1
        before = n


@pytest.mark.heavy
def test_sigterm_to_one_stops_all_with_a_checkpoint(folder):
    """Within an epoch; resumed on one process it visits what is left of it."""
    workdir = folder / "told"
    settings = ["train.epochs=500", "train.batch_size=1", "train.checkpoint_every=1000"]
    pair = start_pair("told", folder, settings=settings)
    end = time.monotonic() + 400
    while len(records(workdir)) < 1 and pair[0].poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGTERM)
    found = finish(pair)
    assert [code for code, _, _ in found] == [143, 143], found
    assert "stopped by SIGTERM" in found[0][2] and "--resume" in found[0][2]
    done = records(workdir)[-1]["epoch"]
    settings[0] = f"train.epochs={done + 2}"
    ((code, _, error),) = finish(
        [start(train_command("told", "--resume", settings=settings), folder)]
    )
    told = rf"resuming within epoch {done + 1}, after \d+ batches"
    assert code == 0 and re.search(told, error), error
    assert records(workdir)[-1]["epoch"] == done + 1 and not records(workdir)[-1]["partial"]


# The plan of an epoch


def test_every_relaxation_comes_once_however_often_the_epoch_was_resumed():
    rng = np.random.default_rng(0)
    members = rng.permutation(100)[:47]
    members.sort()

    def pack(some, n, shares):
        order = np.random.default_rng((3, 1)).permutation(some).tolist()
        batches = [(0, order[k : k + 4]) for k in range(0, len(order), 4)]
        return batches + [(0, [])] * (-len(batches) % n)

    def runs(n, done, mine=slice(None)):
        return remaining_runs(pack, members, n, mine, done)

    whole = runs(2, [])
    assert sorted(i for run in whole for i in run.indices) == members.tolist()
    assert runs(2, [[2, 3]]) == whole[3:]  # the same number of devices: the same plan
    visited = [i for run in whole[:2] for i in run.indices]
    visited += [i for run in runs(3, [[2, 2]])[:1] for i in run.indices]
    visited += [i for run in runs(1, [[2, 2], [3, 1]])[:1] for i in run.indices]
    rest = runs(2, [[2, 2], [3, 1], [1, 1]])
    assert sorted(visited + [i for run in rest for i in run.indices]) == members.tolist()
    assert runs(2, [[2, 2], [3, 1], [1, 1], [2, 1]]) == rest[1:]
    # Each process takes its own devices' batches, in the same steps.
    parts = [runs(4, [], slice(2 * p, 2 * p + 2)) for p in range(2)]
    assert all(a.indices == b.indices for a, b in zip(*parts, strict=True))
    for a, b in zip(*parts):
        assert len(a.mine) == len(b.mine) == 2
        assert [i for _, batch in a.mine + b.mine for i in batch] == a.indices


@pytest.mark.parametrize(
    ("before", "after"), [((2, 2), (1, 1)), ((1, 1), (2, 2)), ((4, 4), (2, 2)), ((2, 1), (2, 2))]
)
def test_another_number_of_cores_plans_other_buckets(before, after):
    """What of an epoch was done is known by the buckets it was done with: (devices, shares)."""
    rng = np.random.default_rng(0)
    atoms = rng.integers(4, 40, 300)
    edges, bonds = atoms * 40 + rng.integers(0, 50, 300), atoms * 12
    sizes = Sizes(atoms, edges, bonds, np.ones_like(atoms), edges + bonds)

    def pack(members, n, shares):
        buckets = plan_buckets(sizes, 16 // shares, 3, 0.2)
        return pack_epoch(buckets, sizes, np.random.default_rng((0, 3)), members, n)

    def runs(n, shares, done):
        return remaining_runs(pack, np.arange(300), n, slice(None), done, shares)

    whole = runs(*before, [])
    tally = Tally()
    half = whole[: len(whole) // 2]
    for run in half:
        tally.add({"finite": False}, len(run.indices), *before)
    assert tally.done == [[before[0], len(half), before[1]]]
    rest = runs(*after, tally.done)
    assert sorted(i for run in half + rest for i in run.indices) == list(range(300))
    old = [[before[0], len(half)]]  # as once written: with the shares of whoever goes on
    assert runs(*before, old) == whole[len(half) :]
    followed = Tally(done=old)
    followed.add({"finite": False}, 1, *before)
    assert followed.done == [[before[0], len(half) + 1, before[1]]]


# Finding each other


def test_places_by_options():
    assert find_place(None, None, None, {}) is None
    assert find_place(None, 1, None, {}) is None
    assert find_place("n1:29400", 2, 1, {}) == Place("n1:29400", 2, 1)
    assert find_place("n1:29400", 1, 0, {}) is None
    for options, words in (
        (("n1:29400", None, None), "--processes and --process-id missing beside --coordinator"),
        ((None, 2, 0), "--coordinator missing"),
        ((None, 2, None), "--coordinator and --process-id missing"),
        (("n1", 2, 0), "give HOST:PORT"),
        ((":29400", 2, 0), "give HOST:PORT"),
        (("n1:70000", 2, 0), "give HOST:PORT"),
        (("n1:29400", 2, 2), "number them from 0 to 1"),
        (("n1:29400", 0, 0), "--processes 0"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            find_place(*options, {})


@pytest.mark.parametrize(
    ("nodes", "visible", "devices"),
    [("1", None, (1,)), ("1", "0,1,2,3", (1,)), ("4", "0,1", None), ("1", "3", None)],
    ids=["shared", "all visible", "one per node", "bound"],
)
def test_places_by_slurm(monkeypatch, nodes, visible, devices):
    """JAX gives a task the GPU of its number; not where the task sees only its own."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    values = SLURM | {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    values |= {"SLURM_STEP_NODELIST": "gpu[07-08,11]", "SLURM_STEP_NUM_NODES": nodes}
    values |= {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("JAX_COORDINATOR_PORT", raising=False)
    place = find_place(None, None, None)
    assert place == Place("gpu07:61447", 4, 3, devices)
    assert find_place(None, 1, None) is None
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find_place(None, None, None) is None


def test_no_coordinator(tmp_path, monkeypatch, capsys):
    """Told within the time given, on one line, by a process that finds nobody or no free port."""
    monkeypatch.chdir(tmp_path)

    def fail(port, index):
        argv = ["train", "--config", "explicit.py", "--coordinator", f"localhost:{port}",
                "--processes", "2", "--process-id", index, "--join-seconds", "0.3"]  # fmt: skip
        begin = time.monotonic()
        assert cli.main(argv) == 2 and time.monotonic() - begin < 100
        (line,) = capsys.readouterr().err.splitlines()
        return line

    port = free_port()
    assert f"localhost:{port}: no coordinator within 0.3 s" in fail(port, "1")
    with socket.create_server(("", port)):
        assert "process 0 cannot serve there (Address already in use)" in fail(port, "0")
    assert not list(tmp_path.iterdir())


PAIR = """
import sys
from relaxnet_jax.runtime import enable_compilation_cache
enable_compilation_cache()
from relaxnet_jax.errors import InputError
from relaxnet_jax.train.hosts import Hosts, Place, joined
index = int(sys.argv[1])
with joined(Place("localhost:" + sys.argv[2], 2, index), float(sys.argv[3])):
    hosts = Hosts()
    assert (hosts.index, hosts.count, hosts.first) == (index, 2, index == 0)
    assert hosts.share({"loss": 0.1 if index == 0 else 0.2}) == {"loss": 0.1}
    print(hosts.in_turn(lambda: "made"))
    if sys.argv[4] == "fail" and index == 1:
        raise InputError("set.h5: no such file")
    if sys.argv[4] == "fail":
        hosts.wait()
        raise AssertionError("waited for nobody")
print("done")
"""


def test_an_error_in_one_process_ends_both(folder):
    """With its reason, and at once, although the other one waits for it."""
    for way, codes in (("well", [0, 0]), ("fail", [2, 2])):
        port = str(free_port())
        pair = [start(["-c", PAIR, str(i), port, "60", way], folder) for i in range(2)]
        found = finish(pair)
        assert [code for code, _, _ in found] == codes, found
        ends = ["made", "done"] if way == "well" else ["made"]
        assert [out.split() for _, out, _ in found] == [ends, ends]
    (_, _, error_0), (_, _, error_1) = found
    assert error_1 == "relaxnet-jax: error: process 1 of 2: set.h5: no such file\n"
    assert error_0 == (
        "relaxnet-jax: error: process 0 of 2: stopped because of process 1: set.h5: no such file\n"
    )


def test_a_process_whose_partner_never_comes(folder):
    """JAX alone would wait for a minute more and then abort."""
    command = ["-c", PAIR, "0", str(free_port()), "2", "well"]
    ((code, out, error),) = finish([start(command, folder)])
    assert code == 2 and not out
    assert "not all of the 2 processes came within 2 s" in error and len(error.splitlines()) == 1


# Under SLURM

SRUN = """\
#!/usr/bin/env bash
# Two nodes of two tasks, one after the other, with what the real srun sets.
printf '%s\\n' "$@" >"$OUT/arguments"
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_NODELIST='gpu[3-4]' SLURM_STEP_NUM_NODES=2 SLURM_NTASKS=4
for task in 0 1 2 3; do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@" || exit
done
"""
STUB = """\
#!/usr/bin/env bash
env | grep -E '^(SLURM|CUDA)' >"$OUT/task-$SLURM_PROCID"
echo "$@"
"""


def test_slurm_script(tmp_path, monkeypatch):
    """What bin/train_slurm.sh runs, with an srun and a relaxnet-jax that only tell."""
    script = ROOT / "bin" / "train_slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    for name, text in (("srun", SRUN), ("relaxnet-jax", STUB)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*argv, **changes):
        # The variables sbatch sets for --nodes=2 --gpus-per-node=2 --ntasks-per-node=2, and no others.
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "OUT": str(tmp_path),
            "SLURM_JOB_ID": "12",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_NTASKS": "4",
            "SLURM_GPUS_ON_NODE": "2",
            "SLURM_CPUS_PER_TASK": "8",
        } | changes
        environment = {k: v for k, v in environment.items() if v is not None}
        done = subprocess.run(["bash", script, *argv], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        return done.returncode, done.stdout.splitlines(), done.stderr

    code, lines, error = run("--config", "explicit.py", "--workdir", "big")
    assert code == 0, error
    started = ["train --config explicit.py --workdir big"] * 4
    assert lines == ["job 12: 2 node(s) × 2 process(es)", *started]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("JAX_COORDINATOR_PORT", raising=False)
    for i in range(4):
        for line in (tmp_path / f"task-{i}").read_text().splitlines():
            monkeypatch.setenv(*line.split("=", 1))
        assert find_place(None, None, None) == Place("gpu3:61452", 4, i, (i % 2,))
    arguments = (tmp_path / "arguments").read_text().split()
    options = list(itertools.takewhile(lambda a: a.startswith("--"), arguments))
    assert options == ["--kill-on-bad-exit=1", "--ntasks-per-node=2"]
    (tmp_path / "big" / "checkpoints" / "latest" / "120").mkdir(parents=True)
    for given in (("--workdir", "big"), ("--workdir=big",)):
        code, lines, _ = run(*given)
        assert code == 0 and lines[1].startswith("train --resume --workdir")
    for argv, changes, words in (
        ((), {}, "give the options"),
        (("--config", "explicit.py"), {}, "give --workdir"),
        (("--workdir", "big"), {"SLURM_JOB_ID": None}, "not in a SLURM job"),
        (("--workdir", "big"), {"SLURM_NTASKS_PER_NODE": "1"}, "give --ntasks-per-node=2"),
        (("--workdir", "big"), {"RELAXNET_JAX": "/none"}, "/none: not found"),
    ):
        code, lines, error = run(*argv, **changes)
        assert code == 2 and not lines and words in error, error


def test_the_slurm_script_asks_for_what_it_needs():
    """Options of the #SBATCH lines that exist, one task per GPU, a signal to the steps."""
    text = (ROOT / "bin" / "train_slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")  # with B: only the shell would get it
