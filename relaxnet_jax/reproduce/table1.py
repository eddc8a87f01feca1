"""Table 1: the encoder alone as a direct predictor of the final frame, by data, layers and kind."""

from __future__ import annotations

import itertools

from relaxnet_jax.reproduce import charts, convergence, paper
from relaxnet_jax.reproduce.convergence import convergence_seconds
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.formats import number
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.methods import seeds
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.scores import Score, errors, numbers
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.verdict import Claim, Outcome, all_of, decided, lower

SHARES = (0.2, 0.4, 1.0)  # of the training split, as the paper's 1,000 : 2,000 : 5,000
LAYERS = (2, 4)
KINDS = {"dtnn": "RelaxNet (DTNN)", "egnn": "EGNN"}
Case = tuple[str, float, int]
CASES: tuple[Case, ...] = tuple((k, s, n) for k in KINDS for s in SHARES for n in LAYERS)


def case_runs(setting: Setting, kind: str, share: float, layers: int) -> list[Run]:
    """The runs of a case; a case equal to the shipped config shares that config's runs."""
    model = setting.config("static_final").model
    changes = {"model__architecture": kind, "model__layers": layers}
    plain = kind == model.architecture and layers == model.layers
    label = "" if plain else f"{KINDS[kind].split()[0]}, {layers} layers"
    if share < 1:
        label = f"{label}, {share:.0%} of data".lstrip(", ")
    return seeds(setting, "static_final", label=label, share=share, **changes)


def runs(setting: Setting) -> list[Run]:
    """Every case with every seed."""
    return [run for case in CASES for run in case_runs(setting, *case)]


def section(lab: Lab) -> Section:
    """The table, its figure and its claims."""
    setting = lab.setting
    found = {case: case_runs(setting, *case) for case in CASES}
    compared = {case: [lab.paths(run).comparisons for run in found[case]] for case in CASES}
    energy = {case: errors(compared[case], "energy_mae") for case in CASES}
    per_atom = {case: errors(compared[case], "energy_mae_per_atom") for case in CASES}
    places = {case: errors(compared[case], "positions_mae") for case in CASES}
    first = compared["dtnn", 1.0, 2][:1]  # small shares may lack elements of the test split
    nothing = [
        errors(first, m, predictor="nothing")
        for m in ("energy_mae", "energy_mae_per_atom", "positions_mae")
    ]
    seconds = {case: numbers([lab.epoch_seconds(r) for r in found[case]]) for case in CASES}
    walls = {case: _walls(lab, found[case]) for case in CASES}
    memory = {case: lab.memory(found[case][0]) / 2**20 for case in CASES}
    rows: list[list[Cell]] = []
    for case in CASES:
        kind, share, layers = case
        theirs = paper.TABLE1[kind, paper.TABLE1_SIZES[SHARES.index(share)]]
        which = LAYERS.index(layers)
        rows.append(
            [
                KINDS[kind],
                layers,
                found[case][0].relaxations,
                paper.TABLE1_SIZES[SHARES.index(share)],
                energy[case],
                theirs[0][which],
                per_atom[case],
                places[case],
                seconds[case],
                60 * theirs[1][which],
                *walls[case],
                " / ".join(number(s) for s in theirs[2]) if layers == 2 else None,
                numbers([len(lab.epochs(r)) for r in found[case]]),
                memory[case],
                paper.TABLE1_MEMORY[kind] if layers == 2 else None,
            ]
        )
    rows.append(["doing nothing", *[None] * 3, nothing[0], None, *nothing[1:], *[None] * 9])
    path = setting.out / "table1.png"
    _draw(setting, found, per_atom, seconds, nothing[1], path)
    return Section(
        "table1",
        "Table 1: the encoder alone, predicting the final frame",
        "One pass of the encoder over the initial structure gives the energy and the positions of "
        "the final one, without an ODE. The training splits are nested, in the paper's ratio "
        f"1 : 2 : 5; validation and test splits are the same for all. {convergence.RULE}.",
        [Table("Final frame of the test split", COLUMNS, rows)],
        _claims(lab, found, energy, seconds, walls, memory),
        [(path, "energy error and time by size of the training split")],
        [
            "Memory is the peak of the compiled training step of the largest batch (arguments, "
            "results, temporaries, as XLA reports them). The paper does not say how it measured its own.",
        ],
    )


COLUMNS = (
    "model",
    "layers",
    "training relaxations",
    "paper: structures",
    "energy MAE (eV)",
    "paper: energy MAE (eV)",
    "energy MAE (meV/atom)",
    "coordinate MAE (Å)",
    "time/epoch (s)",
    "paper: time/epoch (s)",
    *(f"{level:.0%} convergence (s)" for level in convergence.LEVELS),
    "paper: 85 / 95 / 99 % (s)",
    "epochs",
    "memory (MiB)",
    "paper: memory (MB)",
)


def _walls(lab: Lab, found: list[Run]) -> list[Score]:
    by_seed = [convergence_seconds(lab.epochs(run)) for run in found]
    return [numbers([times[k] for times in by_seed]) for k in range(len(convergence.LEVELS))]


def _claims(
    lab: Lab,
    found: dict[Case, list[Run]],
    energy: dict[Case, Score],
    seconds: dict[Case, Score],
    walls: dict[Case, list[Score]],
    memory: dict[Case, float],
) -> list[Claim]:
    def name(case: Case) -> str:
        return f"{KINDS[case[0]]} {case[2]} layers {case[1]:.0%}"

    def each(a: tuple, b: tuple, scores: dict[Case, Score], unit: str):
        """Whether a is lower than b at every size, each given as (kind, layers)."""
        pairs = [((a[0], s, a[1]), (b[0], s, b[1])) for s in SHARES]
        return all_of([lower(scores[x], scores[y], (name(x), name(y)), unit) for x, y in pairs])

    two = ("dtnn", 2)
    sizes = [(("dtnn", big, 2), ("dtnn", small, 2)) for small, big in itertools.pairwise(SHARES)]
    more = [lower(energy[x], energy[y], (name(x), name(y)), "eV") for x, y in sizes]
    shortest = min(lab.facts(run)["minutes"] for s in SHARES for run in found["dtnn", s, 2])
    quick = {s: walls["dtnn", s, 2][0] for s in SHARES}
    ratios = [memory["dtnn", s, 2] / memory["egnn", s, 2] for s in SHARES]
    return [
        Claim("more structures, better energies (2 DTNN layers)", all_of(more)),
        Claim("4 DTNN layers are worse than 2", each(two, ("dtnn", 4), energy, "eV")),
        Claim(
            "DTNN layers are better than EGNN layers at all sizes (2 layers)",
            each(two, ("egnn", 2), energy, "eV"),
        ),
        Claim("EGNN layers take less time per epoch", each(("egnn", 2), two, seconds, "s")),
        Claim(
            f"85 % convergence comes within {paper.TABLE1_85_PERCENT} min at all sizes",
            quickly(quick, shortest, len(lab.setting.seeds)),
            f"inconclusive if the runs were too short for it to fail, i.e. took less than "
            f"{paper.TABLE1_85_PERCENT} min, or if one did not converge at all",
        ),
        Claim(
            "memory of DTNN and EGNN layers is comparable (the paper: 1.35 times)",
            decided(
                max(ratios) <= 1.5,
                f"DTNN takes {min(ratios):.2f} to {max(ratios):.2f} times as much",
            ),
            "at most 1.5 times at every size",
        ),
    ]


def quickly(walls: dict[float, Score], shortest: float, seeds: int) -> Outcome:
    """Whether convergence times are within the paper's.

    Args:
      walls: times in s, by share of the data.
      shortest: minutes of the shortest run.
      seeds: number of seeds trained.
    """
    minutes = {share: s.mean / 60 for share, s in walls.items()}
    shown = ", ".join(f"{share:.0%}: {number(m)} min" for share, m in minutes.items())
    text = f"{shown}; the shortest run took {shortest:.1f} min"
    if any(m > paper.TABLE1_85_PERCENT for m in minutes.values()):
        return decided(False, text, seeds)
    known = all(s.seeds == seeds for s in walls.values())
    holds = True if known and shortest > paper.TABLE1_85_PERCENT else None
    return decided(holds, text, seeds)


def _draw(setting, found, per_atom, seconds, nothing, path) -> None:
    curves = {
        f"{KINDS[kind]}, {layers} layers": (
            [found[kind, s, layers][0].relaxations for s in SHARES],
            [(kind, s, layers) for s in SHARES],
        )
        for kind in KINDS
        for layers in LAYERS
    }
    panels = {
        "energy MAE (meV/atom)": {
            k: (x, [per_atom[c] for c in cs]) for k, (x, cs) in curves.items()
        },
        "time per epoch (s)": {k: (x, [seconds[c] for c in cs]) for k, (x, cs) in curves.items()},
    }
    caption = (
        f"Direct prediction of the final frame, test split of {setting.name}; doing nothing: "
        f"{nothing.mean:.3g} meV/atom."
    )
    charts.lines(panels, path, caption, "training relaxations", xlog=True)


EXPERIMENT = Experiment("table1", runs, section)
