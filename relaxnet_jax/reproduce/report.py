"""Writes the pages of the experiments, and the report made of them."""

from __future__ import annotations

import csv
import json
import traceback
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.markdown import Markdown

from relaxnet_jax.console import note, result_console, say
from relaxnet_jax.data.files import atomic_path, one_line
from relaxnet_jax.errors import InputError
from relaxnet_jax.reproduce import paper
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.plan import Plan
from relaxnet_jax.reproduce.runs import Run, folder_of, read_facts
from relaxnet_jax.reproduce.section import SEEDS, VERDICTS, Section, Table, claims_table
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.training import StoppedError, train_all
from relaxnet_jax.reproduce.verdict import FAILS, HOLDS, OPEN
from relaxnet_jax.train.start import SEEN

REPORT = "REPORT.md"
SHOWN = 5  # at most so many reasons for leaving structures out are listed
WHOSE = {False: "the paper", True: "this package"}
_COUNTED = {HOLDS: "hold", FAILS: "do not hold", OPEN: "are inconclusive"}
FEW = 10  # epochs with the ODE below which an implicit run is undertrained
RUN_COLUMNS = (
    *("run", "name", "training relaxations", "minutes", "time limit (min)", "epochs"),
    *("ended by", "ended", "machine", "code"),
)


def write_section(experiment: Experiment, setting: Setting, plan: Plan, command: str) -> bool:
    """Trains the runs an experiment lacks and writes its page; False if that cannot be done.

    The reason is reported. An unexpected error, such as a device that is out of memory, is reported
    with its traceback rather than raised, so that it does not cost the hours of other experiments.

    Raises:
      StoppedError: see `training`.
    """
    try:
        runs = experiment.runs(setting)
        wanted = {run.digest for run in runs}
        entries = [e for e in plan.left if e.run.digest in wanted]
        setting.write_shares((e.run for e in entries), note)
        train_all(entries, setting.out, note)
        lab = Lab(setting, note)
        made = experiment.section(lab)
    except StoppedError:
        raise
    except Exception as error:
        if not isinstance(error, InputError):
            note(traceback.format_exc())
            error = InputError(f"{type(error).__name__}: {one_line(error)}")
        note(f"{experiment.name}: failed: {error}")
        page = setting.out / f"{experiment.name}.md"
        with atomic_path(page) as temporary:
            text = f"## {experiment.name}\n\nCould not be done: {error}\n"
            temporary.write_text(text, encoding="utf-8")
        (setting.out / f"{experiment.name}.json").unlink(missing_ok=True)  # from an earlier attempt
        return False
    lines = provenance(setting, runs, command, made.spread, lab.machines)
    if lab.left_out:
        lines.append(f"Test structures left out by some models: {_first(lab.left_out)}")
    jax.clear_caches()  # compiled programs of predictions that are stored now
    files = made.write(setting.out, lines)
    if runs:
        files.append(_write_runs(setting, runs))
    _keep_claims(made, setting)
    claims = Markdown(claims_table(made.claims).markdown() if made.claims else made.title)
    result_console().print(claims)
    for file in files:
        say(str(file))
    return True


def provenance(
    setting: Setting,
    runs: Sequence[Run],
    command: str,
    spread: str,
    predicted_on: Sequence[dict[str, Any]],
) -> list[str]:
    """Lines on the data, the machines and the command behind the results.

    Args:
      setting: the report's.
      runs: the runs of the experiment.
      command: the command line.
      spread: see `Section`.
      predicted_on: machines, see `benchmark.machine.describe`.
    """
    dataset = setting.dataset
    sizes = {name: len(rows) for name, rows in dataset.splits.items()}
    lines = [
        f"Data: {setting.name} ({setting.checksum[:12]}), {len(dataset.trajectories)} relaxations: "
        + (_split(sizes) if spread == SEEDS else f"{setting.folds} folds, each tested once")
        + (f"; left out: {dataset.left_out}" if dataset.left_out else ""),
        f"Command: `{command}`",
    ]
    if runs:
        used = dict.fromkeys(str(run.config.train.seed) for run in runs)
        lines.append(f"Seeds: {', '.join(used)}. Means ± standard deviation over {spread}.")
    facts = [read_facts(folder_of(setting.out, run)) for run in runs]
    machines = dict.fromkeys(_machine(f["machine"]) for f in facts)
    lines += [f"Trained on: {name}" for name in machines]
    loads: dict[str, list[float]] = {}
    for m in predicted_on:
        loads.setdefault(_machine(m), []).append(m["load_average"])
    lines += [f"Predicted on: {k}, load {min(v):g} to {max(v):g}" for k, v in loads.items()]
    if runs:
        minutes, epochs = ([f[name] for f in facts] for name in ("minutes", "epochs"))
        lines.append(
            f"Runs: {len({r.digest for r in runs})}, of {min(minutes):.1f} to {max(minutes):.1f} min and "
            f"{min(epochs)} to {max(epochs)} epochs; all in runs.csv"
        )
        lines += _versions(facts) + _uneven(runs, facts) + _static_only(runs, facts)
        lines += _begun(setting, runs)
    return lines


def _begun(setting: Setting, runs: Sequence[Run]) -> list[str]:
    """Lines on the models that runs started from, and how much of the test split these had seen."""
    starts: dict[str, int] = {}
    for run in runs:
        start = run.config.train.start_from
        if start:
            facts = json.loads((folder_of(setting.out, run) / "model/model.json").read_text())
            seen = facts["statistics"].get(SEEN, {}).get("test", 0)
            starts[start] = max(seen, starts.get(start, 0))
    return [
        f"Initialised from the parameters of {start} (train.start_from)"
        + (f", which was trained on {n} of the test relaxations: these structures are not unseen"
           if n else "")
        for start, n in starts.items()
    ]  # fmt: skip


def _first(reasons: Collection[str]) -> str:
    """The first few reasons: thousands of structures of a large set may be left out."""
    more = [f"… and {len(reasons) - SHOWN} more"] if len(reasons) > SHOWN else []
    return "; ".join([*sorted(reasons)[:SHOWN], *more])


def _split(sizes: dict[str, int]) -> str:
    counts = ", ".join(f"{n} {name}" for name, n in sizes.items())
    return f"{counts} (n = {sizes['test']} structures tested)"


def _write_runs(setting: Setting, runs: Sequence[Run]) -> Path:
    """Writes runs.csv: the facts of these runs, and of those of other experiments already in it."""
    path, rows = setting.out / "runs.csv", {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            before = list(csv.reader(file))[1:]
        rows = {row[0]: row + [""] * (len(RUN_COLUMNS) - len(row)) for row in before}
    for run in runs:
        f = read_facts(folder_of(setting.out, run))
        cells = [f["minutes"], f["limit"], f["epochs"], f["reason"], f["ended"]]
        machine = f"{_machine(f['machine'])}, load {f['machine']['load_average']}"
        named = run.digest, run.name, str(run.relaxations)
        rows[run.digest] = [*named, *map(str, cells), machine, f.get("code", "")]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([RUN_COLUMNS, *rows.values()])
    return path


def _machine(m: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items() if k in ("python", "jax"))
    cores = f"{m['cores']} core" + ("s" if m["cores"] != 1 else "")
    return f"{m['device']} ({m['platform']}), {cores}, {versions}"


def _uneven(runs: Sequence[Run], facts: Sequence[dict[str, Any]]) -> list[str]:
    """A line if the compared runs were not given time in proportion to their weights."""
    rates = [f["limit"] / r.weight for r, f in zip(runs, facts)]
    if max(rates) <= 1.5 * min(rates):
        return []
    return [
        f"Different commands gave the runs {min(rates):.2f} to {max(rates):.2f} minutes for a weight of 1, "
        "so comparisons between them are uneven; another --out trains all of them anew"
    ]


def _versions(facts: Sequence[dict[str, Any]]) -> list[str]:
    """A line if the compared runs were trained by different code; early runs do not record it."""
    if len({f.get("code", "") for f in facts}) < 2:
        return []
    return [
        "The runs were trained by different versions of this package or of the packages it traces with "
        "(column code of runs.csv); another --out trains all of them anew"
    ]


def _static_only(runs: Sequence[Run], facts: Sequence[dict[str, Any]]) -> list[str]:
    """Lines on runs whose time ended before their first epoch with the ODE, or soon after it."""
    solved = {
        r.digest: (r.name, f["epochs"] - r.config.train.static_epochs)
        for r, f in zip(runs, facts)
        if r.config.train.static_epochs
    }
    never = [name for name, epochs in solved.values() if epochs <= 0]
    few = [epochs for _, epochs in solved.values() if 0 < epochs < FEW]
    lines = []
    if never:
        lines.append(
            f"Trained only in their static first epochs, never on a path: {'; '.join(never)}. "
            "They need more time, or fewer train.static_epochs"
        )
    if few:
        span = f"{min(few)}" if min(few) == max(few) else f"{min(few)} to {max(few)}"
        lines.append(
            f"{len(few)} of {len(solved)} implicit runs were trained on paths for only {span} epoch(s) after "
            "their static first ones: the implicit scheme is undertrained here"
        )
    return lines


def _keep_claims(made: Section, setting: Setting) -> None:
    """Stores the verdicts as JSON for the report's summary."""
    claims = [
        {"claim": c.text, "verdict": c.outcome.verdict, "because": c.outcome.reason, "ours": c.ours}
        for c in made.claims
    ]
    kept = {"title": made.title, "data": setting.checksum, "claims": claims}
    with atomic_path(setting.out / f"{made.name}.json") as temporary:
        temporary.write_text(json.dumps(kept, indent=1, ensure_ascii=False), encoding="utf-8")


def _count(whose: str, rows: Sequence[Sequence[str]]) -> str:
    """A sentence on how many claims came to each verdict; empty if there are none.

    Args:
      whose: who makes the claims, a value of `WHOSE`.
      rows: (experiment, claim, whose, verdict) of every claim.
    """
    found = [verdict for _, _, owner, verdict in rows if owner == whose]
    each = ", ".join(f"{found.count(v)} {_COUNTED[v]}" for v in _COUNTED)
    return f"Of {len(found)} claims of {whose}: {each}." if found else ""


def write_report(setting: Setting, names: Iterable[str], command: str) -> Path:
    """Writes REPORT.md: a summary of the verdicts, then every page.

    It includes all existing pages on these data, whether from this command or earlier ones.
    """
    rows: list[list[str]] = []
    pages, others = [], []
    for name in names:
        page, verdicts = setting.out / f"{name}.md", setting.out / f"{name}.json"
        kept: dict[str, Any] = {"claims": []}
        if verdicts.is_file():
            kept = json.loads(verdicts.read_text(encoding="utf-8"))
        if kept.get("data", setting.checksum) != setting.checksum:
            others.append(name)
            continue
        if page.is_file():
            pages.append(page.read_text(encoding="utf-8").replace(f"{VERDICTS}\n\n", ""))
        for claim in kept["claims"]:
            rows.append([name, claim["claim"], WHOSE[claim["ours"]], claim["verdict"]])
    summary = Table("", ("experiment", "claim", "made by", "verdict"), rows).markdown()
    head = [
        f"# {paper.NAME}: which claims hold on {setting.name}",
        f"Last command: `{command}`. Every section names its own.",
        "The paper used JARVIS-DFT and two V100 GPUs. On other data and machines, compare trends with its "
        "figures, not sizes.",
        *[line for whose in WHOSE.values() if (line := _count(whose, rows))],
        VERDICTS,
        summary,
        *([f"Left out, as they are of other data: {', '.join(others)}."] if others else []),
    ]
    path = setting.out / REPORT
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join([*head, *pages]), encoding="utf-8")
    return path
