"""The README keeps its promises: its Python runs, its commands parse, its table is complete."""

import dataclasses
import re
import shlex
from pathlib import Path

import jax
import pytest

from relaxnet_jax.cli import build_parser
from relaxnet_jax.config import Config, load_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """The fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def commands():
    """The argument lists of all ``relaxnet-jax`` commands."""
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("relaxnet-jax ")]


@pytest.fixture
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, quick_compilation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "path.extxyz").is_file()


def test_there_are_commands():
    assert {"train", "eval", "predict", "relax", "demo", "data"} <= {argv[0] for argv in commands()}


@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_commands_parse(argv):
    args = build_parser().parse_args(argv)
    if args.run == "train" and args.config:
        load_config(args.config, args.set)


def test_scripts_exist():
    for name in re.findall(r"^(bin/\w+)", "\n".join(blocks("bash")), re.M):
        assert (ROOT / name).is_file()


def test_config_table_has_every_field_and_default():
    documented = {}
    for cell, defaults in re.findall(r"^\| (`.*?) \| (.*?) \|", TEXT, re.M):
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
