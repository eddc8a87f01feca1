"""Import by several processes, cut off and gone on with: always the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from part_work import deadly, work
from test_data_import import frames, save
from test_data_store import assert_same, random_trajectory

from relaxnet_jax.cli import main
from relaxnet_jax.config import load_config
from relaxnet_jax.data import SkippedRelaxation, TrajectoryStore, import_files, importing, pools
from relaxnet_jax.data.dataset import load_dataset
from relaxnet_jax.data.import_tasks import ReadTask, split_task, stamped
from relaxnet_jax.data.parts import Mark, run_parts
from relaxnet_jax.data.shards import write_shards
from relaxnet_jax.data.sources import Source
from relaxnet_jax.data.store_write import write_store
from relaxnet_jax.errors import InputError

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def workers_find_part_work(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)


def key(task):
    return str(task[1:])


class Tasks(list):
    """Tasks that count how often each is done."""

    def __init__(self, folder, faults):
        self.folder = folder / "calls"
        self.folder.mkdir()
        super().__init__((str(self.folder), k, fault) for k, fault in enumerate(faults))

    def calls(self):
        return [len(p.read_text()) for p in sorted(self.folder.iterdir())]


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_in_order_and_only_once(tmp_path, jobs):
    tasks = Tasks(tmp_path, ["", "raise", "empty", "refuse", ""])
    counted = []
    for again in (False, True):
        results = list(run_parts(tasks, work, tmp_path / "parts", key=key, jobs=jobs,
                                 progress=lambda *c: counted.append(c)))  # fmt: skip
        assert [r.number for r in results] == [0, 1, 2, 3, 4]
        assert [r.error for r in results] == [
            "",
            "RuntimeError: no luck",
            "",
            "x: bad: mend it",
            "",
        ]
        assert [r.path is None for r in results] == [False, True, True, False, False]
        for k in (0, 3, 4):
            trajectory, left, mark = results[k].items()
            assert_same(trajectory, random_trajectory(k))
            assert (left, mark) == (results[k].skipped[0], Mark("end", "ä"))
        assert results[2].skipped == [SkippedRelaxation("left-2", "why")]
        # What failed unexpectedly is tried again, nothing else.
        assert tasks.calls() == ([1, 2, 1, 1, 1] if again else [1] * 5)
    assert counted == [(k, 5) for k in range(1, 6)] * 2
    assert len(list((tmp_path / "parts").iterdir())) == 4


def test_killed_worker_costs_its_task_only(tmp_path):
    tasks = Tasks(tmp_path, ["", "", "kill", "", "", ""])
    results = list(run_parts(tasks, work, tmp_path / "parts", key=key, jobs=2))
    assert [bool(r.error) for r in results] == [False, False, True, False, False, False]
    assert "killed or ran out of memory" in results[2].error
    assert [r.path is None for r in results] == [False, False, True, False, False, False]
    assert not list((tmp_path / "parts").glob("*.started"))


def test_damaged_and_stale_parts_are_done_again(tmp_path):
    tasks = Tasks(tmp_path, ["", "", "empty", ""])
    folder = tmp_path / "parts"
    first = list(run_parts(tasks, work, folder, key=key))
    raw = bytearray(first[1].path.read_bytes())
    first[1].path.write_bytes(raw[: len(raw) // 2])
    (bare,) = folder.glob("*.json")
    bare.write_text(bare.read_text()[:-9])
    (folder / "part-000009-0123456789abcdef.h5").write_text("of another run")
    (folder / ".part-000003.12-ab.tmp.h5").write_text("cut off")
    again = list(run_parts(tasks, work, folder, key=key))
    assert tasks.calls() == [1, 2, 2, 1]
    assert [r[1:] for r in again] == [r[1:] for r in first]
    assert first[1].path.read_bytes() == raw
    list(run_parts(tasks, work, folder, key=lambda t: "new" * (t[1] == 3) + key(t)))
    assert tasks.calls() == [1, 2, 2, 2]
    assert len(list(folder.iterdir())) == 4


def test_run_parts_refuses(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written .*choose another"):
        list(run_parts([1], work, tmp_path / "file" / "parts", key=str))
    with pytest.raises(InputError, match="jobs 0: give 1 or more"):
        list(run_parts([1], work, tmp_path, key=str, jobs=0))


def fill(folder, n=24):
    """Files of two relaxations each; one damaged, one empty, one with ids of another."""
    folder.mkdir()
    for k in range(n):
        save(folder / f"{k:03d}.extxyz", frames(f"{k}-a", n=2 + k % 3), frames(f"{k}-b"))
    (folder / "005.extxyz").write_text("hello\nworld\n")
    (folder / "009.extxyz").write_text("")
    save(folder / "014.extxyz", frames("2-b"), frames("14-a", n=1), frames("14-c"))
    return folder


def imported(source, out, **options):
    """(result, lines, bytes of what was written, by file) of an import."""
    lines = []
    result = import_files([source], out, lines.append, **options)
    left = {p.name for p in out.parent.iterdir()}
    assert not [name for name in left if name.startswith(".")], left
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    return result, lines, [p.read_bytes() for p in files]


def test_same_bytes_and_messages_however_it_is_read(tmp_path, monkeypatch):
    source = fill(tmp_path / "in")
    expected = imported(source, tmp_path / "out.h5")
    report, lines, _ = expected
    assert (report.read, len(report.skipped)) == (43, 4)
    assert f"{source / '014.extxyz'}: skipped 2-b: id occurs in another file: rename it" in lines
    assert f"{source / '014.extxyz'}: 1 relaxations read, 2 skipped" in lines
    with TrajectoryStore(tmp_path / "out.h5") as store:
        store.verify()
        assert len(set(store.ids)) == 43
    time.sleep(1.1)  # another second: no time stamps in the file
    done = []
    assert imported(source, tmp_path / "out.h5", jobs=2,
                    progress=lambda *c: done.append(c)) == expected  # fmt: skip
    assert done == [(k, 24) for k in range(1, 25)]
    monkeypatch.setattr(importing, "TASK_BYTES", -1)
    assert imported(source, tmp_path / "out.h5") == expected


def test_tasks(tmp_path):
    """Consecutive files, the same tasks for any number of processes, bounded in size."""
    for k in range(70):
        with (tmp_path / f"{k:02d}.extxyz").open("wb") as file:
            file.truncate(10 if k < 60 else 40 << 20)
    files = stamped(Source(p, p.stem) for p in sorted(tmp_path.iterdir()))
    tasks = split_task(ReadTask(files, "free", None))
    assert [file for task in tasks for file in task.files] == list(files)
    assert [len(task.files) for task in tasks] == [5] * 12 + [1] * 10


def cut_off(command, seconds, ready):
    """Starts a command and kills it, and all it started, so long after ``ready`` is true."""
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        while not ready() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        ended = process.poll() is not None
        os.killpg(process.pid, signal.SIGKILL)
    return ended


@pytest.mark.parametrize("sharded", [False, True])
def test_killed_at_any_moment(tmp_path, sharded):
    """Kills at several moments leave a set that opens or none; then the same bytes."""
    source = fill(tmp_path / "in", 32)
    options = {"shard_size": 25} if sharded else {}
    name = "set" if sharded else "set.h5"
    whole = imported(source, tmp_path / "whole" / name, **options)[2]
    out = tmp_path / "out" / name
    parts = out.with_name(f".{name}.parts")
    command = [sys.executable, "-c", (
        "from relaxnet_jax.data import import_files, importing; importing.TASK_BYTES = -1\n"
        f"import_files([{str(source)!r}], {str(out)!r}, **{options!r})")]  # fmt: skip
    moments = [
        (0.0, parts.exists),
        (0.02, lambda: len(list(parts.glob("part-*.h5"))) > 4),
        (0.0, lambda: out.exists() or len(list(parts.glob("part-*.h5"))) > 14),
    ]
    kept = {}
    for seconds, ready in moments:
        cut_off(command, seconds, ready)
        # What was finished before is there, untouched.
        found = {p.name: p.stat().st_mtime_ns for p in parts.glob("part-*.h5")}
        assert kept.items() <= found.items() or out.exists()
        kept = found
        if out.exists() and list(out.parent.glob(f"{name}/shard*" if sharded else name)):
            with TrajectoryStore(out) as store:
                store.verify()
                assert len(store) and store.incomplete == (sharded and len(store) < 59)
    assert len(kept) > 4
    assert imported(source, out, **options)[2] == whole


def test_killed_with_processes(tmp_path):
    source = fill(tmp_path / "in")
    whole = imported(source, tmp_path / "whole.h5")[2]
    out = tmp_path / "out" / "set.h5"
    parts = out.with_name(".set.h5.parts")
    main_module = tmp_path / "run.py"
    main_module.write_text(
        "from relaxnet_jax.data import import_files\n"
        f"if __name__ == '__main__': import_files([{str(source)!r}], {str(out)!r}, jobs=2)\n"
    )
    ended = cut_off(
        [sys.executable, str(main_module)], 0, lambda: len(list(parts.glob("part*.h5"))) > 2
    )
    assert not ended and len(list(parts.glob("part*.h5"))) > 2
    before = {p.name: p.stat().st_mtime_ns for p in parts.glob("part*.h5")}
    monkey = {}

    def look(done, total):
        monkey.update({p.name: p.stat().st_mtime_ns for p in parts.glob("part*.h5")})

    assert imported(source, out, jobs=2, progress=look)[2] == whole
    assert before.items() <= monkey.items()


def test_changed_source_is_read_again(tmp_path, monkeypatch):
    source, out = fill(tmp_path / "in"), tmp_path / "out.h5"
    monkeypatch.setattr(importing, "TASK_BYTES", -1)

    class CutOffError(Exception):
        pass

    def cut(done, total):
        if done == 20:
            raise CutOffError

    with pytest.raises(CutOffError):
        import_files([source], out, progress=cut)
    assert not out.exists() and len(list((tmp_path / ".out.h5.parts").iterdir())) >= 9
    save(source / "003.extxyz", frames("new"))
    result, lines, raw = imported(source, out)
    assert f"{source / '003.extxyz'}: 1 relaxations read, 0 skipped" in lines
    assert imported(source, tmp_path / "other.h5")[::2] == (result, raw)
    with TrajectoryStore(out) as store:
        assert "new" in store.ids and "3-a" not in store.ids


def test_a_file_that_kills_its_process(tmp_path, monkeypatch):
    """Costs itself only, not the files of its task."""
    source = fill(tmp_path / "in", 18)
    (source / "016.db").write_text("x")
    monkeypatch.setattr(importing, "read_files", deadly)
    report = import_files([source], tmp_path / "out.h5", jobs=2)
    deaths = [s for s in report.skipped if "killed" in s[2]]
    assert [Path(file).name for file, _, _ in deaths] == ["016.db"]
    assert report.read == 18 * 2 - 4 - 2 + 1
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["in", "out.h5"]


def test_shards(tmp_path):
    given = [random_trajectory(k) for k in range(7)]
    folder = tmp_path / "set"

    def checked(trajectories):
        """What stands in the folder opens at any moment."""
        for k, trajectory in enumerate(trajectories):
            if k > 3:
                with TrajectoryStore(folder) as store:
                    assert store.incomplete
                    assert store.ids == [t.id for t in given[: len(store)]] and len(store) >= k - 3
            yield trajectory

    assert write_shards(folder, checked(given), 3, metadata={"a": 1}) == 7
    names = ["shard-00000.h5", "shard-00001.h5", "shard-00002.h5"]
    assert sorted(os.listdir(folder)) == names
    with TrajectoryStore(folder) as store:
        assert not store.incomplete
        assert store.metadata == {"a": 1, "shard": {"index": 0, "last": False}}
        store.verify()
        for k, trajectory in enumerate(given):
            assert_same(store[k], trajectory)
    with TrajectoryStore(folder / names[0]) as store:
        assert store.incomplete
    # A smaller set takes its place; a failing one does not.
    with pytest.raises(InputError, match="no relaxations to write"):
        write_shards(folder, [], 3)
    with pytest.raises(InputError, match=r"'id 0 ä', id: given twice"):
        write_shards(folder, [given[0], given[0]], 3)
    assert sorted(os.listdir(folder)) == names
    assert write_shards(folder, given[:6], 3) == 6
    assert sorted(os.listdir(folder)) == names[:2]
    (folder / "mine.h5").touch()
    with pytest.raises(InputError, match=r"mine\.h5: is not a shard of a set: choose another"):
        write_shards(folder, given, 3)


def test_incomplete_set_is_announced_for_training(tmp_path):
    given = [random_trajectory(k) for k in range(6)]
    for k in range(6):
        object.__setattr__(given[k], "cells", np.repeat(given[k].cells[:1], given[k].n_frames, 0))
        object.__setattr__(given[k], "group", f"{k}")
    write_shards(tmp_path / "set", given, 2)
    config = load_config("explicit.py", {"data.path": str(tmp_path / "set")})
    for left, expected in ((3, 0), (2, 1)):
        lines = []
        if left == 2:
            (tmp_path / "set" / "shard-00002.h5").unlink()
        load_dataset(config, lines.append)
        assert sum("not complete, 4 relaxations so far" in line for line in lines) == expected


def test_command(tmp_path, capsys):
    source = fill(tmp_path / "in")
    out = tmp_path / "set"
    command = ["data", "import", str(source), "--out"]
    assert main([*command, str(out), "--shard-size", "20", "--jobs", "2"]) == 0
    assert "43 relaxations" in capsys.readouterr().out
    assert sorted(os.listdir(out)) == [f"shard-{k:05d}.h5" for k in range(3)]
    for options, message in (
        ((str(tmp_path / "a.h5"), "--shard-size", "20"), "shards need a folder"),
        ((str(out), "--overwrite", "--shard-size", "0"), "0 relaxations per shard: give 1 or more"),
        ((str(out), "--overwrite", "--jobs", "0"), "jobs 0: give 1 or more"),
        ((str(out), "--jobs", "1"), "set: exists; give another --out, or --overwrite"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    assert len(os.listdir(out)) == 3
    # What was cut off is gone on with, unasked: a set without its last shard, and one without any.
    for left in (2, 0):
        for shard in sorted(out.iterdir())[left:]:
            shard.rename(out / f".{shard.stem}.1-a.tmp.h5")
        assert main([*command, str(out), "--shard-size", "20", "--jobs", "2"]) == 0
        assert sorted(os.listdir(out)) == [f"shard-{k:05d}.h5" for k in range(3)]
    assert main([*command, str(out), "--overwrite"]) == 0
    assert os.listdir(out) == ["shard-00000.h5"]


def test_command_replaces_no_finished_store_unasked(tmp_path, capsys):
    out = tmp_path / "set.h5"
    write_store(out, [random_trajectory(0)])
    before = out.read_bytes()
    source = save(tmp_path / "a.extxyz", frames("a"))
    command = ["data", "import", str(source), "--out", str(out)]
    assert main(command) == 2
    assert f"{out}: exists; give another --out, or --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main([*command, "--overwrite"]) == 0
    assert out.read_bytes() != before


def test_dask(tmp_path, monkeypatch):
    """The same bytes by the workers of a cluster; what fails there is its task's error."""
    distributed = pytest.importorskip("distributed", reason="Dask (extra dask) is not installed")
    source = fill(tmp_path / "in")
    expected = imported(source, tmp_path / "out.h5")
    monkeypatch.setattr(pools, "CONNECT_SECONDS", 1)
    with pytest.raises(InputError, match=r"scheduler tcp://127\.0\.0\.1:1: does not answer"):
        imported(source, tmp_path / "out.h5", scheduler="tcp://127.0.0.1:1")
    assert sorted(os.listdir(tmp_path)) == ["in", "out.h5"]
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        assert imported(source, tmp_path / "out.h5", scheduler=address) == expected
        tasks = Tasks(tmp_path, ["", "raise", "", "kill"])
        results = list(run_parts(tasks, work, tmp_path / "parts", key=key, scheduler=address))
        assert [r.error for r in results] == ["", "RuntimeError: no luck", "", pools.DIED]
        assert_same(next(results[2].items()), random_trajectory(2))


def test_without_dask(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"Dask is not installed: pip install 'relaxnet-jax\[dask"):
        list(run_parts([1], work, tmp_path, key=str, scheduler="tcp://127.0.0.1:1"))
