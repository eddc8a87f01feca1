"""Table 2: implicit and explicit latent evolution, by frames and structures."""

from __future__ import annotations

from relaxnet_jax.reproduce import charts, paper
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.formats import percent_change
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.methods import seeds
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.scores import Score, errors, numbers, relative
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.table1 import case_runs as direct_runs
from relaxnet_jax.reproduce.unlike import unlike
from relaxnet_jax.reproduce.verdict import Claim, Outcome, all_of, lower

SCHEMES = ("implicit", "explicit")
# (frames, share of the training split); the shares stand for the paper's 5,000, 2,000 and 1,000.
CASES = ((3, 1.0), (5, 1.0), (10, 1.0), (5, 0.4), (10, 0.2))
DENSE = 10  # frames on which models with any number of frames are compared
STRUCTURES = {1.0: 5000, 0.4: 2000, 0.2: 1000}
Case = tuple[str, int, float]
ALL: tuple[Case, ...] = tuple((scheme, *case) for scheme in SCHEMES for case in CASES)


def case_runs(setting: Setting, scheme: str, frames: int, share: float) -> list[Run]:
    """The runs of a case; five frames and all relaxations are the shipped configs."""
    label = f"{frames} frames" if frames != setting.config(scheme).dynamics.frames else ""
    if share < 1:
        label = f"{label}, {share:.0%} of data".lstrip(", ")
    return seeds(setting, scheme, label=label, share=share, dynamics__frames=frames)


def runs(setting: Setting) -> list[Run]:
    """Every case with every seed, and the direct predictors trained on the same shares."""
    own = [run for case in ALL for run in case_runs(setting, *case)]
    return own + [run for share in STRUCTURES for run in _static(setting, share)]


def _static(setting: Setting, share: float) -> list[Run]:
    """The direct predictors of table 1; none if they cannot be trained."""
    return [] if setting.why_not("static_final") else direct_runs(setting, "dtnn", share, 2)


def section(lab: Lab) -> Section:
    """The table, its figure and its claims."""
    setting = lab.setting
    found = {case: case_runs(setting, *case) for case in ALL}
    compared = {case: [lab.paths(run).comparisons for run in found[case]] for case in ALL}

    def both(metric: str) -> dict[str, dict[Case, Score]]:
        return {
            "final": {case: errors(compared[case], metric, "final") for case in ALL},
            "all": {case: errors(compared[case], metric, "all") for case in ALL},
        }

    energy, per_atom, forces = (
        both(m) for m in ("energy_mae", "energy_mae_per_atom", "forces_mae")
    )
    places = {case: errors(compared[case], "positions_mae") for case in ALL}
    seconds = {case: numbers([lab.epoch_seconds(r) for r in found[case]]) for case in ALL}
    static = {share: _static(setting, share) for share in STRUCTURES}
    base = {
        share: (
            errors([lab.paths(r).comparisons for r in wanted], "energy_mae"),
            numbers([lab.epoch_seconds(r) for r in wanted]),
        )
        for share, wanted in static.items()
    }
    rows: list[list[Cell]] = []
    for case in ALL:
        scheme, frames, share = case
        theirs = paper.TABLE2[scheme, frames, STRUCTURES[share]]
        count = found[case][0].relaxations
        other = ("implicit", frames, share)
        rows.append(
            [
                scheme,
                frames,
                count,
                energy["final"][case],
                energy["all"][case],
                f"{theirs[0]} / {theirs[1]}",
                per_atom["final"][case],
                per_atom["all"][case],
                forces["final"][case],
                forces["all"][case],
                f"{theirs[2]} / {theirs[3]}",
                places[case],
                seconds[case],
                60 * theirs[4],
                _change(energy["final"][case], base[share][0]),
                _change(seconds[case], base[share][1]),
                _change(energy["all"][case], energy["all"][other])
                if scheme == "explicit"
                else None,
                _change(seconds[case], seconds[other]) if scheme == "explicit" else None,
                numbers([len(lab.epochs(r)) for r in found[case]]),
            ]
        )
    for frames in (3, 5, 10):
        rows.append(_nothing(frames, compared["explicit", frames, 1.0][:1]))
    path = setting.out / "table2.png"
    _draw(setting, energy["all"], forces["all"], seconds, path)
    return Section(
        "table2",
        "Table 2: implicit and explicit latent evolution by frames and structures",
        "Energy and force errors of the final frame and of all frames, on n equidistant frames. The paper "
        "drops relaxations with fewer than n frames. Here they stay, with the frames they have, so "
        "that all rows share their validation and test splits. Changes are given relative to the direct predictor of "
        "table 1 (2 DTNN layers, same relaxations) and, for the explicit scheme, relative to the implicit one.",
        [Table("Test split", COLUMNS, rows)],
        _claims(energy, forces, seconds, {c: base[c[2]][0] for c in ALL}, _dense(lab, found)),
        [(path, "errors and time by number of frames")],
        [
            "The time per epoch of the implicit scheme is that of epochs with the ODE; its static first epochs "
            "are faster. A dash means that training ended within these.",
            "Errors of all frames are averaged over each model's own frames, as in the paper. With few frames the "
            "final one, whose forces are easy to predict, counts for more. Our own claims about numbers of frames "
            f"are therefore tested on {DENSE} frames for all models.",
            *unlike(setting, ("implicit", "static_final")),
        ],
    )


COLUMNS = (
    "latent",
    "frames",
    "training relaxations",
    "energy MAE, final (eV)",
    "energy MAE, all (eV)",
    "paper: final / all (eV)",
    "final (meV/atom)",
    "all (meV/atom)",
    "force MAE, final (meV/Å)",
    "force MAE, all (meV/Å)",
    "paper: final / all (meV/Å)",
    "final coordinate MAE (Å)",
    "time/epoch (s)",
    "paper: time/epoch (s)",
    "energy, change from direct",
    "time, change from direct",
    "energy, change from implicit",
    "time, change from implicit",
    "epochs",
)


def _change(new: Score, old: Score) -> str:
    """Change in percent, over the structures that both have."""
    return percent_change(relative(new, old).mean)


def _nothing(frames: int, compared) -> list[Cell]:
    def error(metric: str, which) -> Score:
        return errors(compared, metric, which, "nothing")

    cells: list[Cell] = ["doing nothing", frames, None]
    cells += [error("energy_mae", "final"), error("energy_mae", "all"), None]
    cells += [error("energy_mae_per_atom", "final"), error("energy_mae_per_atom", "all")]
    cells += [error("forces_mae", "final"), error("forces_mae", "all"), None]
    return [*cells, error("positions_mae", "final"), *[None] * 7]


def _dense(lab: Lab, found: dict[Case, list[Run]]) -> tuple[dict[Case, Score], dict[Case, Score]]:
    """Energy (eV) and force errors (meV/Å) on `DENSE` frames, for the cases compared on these."""
    cases = [case for case in ALL if case[0] == "explicit" or case[2] < 1.0]
    made = {case: [lab.paths(run, DENSE).comparisons for run in found[case]] for case in cases}
    energy, forces = (
        {case: errors(compared, metric, "all") for case, compared in made.items()}
        for metric in ("energy_mae", "forces_mae")
    )
    return energy, forces


def _claims(energy, forces, seconds, direct: dict[Case, Score], dense) -> list[Claim]:
    def name(case: Case) -> str:
        return f"{case[0]} {case[1]} frames {case[2]:.0%}"

    def compare(scores: dict[Case, Score], pairs, unit: str, factor: float = 1.0) -> Outcome:
        """Whether a is lower than b in all pairs (a, b)."""
        names = [(name(a), name(b)) for a, b in pairs]
        both = [(scores[a], scores[b]) for a, b in pairs]
        return all_of([lower(*s, n, unit, factor) for s, n in zip(both, names)])

    schemes = [(("explicit", *case), ("implicit", *case)) for case in CASES]
    more = {
        s: [((s, 5, 1.0), (s, 3, 1.0)), ((s, 10, 1.0), (s, 5, 1.0))] for s in SCHEMES
    }  # (more frames, fewer frames)
    fewer = [(b, a) for a, b in more["implicit"]]
    same_total = [((s, 5, 0.4), (s, 10, 0.2)) for s in SCHEMES]
    instantaneous = [
        lower(energy["final"][c], direct[c], (name(c), "direct predictor"), "eV")
        for c in ALL
        if c[0] == "explicit"
    ]
    return [
        Claim(
            "explicit has lower final energy errors than instantaneous modelling",
            all_of(instantaneous),
            "lower than the direct predictor's, trained on the same relaxations",
        ),
        Claim(
            "explicit has lower energy errors than implicit (all frames)",
            compare(energy["all"], schemes, "eV"),
        ),
        Claim("explicit takes less time per epoch", compare(seconds, schemes, "s")),
        Claim(
            "explicit: more frames, lower energy errors",
            compare(energy["all"], more["explicit"], "eV"),
        ),
        Claim(
            "explicit: more frames, lower force errors",
            compare(forces["all"], more["explicit"], "meV/Å"),
        ),
        *(
            Claim(
                f"explicit: more frames, lower {what} errors on {DENSE} frames",
                compare(scores, more["explicit"], unit),
                ours=True,
            )
            for scores, what, unit in zip(dense, ("energy", "force"), ("eV", "meV/Å"))
        ),
        Claim("implicit: more frames, higher energy errors", compare(energy["all"], fewer, "eV")),
        Claim(
            "explicit takes less than a third of the time per epoch",
            compare(seconds, schemes, "s", 1 / 3),
            ours=True,
        ),
        Claim(
            "for the same total number of frames, more structures give lower force errors",
            compare(forces["all"], same_total, "meV/Å"),
        ),
        Claim(
            f"for the same total number of frames, more structures give lower force errors on {DENSE} frames",
            compare(dense[1], same_total, "meV/Å"),
            ours=True,
        ),
    ]


def _draw(setting, energy, forces, seconds, path) -> None:
    frames = [n for n, share in CASES if share == 1.0]

    def curves(scores):
        return {s: (frames, [scores[s, n, 1.0] for n in frames]) for s in SCHEMES}

    panels = {
        "energy MAE, all frames (eV)": curves(energy),
        "force MAE, all frames (meV/Å)": curves(forces),
        "time per epoch (s)": curves(seconds),
    }
    charts.lines(panels, path, f"Whole training split; test split of {setting.name}.", "frames")


EXPERIMENT = Experiment("table2", runs, section)
