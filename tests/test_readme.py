"""README and docs keep their promises: their Python runs, their commands parse, the table of the
configuration is complete, and the site builds."""

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from relaxnet_jax.cli import build_parser
from relaxnet_jax.config import Config, load_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language, page):
    """The fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def commands():
    """The argument lists of all ``relaxnet-jax`` commands, once each."""
    lines = [
        line.split("#")[0]
        for page in PAGES
        for block in blocks("bash", page)
        for line in block.splitlines()
    ]
    kept = [line.strip() for line in lines if line.startswith("relaxnet-jax ")]
    return [shlex.split(line)[1:] for line in dict.fromkeys(kept)]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks("python", p)], ids=lambda page: page.name
)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    """Those of a page one after the other, as they are read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RELAXNET_JAX_CACHE", str(tmp_path / "cache"))
    names = {"__name__": "page"}
    for code in blocks("python", page):
        exec(compile(code, page.name, "exec"), names)
    assert names.keys() - {"__name__", "__builtins__"} and capsys.readouterr().out
    made = {"pretrained.md": "f_elements.extxyz"}.get(page.name, "path.extxyz")
    assert list(tmp_path.glob("*.h5")) or (tmp_path / made).is_file()


def test_there_are_commands():
    assert {"train", "eval", "predict", "relax", "demo", "data"} <= {argv[0] for argv in commands()}


@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_commands_parse(argv):
    args = build_parser().parse_args(argv)
    if args.run == "train" and args.config:
        load_config(args.config, args.set)


def test_scripts_exist():
    for page in PAGES:
        for name in re.findall(r"\b(bin/\w+)", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists() or (ROOT / f"{name}.sh").exists(), (page.name, name)


def test_every_config_is_listed():
    rows = re.findall(r"^\| (`\w+\.py`.*?) \|", TEXT, re.M)
    listed = [name for row in rows for name in re.findall(r"`(\w+\.py)`", row)]
    assert sorted(listed) == sorted(file.name for file in (ROOT / "configs").glob("*.py"))


def test_config_table_has_every_field_and_default():
    documented = {}
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    for cell, defaults in re.findall(r"^\| (`\w+\.(?!py`).*?) \| (.*?) \|", text, re.M):
        section, _, names = cell.replace("`", "").partition(".")
        values = defaults.strip()
        names = names.split(", ")
        parts = [values] if len(names) == 1 else re.split(r", (?![^(]*\))", values)
        documented |= {f"{section}.{n}": p.strip("`") for n, p in zip(names, parts, strict=True)}
    actual = {}
    for section in dataclasses.fields(Config):
        values = getattr(Config(), section.name)
        if dataclasses.is_dataclass(values):
            for field in dataclasses.fields(values):
                actual[f"{section.name}.{field.name}"] = getattr(values, field.name)
    assert set(documented) == set(actual)
    for name, text in documented.items():
        assert eval(text, {}) == actual[name], name


def test_links_of_the_readme_lead_somewhere():
    found = re.findall(r"\]\((?!https?:)([^)#]+)", TEXT)
    assert {"docs/vasp.md", "docs/python.md", "docs/physics.md", "docs/benchmarks.md"} <= set(found)
    for target in found:
        assert (ROOT / target).is_file(), target


def test_the_site_builds(tmp_path):
    """Strictly: no link, page, snippet or documented name may be missing."""
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        if not importlib.util.find_spec(name.partition(".")[0]):
            pytest.skip(f"{name} is not installed (pip install '.[docs]')")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "s")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "s" / "python" / "index.html").read_text(encoding="utf-8")
    assert all(f'id="relaxnet_jax.{name}"' in page for name in ("relax", "head_start", "train"))
    assert "graph.cutoff" in (tmp_path / "s/configuration/index.html").read_text(encoding="utf-8")
