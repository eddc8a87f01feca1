"""Traced programs on disk: found again, never instead of others, and no harm where damaged."""

import dataclasses
import json
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import crystal, molecule, slab, tiny_config, tiny_model

from relaxnet_jax import programs, solving
from relaxnet_jax.predict import relax
from relaxnet_jax.programs import Program, storable
from relaxnet_jax.solver import solve_trajectory
from relaxnet_jax.train import step
from relaxnet_jax.train.loop import train
from relaxnet_jax.train.report import ConsoleReport

traces = []


@storable
class Sums(NamedTuple):
    total: jax.Array
    nothing: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Factor:
    value: float


def scaled_sum(factor, tree):
    traces.append(factor)
    return Sums(factor.value * sum(jnp.sum(x) for x in jax.tree.leaves(tree)), None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where programs are kept, empty; whoever edits the package meanwhile does no harm."""
    monkeypatch.setattr(programs, "_digest_code", lambda: programs.CODE)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    traces.clear()
    yield tmp_path / programs.FOLDER
    jax.config.update("jax_compilation_cache_dir", before)


def test_another_process_does_not_trace(folder):
    tree = {"a": np.arange(3.0, dtype=np.float32), "b": [np.float32(2.0)]}
    for _ in range(2):  # of two processes, each with a Program of its own
        program = Program(scaled_sum)
        for _ in range(2):
            result = program(Factor(3.0), tree)
            assert isinstance(result, Sums) and result.nothing is None
            assert float(result.total) == 15.0
        assert program.cache_size() == 1
    assert len(traces) == 1 and len(list(folder.iterdir())) == 1


def test_all_it_depends_on_tells_programs_apart(folder, monkeypatch):
    x = np.ones(3, np.float32)
    assert float(Program(scaled_sum)(Factor(1.0), x).total) == 3
    assert float(Program(scaled_sum)(Factor(2.0), x).total) == 6
    assert float(Program(scaled_sum)(Factor(1.0), x[:2]).total) == 2
    assert float(Program(scaled_sum)(Factor(1.0), {"x": x}).total) == 3
    assert Program(scaled_sum)(Factor(1.0), x.astype(np.int32)).total.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = Program(scaled_sum)(Factor(1.0), x.astype(np.float64)).total
        assert wide.dtype == jnp.float64
    for name, value in (("CODE", "changed"), ("_digest_code", lambda: "changed")):
        monkeypatch.setattr(programs, name, value)
    Program(scaled_sum)(Factor(1.0), x)
    assert len(traces) == len(list(folder.iterdir())) == 7


def test_code_changed_since_it_was_imported_is_not_kept(folder, monkeypatch):
    """What was traced is the imported code; the files say something else by now."""
    monkeypatch.setattr(programs, "_digest_code", lambda: "changed")
    assert float(Program(scaled_sum)(Factor(1.0), np.ones(3, np.float32)).total) == 3
    assert not folder.exists()


def test_forgotten_programs_are_looked_for_again(folder):
    x, program = np.ones(3, np.float32), Program(scaled_sum)
    for _ in range(2):
        assert float(program(Factor(1.0), x).total) == 3
    programs.forget()
    program(Factor(1.0), x)
    assert len(traces) == 1
    programs.forget()
    for file in folder.iterdir():
        file.unlink()
    program(Factor(1.0), x)
    assert len(traces) == 2


def test_arguments_for_another_platform_are_told(monkeypatch):
    cpu = jax.devices("cpu")[0]
    free, bound = jnp.ones(3), jax.device_put(np.ones(3), cpu)
    assert not programs._elsewhere([free, bound, 1.0])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert programs._elsewhere([free, bound]) and not programs._elsewhere([free, np.ones(3), 1.0])
    with jax.default_device(cpu):
        assert programs._elsewhere([free])


def test_what_cannot_be_stored_runs(folder):
    """Programs that call back to Python, as the adaptive solver's errors do."""

    def told(factor, x):
        traces.append(factor)
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: np.asarray(factor.value * x), like, x)

    program = Program(told)
    for _ in range(3):
        np.testing.assert_array_equal(program(Factor(2.0), np.ones(2, np.float32)), [2.0, 2.0])
    assert program.cache_size() == 1 and not folder.exists()
    assert len(traces) == 2  # once to find out


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_damaged_files_are_made_again(folder, damage):
    x = np.ones(3, np.float32)
    Program(scaled_sum)(Factor(1.0), x)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    changed = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    file.write_bytes({"cut": whole[:-9], "changed": changed, "empty": b""}[damage])
    assert float(Program(scaled_sum)(Factor(1.0), x).total) == 3
    assert len(traces) == 2
    Program(scaled_sum)(Factor(1.0), x)
    assert len(traces) == 2


def test_only_the_last_used_are_kept(folder, monkeypatch):
    monkeypatch.setattr(programs, "KEPT", 2)
    x = np.ones(3, np.float32)
    for age, value in enumerate((1.0, 2.0, 1.0, 3.0)):
        Program(scaled_sum)(Factor(value), x)
        for file in folder.iterdir():
            if file.stat().st_mtime > 1e6:  # the one used now; clocks are coarse
                os.utime(file, (age, age))
    assert len(list(folder.iterdir())) == 2
    traces.clear()
    Program(scaled_sum)(Factor(1.0), x)
    assert traces == []
    Program(scaled_sum)(Factor(2.0), x)
    assert traces == [Factor(2.0)]


def test_without_a_folder_or_under_a_transformation_it_is_jit(folder):
    x = jnp.ones(3)
    program = Program(scaled_sum)
    gradient = jax.jit(jax.grad(lambda x: program(Factor(2.0), x).total))(x)
    np.testing.assert_array_equal(gradient, [2, 2, 2])
    assert not folder.exists()
    folder.write_text("")  # nothing can be written below a file
    assert float(program(Factor(1.0), x).total) == 3
    jax.config.update("jax_compilation_cache_dir", None)
    assert float(program(Factor(1.0), x + 1).total) == 6


def test_predictions_are_those_of_jit(folder, monkeypatch):
    config = tiny_config("explicit", model__layers=1, dynamics__cell="variable")
    model = tiny_model(config, dtype=np.float32)
    atoms = [crystal(), molecule(), slab()]
    found, files = [], []
    for compiled in (
        Program(solve_trajectory),
        Program(solve_trajectory),  # finds what the first has left
        jax.jit(solve_trajectory, static_argnums=0),
    ):
        monkeypatch.setattr(solving, "solve_compiled", compiled)
        found.append(relax(model, atoms))
        files.append(sorted(folder.iterdir()))
    assert files[0] and files[0] == files[1] == files[2]
    for paths in found[:2]:
        for one, other in zip(paths, found[2], strict=True):
            assert one.positions[-1].tolist() != one.positions[0].tolist()
            np.testing.assert_array_equal(one.positions, other.positions)
            np.testing.assert_array_equal(one.cells, other.cells)
            np.testing.assert_array_equal(one.energies, other.energies)
            np.testing.assert_array_equal(one.forces, other.forces)


def test_part_of_another_program(folder):
    """Inline, it is not traced again by another process; nor for its result's shapes."""
    x = np.ones(3, np.float32)
    for _ in range(2):
        program = Program(scaled_sum)
        twice = jax.jit(lambda x, program=program: 2 * program.inline(Factor(2.0), {"x": x}).total)
        assert float(twice(x)) == float(twice(jnp.asarray(x))) == 12
        assert float(program.inline(Factor(2.0), {"x": x}).total) == 6
        shapes = Program(scaled_sum).shapes(Factor(2.0), {"x": x})
        assert shapes == Sums(jax.ShapeDtypeStruct((), jnp.float32), None)
    assert len(traces) == len(list(folder.iterdir())) == 1
    jax.config.update("jax_compilation_cache_dir", None)
    assert float(Program(scaled_sum).inline(Factor(2.0), x).total) == 6
    assert Program(scaled_sum).shapes(Factor(2.0), x).total.shape == ()
    assert len(traces) == 3


@pytest.mark.parametrize("latent", ["explicit", "implicit"])
def test_a_second_start_of_training_traces_no_network(folder, tmp_path, monkeypatch, latent):
    """What it computes is what the first start did, to the bit, and what it is without the folder."""
    monkeypatch.setenv("RELAXNET_JAX_CACHE", str(tmp_path / "cache"))
    config = tiny_config(
        latent,
        model__layers=1,
        data__n_emt=12,
        train__batch_size=4,
        train__epochs=2,
        train__static_epochs=int(latent == "implicit"),
        train__max_buckets=1,
        train__noise=0.1,
    )
    networks = []

    def counted(function):
        def call(*args):
            networks.append(function.__name__)
            return function(*args)

        return call

    for name in ("solve_trajectory", "energies_and_forces"):
        monkeypatch.setattr(step, name, counted(getattr(step, name)))
    found, counts = [], []
    for k in range(3):
        for name in ("batch_terms", "batch_gradient"):  # as in a process of its own
            monkeypatch.setattr(step, name, Program(getattr(step, name).function))
        if k == 2:
            jax.config.update("jax_compilation_cache_dir", None)
        train(config, tmp_path / str(k), report=ConsoleReport.silent(), devices=1)
        lines = (tmp_path / str(k) / "metrics.jsonl").read_text().splitlines()
        found.append([{**r["train"], **r["validation"]} for r in map(json.loads, lines)])
        counts.append(len(networks))
        networks.clear()
    assert counts[0] == counts[2] == (3 if latent == "implicit" else 2) and counts[1] == 0
    assert found[0] == found[1] and found[0][0]["forces"] > 0
    for one, other in zip(found[0], found[2], strict=True):
        assert one == pytest.approx(other, rel=1e-3)
