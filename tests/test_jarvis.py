"""Downloads from a server that misbehaves, and the store made of what came."""

import gzip
import hashlib
import io
import json
import threading
import zipfile
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from relaxnet_jax.cli import main
from relaxnet_jax.data import TrajectoryStore, import_files, jarvis
from relaxnet_jax.data.download import Policy, fetch, verify_zip
from relaxnet_jax.data.jarvis import Manifest, fetch_jarvis, read_ids, select
from relaxnet_jax.errors import InputError

STRUCTURE = np.array([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]])


def vasprun(k, n=3):
    """A vasprun.xml of ``n`` ionic steps, told apart from others by ``k``; its energies."""

    def rows(name, values):
        lines = "\n".join("<v> " + " ".join(f"{x:.8f}" for x in row) + " </v>" for row in values)
        return f'<varray name="{name}" >\n{lines}\n</varray>\n'

    energies = -7.0 - k - 0.1 * np.arange(n)
    types = "".join(f"<rc><c>{s}</c><c> {i}</c></rc>\n" for i, s in enumerate(("Na", "Cl"), 1))
    steps = ""
    for step, energy in enumerate(energies):
        cell = rows("basis", (3.0 + 0.1 * k - 0.01 * step) * np.eye(3))
        block = f'<energy>\n<i name="e_fr_energy"> {energy:.8f} </i>\n</energy>\n'
        steps += (
            f"<calculation>\n<scstep>\n{block}</scstep>\n<structure>\n<crystal>\n{cell}</crystal>\n"
            f"{rows('positions', STRUCTURE + 0.001 * step)}</structure>\n"
            f"{rows('forces', np.full((2, 3), 0.1 / (step + 1)))}{block}</calculation>\n"
        )
    text = (
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<modeling>\n<incar>\n'
        '<i type="int" name="IBRION">     2</i>\n</incar>\n<atominfo>\n<array name="atoms" >\n'
        f"<set>\n{types}</set>\n</array>\n</atominfo>\n{steps}</modeling>\n"
    )
    return text.encode(), energies


def archive(k, n=3):
    """A zip as JARVIS has them, with something in it that does not shrink."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as out:
        # A ZipInfo has a fixed date: the same bytes each time.
        out.writestr(zipfile.ZipInfo("vasprun.xml"), vasprun(k, n)[0])
        out.writestr(zipfile.ZipInfo("OSZICAR"), np.random.default_rng(k).bytes(20_000))
    return packed.getvalue()


class Server:
    """Serves ``files`` and logs requests; ``faults[path]`` are what to do wrong, in turn:
    a status, ("cut", bytes), "html", "page" (HTML that says it is a zip), "open" (no length)."""

    def __init__(self):
        self.files, self.faults, self.ranges = {}, defaultdict(list), True
        self.log, self.headers = [], {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        # Polls often, so that shutting down takes no time.
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def answer(self, handler):
        path, wanted = handler.path, handler.headers.get("Range")
        self.log.append((path, wanted))
        fault = self.faults[path].pop(0) if self.faults[path] else None
        body, status, kind = self.files.get(path), 200, "application/zip"
        if isinstance(fault, int) or body is None:
            handler.send_response(fault or 404)
            handler.send_header("Retry-After", "7")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if fault in ("html", "page"):
            body = b"\n<!DOCTYPE html><html>log in</html>"
            kind = "text/html" if fault == "html" else kind
        start = 0
        if wanted and self.ranges and not isinstance(fault, str):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(body) else 416
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        if status == 206:
            span = f"bytes {start}-{len(body) - 1}/{len(body)}"
            handler.send_header("Content-Range", span)
        if status == 416:
            handler.send_header("Content-Range", f"bytes */{len(body)}")
            start = len(body)
        if fault != "open":
            handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        body = body[start:]
        handler.wfile.write(body[: fault[1]] if isinstance(fault, tuple) else body)
        handler.close_connection = True

    def requests(self):
        return Counter(path for path, _ in self.log)

    def index(self, *materials, **extra):
        """An index of archives ``materials``, which it serves as ``/index.json``."""
        entries = ["a string, as the real one has"]
        for k in materials:
            data = self.files.setdefault(f"/files/{k}", archive(k))
            entries.append({"name": f"JVASP-{k}.zip", "download_url": f"files/{k}",
                            "size": len(data), "computed_md5": hashlib.md5(data).hexdigest()})  # fmt: skip
        index = {"OPT-LOPTICS": [], "DFT-SCF": entries, **extra}
        self.files["/index.json"] = json.dumps(index).encode()
        return f"{self.url}/index.json"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()
    server.thread.join()


class Clock:
    """A policy whose waits take no time and are noted."""

    def __init__(self, tries=4, timeout=5.0):
        self.waits = []
        self.policy = Policy(
            tries=tries, timeout=timeout, sleep=self.waits.append, uniform=lambda: 0.5
        )


def lines(report):
    return {line["name"]: line for line in map(json.loads, report.manifest.open())}


def test_all_that_can_go_wrong(server, tmp_path):
    """Each fault in a manifest of its own words, and the store has the rest, the same numbers."""
    index = server.index(1, 2, 3, 4, 5, 6, 7, 8)
    server.faults["/files/2"] = [("cut", 9_000)]
    server.faults["/files/3"] = ["html"]
    server.files["/files/4"] = archive(4)[:12_000]
    server.faults["/files/5"] = [503, 503]
    server.faults["/files/6"] = [404]
    server.faults["/files/7"] = [("cut", 0)] * 9
    server.faults["/files/8"] = ["page"]
    out, clock, said = tmp_path / "set.h5", Clock(), []
    report = fetch_jarvis(out, index=index, policy=clock.policy, report=said.append)
    assert (report.came, report.imported.read, report.imported.frames) == (3, 3, 9)
    got = lines(report)
    assert [got[f"JVASP-{k}.zip"]["status"] for k in range(1, 9)] == [
        "came", "came", "failed", "failed", "came", "failed", "failed", "failed"]  # fmt: skip
    assert got["JVASP-1.zip"] == {
        "name": "JVASP-1.zip", "id": "JVASP-1", "url": f"{server.url}/files/1", "status": "came",
        "how": "fetched", "bytes": len(server.files["/files/1"])}  # fmt: skip
    assert got["JVASP-2.zip"]["how"] == "fetched, resumed at byte 9000"
    reasons = {k: got[f"JVASP-{k}.zip"]["reason"] for k in (3, 4, 6, 7, 8)}
    assert reasons[3].startswith("a web page instead of the file")
    assert reasons[4].startswith(f"12000 bytes instead of {len(archive(4))}")
    assert reasons[6] == "HTTP 404 Not Found: check the address"
    assert reasons[7].startswith("connection cut at byte 0 of ") and "after 4 tries" in reasons[7]
    assert reasons[8].startswith("a web page instead of the file")
    assert report.failed == {f"JVASP-{k}.zip": why for k, why in reasons.items()}
    assert server.requests() == Counter({"/index.json": 1, "/files/1": 1, "/files/2": 2,
        "/files/3": 1, "/files/4": 1, "/files/5": 3, "/files/6": 1, "/files/7": 4,
        "/files/8": 1})  # fmt: skip
    # One wait after the first break, two as long as the server says (7 s), three that double.
    assert clock.waits == [1.0, 7.0, 7.0, 1.0, 2.0, 4.0]
    folder = tmp_path / "set-downloads" / "DFT-SCF"
    assert sorted(p.name for p in folder.iterdir()) == [
        f"JVASP-{k}.zip" for k in (1, 2, 5)]  # fmt: skip
    with TrajectoryStore(out) as store:
        assert store.ids == ["JVASP-1", "JVASP-2", "JVASP-5"]
        for k, trajectory in zip((1, 2, 5), (store[i] for i in range(3))):
            np.testing.assert_allclose(trajectory.energies, vasprun(k)[1], atol=1e-9)
            np.testing.assert_allclose(trajectory.cells[2], (2.98 + 0.1 * k) * np.eye(3), atol=1e-9)
            np.testing.assert_allclose(trajectory.forces[1], 0.05, atol=1e-9)
    # Again: what is there is not asked for, what failed is.
    server.log.clear()
    server.files["/files/4"] = archive(4)
    server.faults.clear()
    again = fetch_jarvis(out, index=index, policy=clock.policy)
    assert server.requests() == Counter({f"/files/{k}": 1 for k in (3, 4, 6, 7, 8)})
    assert (again.came, again.failed, again.imported.read) == (8, {}, 8)
    assert lines(again)["JVASP-1.zip"]["how"] == "already there"
    assert len(again.manifest.read_text().splitlines()) == 8
    with TrajectoryStore(out) as store:
        assert store.ids == [f"JVASP-{k}" for k in range(1, 9)]


@pytest.mark.parametrize("ranges", [True, False])
def test_resumed_over_runs(server, tmp_path, ranges):
    index, clock = server.index(1, 2), Clock(tries=1)
    server.ranges = ranges
    server.faults["/files/2"] = [("cut", 15_000)]
    out, size = tmp_path / "a.h5", len(archive(2))
    first = fetch_jarvis(out, index=index, policy=clock.policy)
    assert first.failed == {"JVASP-2.zip": f"connection cut at byte 15000 of {size}, after 1 tries: "
                            "run again to resume"}  # fmt: skip
    second = fetch_jarvis(out, index=index, policy=clock.policy)
    assert server.log[-1] == ("/files/2", "bytes=15000-")
    how = "fetched, resumed at byte 15000" if ranges else "fetched"
    assert lines(second)["JVASP-2.zip"]["how"] == how
    assert second.imported.read == 2 and clock.waits == []
    assert not list(tmp_path.rglob("*.part"))


def test_pieces_of_two_versions(server, tmp_path):
    """The archive changed on the server meanwhile: it is fetched anew, from its first byte."""
    url, clock, target = f"{server.url}/x.zip", Clock(), tmp_path / "x.zip"
    (tmp_path / ".x.zip.part").write_bytes(archive(1)[:5000])
    server.files["/x.zip"] = archive(2)
    got = fetch(url, target, verify_zip, policy=clock.policy)
    assert target.read_bytes() == archive(2) and got.how == "fetched"
    assert [wanted for _, wanted in server.log] == ["bytes=5000-", None]


def test_nothing_left_to_send(server, tmp_path):
    """Interrupted after the last byte: what is there is taken, of another size it is not."""
    url, target = f"{server.url}/x.zip", tmp_path / "x.zip"
    server.files["/x.zip"] = archive(2)
    part = tmp_path / ".x.zip.part"
    part.write_bytes(archive(2))
    assert fetch(url, target, verify_zip, policy=Clock().policy).size == len(archive(2))
    target.unlink()
    part.write_bytes(archive(2) + b"more")
    fetch(url, target, verify_zip, policy=Clock().policy)
    assert target.read_bytes() == archive(2)


def test_truncated_without_a_length(server, tmp_path):
    """Only the archive itself says that it is cut: tried again."""
    url, clock, target = f"{server.url}/x.zip", Clock(), tmp_path / "x.zip"
    server.files["/x.zip"] = archive(1)[:-500]
    server.faults["/x.zip"] = ["open"] * 9
    with pytest.raises(InputError, match=r"x\.zip: not a valid zip archive .*, after 4 tries"):
        fetch(url, target, verify_zip, policy=clock.policy)
    assert server.requests()["/x.zip"] == 4 and not list(tmp_path.iterdir())
    # Whole by its length, a broken archive is what the server has.
    server.faults.clear()
    with pytest.raises(InputError, match=r"x\.zip: not a valid zip archive"):
        fetch(url, target, verify_zip, policy=clock.policy)
    assert server.requests()["/x.zip"] == 5


def test_checked_against_the_index(server, tmp_path):
    url, data, other = f"{server.url}/x.zip", archive(1), archive(2)
    server.files["/x.zip"], policy = data, Clock().policy
    md5 = hashlib.md5(other).hexdigest()
    with pytest.raises(InputError, match="MD5 sum differs from the index"):
        fetch(url, tmp_path / "x.zip", verify_zip, md5=md5, policy=policy)
    # A file that is there but not the one of the index is replaced, a sound one is kept.
    (tmp_path / "x.zip").write_bytes(other[:-1])
    fetch(url, tmp_path / "x.zip", verify_zip, size=len(data), policy=policy)
    assert (tmp_path / "x.zip").read_bytes() == data
    server.log.clear()
    assert fetch(url, tmp_path / "x.zip", verify_zip, policy=policy).how == "already there"
    flipped = bytearray(data)
    flipped[10_000] ^= 1
    (tmp_path / "x.zip").write_bytes(flipped)
    assert fetch(url, tmp_path / "x.zip", verify_zip, policy=policy).how == "fetched"
    assert server.log == [("/x.zip", None)]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "x.zip", "http://[::1"])
def test_addresses(url, tmp_path):
    with pytest.raises(InputError, match=r"correct the index"):
        fetch(url, tmp_path / "x.zip", verify_zip, policy=Clock().policy)
    assert not (tmp_path / "x.zip").exists()


def test_no_server(server, tmp_path):
    server.http.shutdown()
    server.http.server_close()
    clock = Clock()
    with pytest.raises(InputError, match=r"refused.*after 4 tries: run again"):
        fetch(f"{server.url}/x", tmp_path / "x", verify_zip, policy=clock.policy)
    assert clock.waits == [1.0, 2.0, 4.0]


def test_select():
    def entry(name, **more):
        return {"name": name, "download_url": f"https://host/{name}", **more}

    index = {
        "DFT-SCF": [entry("JVASP-1.zip", size=0, computed_md5=""), "x", entry("../JVASP-2.zip"),
                    entry("JVASP-3_b.zip", size=5), entry("JVASP-1.zip"),
                    entry("JVASP-1.zip", download_url="https://host/other")],
        "STM": [],
    }  # fmt: skip
    archives, skipped = select(index, "DFT-SCF")
    assert [(a.id, a.name, a.size, a.md5) for a in archives] == [
        ("JVASP-1", "JVASP-1.zip", None, None), ("JVASP-3", "JVASP-3_b.zip", 5, None)]  # fmt: skip
    assert skipped == {
        "../JVASP-2.zip": "not a zip archive with an address",
        "JVASP-1.zip (https://host/other)": "another archive of this name comes first",
    }
    archives, skipped = select(index, "DFT-SCF", ["JVASP-9", "JVASP-3"])
    assert [a.id for a in archives] == ["JVASP-3"]
    assert skipped == {"JVASP-9": "not in the index under DFT-SCF"}
    assert len(select(index, "DFT-SCF", limit=1)[0]) == 1
    with pytest.raises(InputError, match=r"no category 'OPT': use one of DFT-SCF, STM"):
        select(index, "OPT")


def test_manifest_survives_a_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"name": "a", "status": "came"}\n["no"]\n{"name": "b", "sta')
    manifest = Manifest(path)
    assert list(manifest.lines) == ["a"]
    manifest.add("c", status="failed")
    assert list(Manifest(path).lines) == ["a", "c"]
    manifest.compact()
    assert [json.loads(line)["name"] for line in path.open()] == ["a", "c"]


def test_command(server, tmp_path, capsys):
    """From an index in a file, by id; one archive is a single ionic step, one id is unknown."""
    server.files["/files/4"] = archive(4, n=1)
    url = server.index(3, 4, 5)
    content = server.files["/index.json"].replace(b'"files/', f'"{server.url}/files/'.encode())
    index = tmp_path / "index.json.gz"
    index.write_bytes(gzip.compress(content))
    ids = tmp_path / "ids.txt"
    ids.write_text("JVASP-3\nJVASP-4\nJVASP-77\n")
    out, downloads = tmp_path / "x" / "set.h5", tmp_path / "kept"
    command = ["data", "jarvis", "--out", str(out), "--ids", str(ids), "--downloads"]
    assert main([*command, str(downloads), "--index", str(index)]) == 0
    said = capsys.readouterr()
    assert (
        "1 relaxations with 3 ionic steps; 2 archives fetched, 0 failed, 1 skipped; 1 rel" in said.out
    )
    assert (downloads / "DFT-SCF" / "JVASP-3.zip").is_file() and "/files/5" not in server.requests()
    got = {
        line["name"]: line for line in map(json.loads, (out.parent / "set.manifest.jsonl").open())
    }
    assert got["JVASP-77"] == {"name": "JVASP-77", "id": "JVASP-77", "status": "skipped",
                               "reason": "not in the index under DFT-SCF"}  # fmt: skip
    assert got["JVASP-4.zip"]["status"] == "came"
    assert "a single ionic step" in got["JVASP-4.zip"]["not_read"][0]
    # A finished store is not replaced unasked; what came is not fetched again.
    before, asked = out.read_bytes(), len(server.log)
    again = [*command, str(downloads), "--index", str(index)]
    assert main(again) == 2
    assert "set.h5: exists; give another --out, or --overwrite" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0
    assert out.read_bytes() == before and len(server.log) == asked
    # Nothing of it: one line, and no store.
    none = tmp_path / "none.h5"
    assert main(["data", "jarvis", "--out", str(none), "--ids", "JVASP-9", "--index", url]) == 2
    assert "JVASP-9: not in the index under DFT-SCF" in capsys.readouterr().err
    assert not none.exists() and (tmp_path / "none.manifest.jsonl").is_file()


def test_archives_are_read_by_as_many_processes_as_asked_for(server, tmp_path, monkeypatch):
    """By those there are cores for, if nothing is said."""
    read = []
    monkeypatch.setattr(jarvis, "import_files", lambda *a, **k: read.append(k) or import_files(*a))
    for k, (given, jobs) in enumerate((([], None), (["--jobs", "2"], 2))):
        out = tmp_path / f"{k}.h5"
        assert main(["data", "jarvis", "--out", str(out), "--index", server.index(3), *given]) == 0
        assert read[-1] == {"jobs": jobs, "scheduler": None}


@pytest.mark.parametrize(
    "content", [b"<html>", b"[]", b"{}", b'{"DFT-SCF": 3}', b"PK\x03\x04", b""]
)
def test_no_index(server, tmp_path, content):
    index = tmp_path / "index.json"
    index.write_bytes(content)
    with pytest.raises(InputError, match=r"index\.json: not an index"):
        fetch_jarvis(tmp_path / "a.h5", index=str(index))
    server.files["/index.json"] = content
    with pytest.raises(InputError, match=r"index\.json: (not an index|a web page)"):
        fetch_jarvis(tmp_path / "a.h5", index=f"{server.url}/index.json", policy=Clock().policy)
    assert not list(tmp_path.rglob(".*.part"))


def test_default_index(monkeypatch, server, tmp_path):
    """That of jarvis-tools: a zip with one JSON file."""
    import jarvis.db.figshare

    listed = jarvis.db.figshare.get_db_info()["raw_files"]
    assert listed[0].startswith("https://ndownloader.figshare.com/files/")
    server.index(1)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as out:
        out.writestr(listed[1], server.files["/index.json"])
    server.files["/raw"] = packed.getvalue()
    info = {"raw_files": [f"{server.url}/raw", *listed[1:]]}
    monkeypatch.setattr(jarvis.db.figshare, "get_db_info", lambda: info)
    assert fetch_jarvis(tmp_path / "a.h5", limit=1, policy=Clock().policy).imported.read == 1


def test_ids(tmp_path):
    assert read_ids("JVASP-1, JVASP-2,JVASP-1") == ["JVASP-1", "JVASP-2"]
    many = [f"JVASP-{k}" for k in range(1000)]
    assert read_ids(",".join(many)) == many
    for nothing in (",", ""):
        with pytest.raises(InputError, match="no ids"):
            read_ids(nothing)
    (tmp_path / "ids").write_text("JVASP-1\nJVASP-2\n", encoding="utf-8-sig")
    assert read_ids(str(tmp_path / "ids")) == ["JVASP-1", "JVASP-2"]
    (tmp_path / "ids").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="ids: cannot be read"):
        read_ids(str(tmp_path / "ids"))
