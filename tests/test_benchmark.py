"""The benchmark: its clocks, its counts, its notebook, and the command end to end."""

import csv
import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY

from relaxnet_jax import benchmark_commands, cli
from relaxnet_jax.benchmark import costs as costs_module
from relaxnet_jax.benchmark import kernels as kernels_module
from relaxnet_jax.benchmark import machine, report, scaling, speed
from relaxnet_jax.benchmark.costs import memory_bytes, program_costs
from relaxnet_jax.benchmark.notebook import Notebook, conditions
from relaxnet_jax.benchmark.timing import measure_alternating, summary
from relaxnet_jax.benchmark.work import inference_step, load_work, shared_training, training_step
from relaxnet_jax.config import load_config
from relaxnet_jax.data.store_write import write_store
from relaxnet_jax.data.trajectory import RelaxationTrajectory


def test_costs_count_loops_as_often_as_they_run():
    """XLA counts the body of a loop once; here nested scans count 3 x 5 times."""
    size = 32
    kernel = jnp.ones((size, size))

    def layers(x, outer, inner):
        def layer(x, _):
            return jax.lax.scan(lambda y, _: (jnp.tanh(y @ kernel), None), x, None, inner)[0], x

        return jax.lax.scan(layer, x, None, outer)[1].sum()

    def costs(function):
        traced = jax.jit(function).trace(jnp.ones((size, size)))
        compiled = traced.lower().compile()
        return program_costs(traced.jaxpr, compiled), compiled

    product = 2 * size**3
    looped, compiled = costs(lambda x: layers(x, 3, 5))
    for flops in (looped.flops, looped.xla_flops):
        assert flops == pytest.approx(15 * product, rel=0.05)
    assert compiled.cost_analysis()["flops"] < 2 * product  # XLA's own
    assert memory_bytes(compiled) >= 4 * size * size
    # Five times the steps move five times the bytes, and the gradient costs three times as much.
    longer, _ = costs(lambda x: layers(x, 15, 5))
    assert longer.xla_bytes == pytest.approx(5 * looped.xla_bytes, rel=0.1)
    backward, _ = costs(jax.grad(lambda x: layers(x, 3, 5)))
    for flops in (backward.flops, backward.xla_flops):
        assert flops == pytest.approx(30 * product, rel=0.1)  # the kernel is a constant
    assert looped.loops_of_unknown_length == 0
    endless, _ = costs(lambda x: jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ kernel, x))
    assert endless.loops_of_unknown_length == 1
    assert endless.flops == pytest.approx(product, rel=0.1)


def test_costs_without_xlas_analysis(monkeypatch):
    """The count of the trace stands alone, and the reason is told."""
    monkeypatch.setattr(costs_module, "_analyse", lambda *a: {}["nothing"])
    traced = jax.jit(lambda x: x @ x).trace(jnp.ones((8, 8)))
    found = program_costs(traced.jaxpr, traced.lower().compile())
    assert found.flops == 2 * 8**3 and found.xla_bytes is None
    assert "cannot be used: KeyError: 'nothing'" in found.remark


@pytest.mark.usefixtures("own_cache")
def test_shared_training_is_the_step_on_one_device():
    """The losses of three steps in a row; what devices are there share the batch."""
    config = load_config(TINY, {"data.n_emt": 24, "train.batch_size": 4})
    loaded = load_work(config, lambda _: None)
    bucket = loaded.buckets[0]
    step = training_step(loaded, bucket.batch)
    alone = step.runner(jax.jit(step.function))
    shared = shared_training(loaded, bucket, lambda _: None)
    for _ in range(3):
        assert float(shared()["loss"]) == pytest.approx(float(alone()[1]["loss"]), rel=1e-5)


def test_runs_take_turns():
    """Every round runs each function once; a slow warm-up is reason enough to run once more only."""
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure_alternating(runs, seconds=0.0, least=4)
    assert calls == ["a", "b"] * 5 and [len(t) for t in times.values()] == [4, 4]
    assert summary([3.0, 1.0, 2.0]).median == 2.0
    slow = measure_alternating({"slow": lambda: time.sleep(0.05)}, seconds=0.01)
    assert len(slow["slow"]) == 1 and 0.05 <= slow["slow"][0] < 1.0


def test_notebook_goes_on_where_it_was_cut(tmp_path):
    path, lines = tmp_path / "b" / "speed.json", []
    first = Notebook(path, {"device": "x"}, 1.0, lines.append)
    assert first.entry("a", lambda: {"value": 1})["value"] == 1
    with pytest.raises(KeyboardInterrupt):
        first.entry("b", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    second = Notebook(path, {"device": "x"}, 1.0, lines.append)
    assert second.entry("a", lambda: pytest.fail("measured twice"))["value"] == 1
    other = Notebook(path, {"device": "y"}, 1.0, lines.append)
    assert other.entries == {}
    late = Notebook(path, {"device": "x"}, 0.0, lines.append)
    assert late.entry("b", lambda: pytest.fail("no time")) is None and late.missing == ["b"]
    late.finish()
    assert not json.loads(path.read_text())["complete"]
    second.entry("b", lambda: {"value": 2})
    second.finish()
    assert json.loads(path.read_text())["complete"]
    assert Notebook(path, {"device": "x"}, 1.0, lines.append).entries == {}  # complete: anew


def test_what_does_not_fit_is_told_and_the_next_one_made(tmp_path):
    def without_memory():
        raise MemoryError

    book = Notebook(tmp_path / "speed.json", {}, 1.0, lambda _: None)
    assert book.entry("a", without_memory)["skipped"] == "does not fit in memory"
    assert book.entry("b", lambda: {"value": 1})["value"] == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        book.entry("c", lambda: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL")))


def test_figures_of_other_code_or_data_are_not_mixed(tmp_path, monkeypatch):
    store = tmp_path / "set.h5"
    store.write_bytes(b"abc")
    config = load_config(TINY, {"data.path": str(store)})
    facts = {"device": "d", "load_average": 1.0, "memory_bytes": 9}

    def now(**others):
        return json.dumps(conditions(facts | others, [config], fast=True))

    before = now()
    assert now(load_average=2.0, memory_bytes=8) == before != now(device="e")
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_of_another_kind")
        assert now() != before
    with monkeypatch.context() as patch:
        patch.setattr("relaxnet_jax.programs.CODE", "changed")
        assert now() != before
    store.write_bytes(b"abcd")
    assert now() != before


def test_memory_of_a_control_group(tmp_path, monkeypatch):
    """What a container may take, not what its host has."""
    limit, used = tmp_path / "limit", tmp_path / "used"
    monkeypatch.setattr(machine, "CONTROL_GROUPS", ((str(limit), str(used)),))
    whole = machine.available_bytes()
    limit.write_text("3000\n")
    used.write_text("1000\n")
    assert whole > 2000 == machine.available_bytes()
    limit.write_text("max\n")
    assert machine.available_bytes() > 2000


def test_reductions_count_what_goes_in():
    for reduce in (jax.ops.segment_sum, jax.ops.segment_max):
        traced = jax.jit(lambda x, i, r=reduce: r(x, i, 4)).trace(jnp.ones(100), jnp.zeros(100, int))
        flops, _ = costs_module.traced_flops(traced.jaxpr)
        assert 100 <= flops < 600


@pytest.mark.usefixtures("own_cache")
def test_work_is_that_of_a_training_run(tmp_path):
    """Later starts are trained on too."""
    store = tmp_path / "long.h5"
    write_store(store, relaxations(24, frames=12))
    batches = []
    for later in (0, 2):
        changes = {"data.path": str(store), "data.later_starts": later, "train.batch_size": 4}
        loaded = load_work(load_config(TINY, changes), lambda _: None)
        batches.append(sum(bucket.batches for bucket in loaded.buckets))
    assert batches[1] >= 2 * batches[0]


def test_ceilings(monkeypatch):
    monkeypatch.setattr(machine, "ENOUGH", 0.0)
    found = machine.ceilings(seconds=0.0)
    assert found["matmul_size"] == 1024
    assert all(v > 1e8 for k, v in found.items() if k.endswith("per_s"))
    assert machine.describe()["cores"] >= 1 and machine.available_bytes() > 0


def test_batches_of_several_sizes():
    config = load_config(TINY)
    assert benchmark_commands._of_sizes(config, None) == [config]
    sized = benchmark_commands._of_sizes(config, [4, 32])
    assert [c.train.batch_size for c in sized] == [4, 32]
    assert sized[1].name == f"{config.name}, batches of 32" and sized[1].model == config.model


def test_kernels_of_a_profile():
    """Kernels of the device's streams alone, by kind; time in which two run at once is busy once."""
    event = lambda name, start, duration: SimpleNamespace(  # noqa: E731
        name=name, start_ns=start, duration_ns=duration
    )
    stream = [event("fusion_1", 0, 100), event("fusion_23", 50, 100), event("gemm_32x32", 400, 50)]
    lines = [
        SimpleNamespace(name="Stream #14(Compute)", events=stream),
        SimpleNamespace(name="XLA Ops", events=[event("while", 0, 1000)]),
    ]
    planes = [
        SimpleNamespace(name="/device:GPU:0", lines=lines),
        SimpleNamespace(name="/host:CPU", lines=lines),
    ]
    found = kernels_module.summary(kernels_module.kernels_of(planes), runs=1, most=1)
    assert found["busy_s"] == pytest.approx(200e-9) and found["calls"] == 3
    assert list(found["kinds"]) == ["fusion", "others"]
    assert found["kinds"]["fusion"] == pytest.approx(
        {"seconds": 200e-9, "calls": 2, "share": 0.8}
    )
    halved = kernels_module.summary(kernels_module.kernels_of(planes), runs=2)
    assert halved["kinds"]["gemm_32x32"] == pytest.approx({"seconds": 25e-9, "calls": 0.5, "share": 0.2})
    entry = {"structures_per_s": 1.0, "seconds": {"median": 1e-6}, "kernels": found}
    (table,) = report.kernel_tables({"entries": {"a / training step": entry, "ceilings": {}}})
    assert table.row_count == 2 and "busy 0.0002 of 0.001 ms" in table.title
    # The profiler itself runs here; a CPU has no kernels in streams.
    assert kernels_module.device_kernels(lambda: jnp.ones(3) + 1) == {}


def relaxations(n, frames=3):
    """Cells of two atoms that move a little."""
    rng = np.random.default_rng(0)
    lattice = np.array([[0, 0, 0], [1.4, 1.4, 1.9]])
    for i in range(n):
        yield RelaxationTrajectory(
            id=f"r{i}",
            atomic_numbers=np.array([29, 79]) if i % 2 else np.array([28, 28]),
            positions=lattice + np.cumsum(rng.normal(0, 0.02, (frames, 2, 3)), 0),
            cells=np.repeat(np.diag([2.8, 2.8, 3.8])[None], frames, 0),
            pbc=np.ones(3, bool),
            energies=-6.0 - np.arange(float(frames)),
            forces=rng.normal(size=(frames, 2, 3)),
            fixed_mask=np.zeros(2, bool),
            group=f"g{i}",
        )


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_speed_command(tmp_path, monkeypatch, capsys, full):
    """Every figure of the command on tiny work; what does not fit in memory is named.

    The training step, and more points of the curves, only where there is time to compile them.
    """
    monkeypatch.setenv("RELAXNET_JAX_CACHE", str(tmp_path / "cache"))
    if not full:
        monkeypatch.setattr(scaling, "CELLS", ((2, 2, 2), (1, 1, 1)))
        monkeypatch.setattr(scaling, "FRAMES", (1,))
        every = speed.step_kinds
        inference_only = lambda *a: {k: v for k, v in every(*a).items() if k == "inference"}  # noqa: E731
        monkeypatch.setattr(speed, "step_kinds", inference_only)
    real = scaling.measure
    monkeypatch.setattr(scaling, "measure", lambda run, seconds: real(run, 0.0))
    store, config, out = tmp_path / "set.h5", tmp_path / "tiny.py", tmp_path / "out"
    write_store(store, relaxations(24))
    model = TINY["model"] | {"layers": 1, "attention": False, "vector_messages": False}
    values = TINY | {"model": model, "dynamics": {"frames": 2}, "train": {"max_buckets": 1}}
    config.write_text(f"def get_config():\n    return {values!r}\n")
    cache = jax.config.jax_compilation_cache_dir
    argv = ["benchmark", "speed", "--config", str(config), "--data", str(store), "--fast",
            "--out", str(out), "--minutes", "9"]  # fmt: skip
    assert cli.main(argv) == 0
    assert jax.config.jax_compilation_cache_dir == cache
    document = json.loads((out / "speed.json").read_text())
    assert document["complete"]
    entries = document["entries"]
    kinds = ("training step", "inference") if full else ("inference",)
    steps = [entries[f"tiny / {kind} / bucket 0"] for kind in kinds]
    for e in steps:
        seconds = e["seconds"]
        assert 0 < seconds["fastest"] <= seconds["median"] <= seconds["slowest"]
        rate = e["mean_structures"] / seconds["median"]
        assert e["structures_per_s"] == pytest.approx(rate)
        assert e["atom_frames_per_s"] == pytest.approx(2 * 2 * rate)
        assert all(value > 0 for value in e["compile_s"].values())
        assert e["costs"]["xla_flops"] == pytest.approx(e["costs"]["flops"], rel=0.7)
        assert e["costs"]["xla_bytes"] > 0 and e["memory_bytes"] > 0
        assert 0 <= e["padding"] < 1 and 0 < e["share_of_matmul"] < 1
    if full:
        assert steps[0]["costs"]["flops"] > 2 * steps[1]["costs"]["flops"]
    assert entries["tiny / inference / 1 frames"]["frames"] == 1
    rows = list(csv.DictReader((out / "scaling.csv").open()))
    by_atoms = [r for r in rows if r["kind"] == "inference by atoms"]
    assert [int(r["atoms"]) for r in by_atoms] == ([2, 100, 2000] if full else [16])
    for r in by_atoms:
        assert float(r["seconds_per_atom"]) == pytest.approx(float(r["seconds"]) / int(r["atoms"]))
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Speed" in printed and "ceilings: matrix product" in printed
    # Programs that would not fit are not run.
    monkeypatch.setattr(machine, "available_bytes", lambda: 1000)
    from relaxnet_jax.config import load_config

    entry = scaling.atoms_entry(load_config(config), (1, 1, 1), training=False)
    assert "needs" in entry["skipped"] and "seconds" not in entry
    loaded = load_work(load_config(config, {"data.path": str(store)}), lambda _: None)
    step = inference_step(loaded.model, loaded.buckets[0].batch[0])
    entry = speed.step_entry(loaded, loaded.buckets[0], step, {})
    assert "needs" in entry["skipped"] and "seconds" not in entry


def test_speed_refuses_bad_input(capsys):
    for argv, words in (
        (["--minutes", "0"], "--minutes 0: must be positive"),
        (["--config", "absent.py"], "config 'absent.py' not found"),
        (["--only", "everything"], "--only: invalid choice: 'everything'"),
        (["--batch-size", "8", "0"], "--batch-size 0: give at least 1"),
        (["--kernels"], "JAX runs on a CPU here"),
        (["--kernels", "--only", "atoms"], "add steps to --only"),
    ):
        assert cli.main(["benchmark", "speed", *argv]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
