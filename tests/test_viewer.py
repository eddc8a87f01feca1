"""The HTML page of a path: whole, self-contained, and showing the path it was made from."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from ase.data import covalent_radii
from ase.data.colors import jmol_colors

from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.evaluate.path_figure import path_curves
from relaxnet_jax.evaluate.viewer import viewer_data, write_viewer
from relaxnet_jax.trust import Flag

VOID = {"meta", "input"}
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
OFFLINE = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
    "--disable-extensions", "--no-pings", "--force-prefers-reduced-motion",
)  # fmt: skip


class Page(HTMLParser):
    """Collects tags and texts, and fails where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append((tag, attributes.get("id", tag)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            key = self.open[-1][1]
            self.texts[key] = self.texts.get(key, "") + data


def path(**changes):
    rng = np.random.default_rng(0)
    values = {
        "id": "</script><b>&amp; 'odd' \"name\"",
        "atomic_numbers": np.array([29, 8, 79, 29]),
        "positions": np.cumsum(rng.normal(0, 0.3, (3, 4, 3)), 0) + 3 * np.eye(4, 3),
        "cells": np.repeat(np.diag([5.0, 6.0, 7.0])[None], 3, 0),
        "pbc": np.array([True, True, False]),
        "energies": np.array([-10.0, -10.2, -10.25]),
        "forces": rng.normal(0, 0.1, (3, 4, 3)),
        "fixed_mask": np.array([True, False, False, False]),
        "times": np.array([0.0, 0.3, 1.0]),
        "source": "RelaxNet",
    }
    return RelaxationTrajectory(**values | changes)


def test_page_is_whole_and_shows_the_path(tmp_path):
    one = path()
    write_viewer(one, tmp_path / "a.html", (Flag("energy rises", "by <5> meV/atom"),))
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    page = Page(text)
    # Nothing from elsewhere: no address, no file, no import.
    assert not re.search(r"(?i)https?:|//[a-z]|@import|url\(|import\(|fetch|XMLHttp", text)
    for tag, attributes in page.tags:
        assert not {"src", "href", "action", "data", "srcset"} & set(attributes), tag
        assert tag not in ("link", "base", "iframe", "object", "img", "embed")
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    # Every element the script asks for is there.
    script = page.texts["script"]
    assert set(re.findall(r'\$\("(\w+)"\)', script)) <= set(identifiers)
    assert page.texts["title"] == f"{one.id}: {one.formula}"  # unescaped by the parser
    data = json.loads(page.texts["data"])
    assert data["title"].startswith(one.id) and data["flags"] == [
        ["energy rises", "by <5> meV/atom"]
    ]
    np.testing.assert_allclose(data["positions"], one.positions, atol=5.1e-6)
    np.testing.assert_allclose(data["cells"], one.cells, atol=5.1e-6)
    for name in ("energies", "fmax", "times"):
        np.testing.assert_array_equal(data[name], getattr(one, name))
    moved = np.linalg.norm(one.positions - one.positions[:1], axis=-1)[:, 1:]
    np.testing.assert_allclose(data["largest"], moved.max(1))
    np.testing.assert_allclose(data["moved"], one.positions - one.positions[:1], atol=5.1e-6)
    assert data["symbols"] == ["Cu", "O", "Au", "Cu"]
    assert data["fixed"] == one.fixed_mask.tolist() and data["pbc"] == one.pbc.tolist()
    assert list(data["elements"]) == ["O", "Cu", "Au"]
    for symbol, z in (("O", 8), ("Cu", 29), ("Au", 79)):
        colour = data["elements"][symbol]["colour"]
        rgb = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        np.testing.assert_allclose(rgb, jmol_colors[z], atol=1 / 400)
        assert data["elements"][symbol]["radius"] == pytest.approx(covalent_radii[z])


def test_strain_is_no_displacement():
    """Atoms that keep their places in a cell that relaxes do not move, wherever its origin is."""
    growth = np.array([1.0, 1.02, 1.05])[:, None, None]
    cells = np.diag([5.0, 6.0, 7.0]) * growth
    places = np.stack([path().positions[0] + 2.0] * 3)
    places[2, 1] += [0.3, 0.0, 0.4]
    data = viewer_data(path(positions=places * growth, cells=cells))
    expected = np.zeros((3, 4, 3))
    expected[2, 1] = [0.3, 0.0, 0.4]
    np.testing.assert_allclose(data["moved"], expected, atol=1e-9)
    np.testing.assert_allclose(data["largest"], [0, 0, 0.5], atol=1e-9)
    curves = path_curves(path(positions=places * growth, cells=cells))
    np.testing.assert_allclose(curves["mean"], [0, 0, 0.5 / 3], atol=1e-9)
    still = path_curves(path())  # cells that stay give exactly what they gave
    moved = np.linalg.norm(path().positions - path().positions[:1], axis=-1)[:, 1:]
    np.testing.assert_array_equal(still["largest"], moved.max(1))


# What a browser has and the script asks for; `ran` is set once the page has drawn itself.
BROWSER = """
const fs = require("fs");
const page = fs.readFileSync(process.argv[2], "utf8");
const data = /<script type="application\\/json" id="data">(.*?)<\\/script>/s.exec(page)[1];
const script = /<script>(.*)<\\/script>/s.exec(page)[1];
const spots = [], fake = () => new Proxy(function () {}, {
  get: (t, k) => k in t ? t[k] : k === Symbol.toPrimitive ? () => 100 : (t[k] = fake()),
  set: (t, k, v) => (t[k] = v, true),
  apply: () => fake(),
});
const elements = {};
const element = (id) => elements[id] = elements[id] || Object.assign(fake(), {
  checked: id === "arrows", clientWidth: 300, clientHeight: 200, width: 300, height: 200,
  textContent: id === "data" ? data : "", style: {}, handlers: {},
  addEventListener: (name, f) => { element(id).handlers[name] = f; },
  getBoundingClientRect: () => ({ left: 0, top: 0, width: 300 }),
});
const documentElement = fake();
global.document = { getElementById: element, createElement: () => fake(), documentElement,
  addEventListener: () => {} };
global.getComputedStyle = () => ({ getPropertyValue: () => "#808080" });
global.window = { devicePixelRatio: 1, addEventListener: () => {},
  matchMedia: () => ({ matches: true, addEventListener: () => {} }) };
global.location = { hash: "#frame=2" };
global.Option = function () {};
global.requestAnimationFrame = (f) => f();
new Function(script)();
for (let x = 0; x < 300; x += 2) for (let y = 0; y < 200; y += 2) {
  element("view").handlers.pointermove({ pointerId: 1, clientX: x, clientY: y });
  if (element("tip").style.display === "block") spots.push(element("tip").textContent);
}
console.log(JSON.stringify({ read: element("readout").textContent, tips: [...new Set(spots)],
  factor: element("factor").textContent }));
"""


def run_page(tmp_path, one):
    """What the page's script says of a path in its last frame, without a browser."""
    write_viewer(one, tmp_path / "a.html")
    (tmp_path / "run.js").write_text(BROWSER)
    command = [NODE, tmp_path / "run.js", tmp_path / "a.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(NODE is None, reason="no Node.js to run the page's script with")
def test_script_tells_displacements_within_the_cell(tmp_path):
    growth = np.array([1.0, 1.1, 1.2])[:, None, None]
    places = np.stack([path().positions[0] + 2.0] * 3)
    places[2, 1] += [0.03, 0.0, 0.04]
    one = path(positions=places * growth, cells=np.diag([5.0, 6.0, 7.0]) * growth)
    found = run_page(tmp_path, one)
    assert found["read"] == "frame 2 of 2, t = 1.00"
    told = dict(tip.split(": ") for tip in found["tips"])
    assert told["O 1"] == "moved 0.050 Å" and told["Au 2"] == "moved 0.000 Å"
    assert told["Cu 0"] == "held fixed"
    assert found["factor"] == "(× 20)"  # of 0.05 Å


@pytest.mark.skipif(NODE is None, reason="no Node.js to run the page's script with")
def test_script_takes_many_atoms(tmp_path):
    """More points than a function takes arguments."""
    write_viewer(path(), tmp_path / "a.html")
    script = Page((tmp_path / "a.html").read_text(encoding="utf-8")).texts["script"]
    own = script[script.index("const largest =") : script.index("const dist =")]
    assert not re.search(r"Math\.(max|min)\(\.\.\.(points|D\.)", script)
    code = own + "console.log(largest(new Array(300000).fill(3)), largest([]));"
    done = subprocess.run([NODE, "-e", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "-Infinity"]


def test_page_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "a.html").mkdir()
    with pytest.raises(InputError, match=r"a\.html"):
        write_viewer(path(), tmp_path / "a.html")
    broken = path(energies=np.array([-1.0, np.nan, -2.0]))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_viewer(broken, tmp_path / "b.html")
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cells": np.zeros((3, 3, 3)), "pbc": np.zeros(3, bool), "fixed_mask": np.zeros(4, bool)},
        {"positions": np.repeat(path().positions[:1], 3, 0)},
    ],
    ids=("slab", "molecule", "at rest"),
)
def test_page_runs_in_a_browser(tmp_path, changes):
    """Its script comes to the end: it writes the frame after it has drawn it."""
    file = tmp_path / "a.html"
    write_viewer(path(**changes), file)
    options = (*OFFLINE, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000")
    for _ in range(4):  # a starved browser may dump the page before its first animation frame
        done = subprocess.run(
            [CHROMIUM, *options, "--dump-dom", f"file://{file}#frame=2"],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        if "frame 2 of 2" in done.stdout:
            break
    assert "frame 2 of 2, t = 1.00" in done.stdout
    assert "Cu (2)" in done.stdout and "Au (1)" in done.stdout
    assert ("held fixed (1)" in done.stdout) == ("pbc" not in changes)
    assert ("2 × 2 × 1" in done.stdout) == ("pbc" not in changes)
