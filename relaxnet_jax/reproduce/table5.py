"""Table 5: RelaxNet against MLIP + L-BFGS, and against the direct predictor and doing nothing."""

from __future__ import annotations

from relaxnet_jax.reproduce import paper
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.formats import number
from relaxnet_jax.reproduce.lab import Lab, Predicted
from relaxnet_jax.reproduce.methods import (
    Method,
    averaged,
    criteria,
    doing_nothing,
    foreign,
    method,
    methods_figure,
    methods_table,
    minimised,
    passes,
    seeds,
)
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.scores import EMPTY, Score, errors
from relaxnet_jax.reproduce.section import Section
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.unlike import unlike
from relaxnet_jax.reproduce.verdict import Claim, Outcome, all_of, lower

TIMING = (
    "Inference times include building the graphs, not compilation, in batches of 16 structures; the paper relaxed one "
    "structure at a time with ASE. Failed predictions are those that are not finite. They are left out of "
    "the means, and of both sides of a comparison."
)
MINIMISED = "Minimisations were timed once."
POTENTIALS = {"static": "static RelaxNet", "egnn": "EGNN, 2 layers"}


def runs(setting: Setting) -> list[Run]:
    """Every method with every seed, with the layers of the shipped configs."""
    names = ["explicit", "implicit", "static", "egnn"]
    names += [] if setting.why_not("static_final") else ["static_final"]
    return [run for name in names for run in seeds(setting, name)]


def section(lab: Lab) -> Section:
    """The table, its figure and its claims."""
    setting = lab.setting
    found = {name: seeds(setting, name) for name in ("explicit", "implicit", "static", "egnn")}
    own = {name: [lab.paths(run) for run in found[name]] for name in ("explicit", "implicit")}
    methods: dict[str, tuple[str, Method]] = {
        name: (f"RelaxNet {name}", method(own[name])) for name in own
    }
    if len(setting.seeds) > 1:
        label = f"RelaxNet explicit, mean of {len(setting.seeds)} seeds' predictions"
        methods["committee"] = (label, method([averaged(own["explicit"])]))
    limits = criteria(lab, found["explicit"])
    for name, label in POTENTIALS.items():
        for criterion, fmax in limits.items():
            made = minimised(lab, found[name], fmax)
            if made is not None:
                methods[f"{name} {criterion}"] = (f"{label} + LBFGS ({criterion})", made)
    remarks = [TIMING, f"{passes([*own['explicit'], *own['implicit']])} {MINIMISED}"]
    if reason := setting.why_not("static_final"):
        remarks.append(f"No direct predictor: {reason}")
    else:
        direct = [lab.paths(run) for run in seeds(setting, "static_final")]
        methods["direct"] = ("direct predictor", method(direct, forces=False))
    if outside := lab.reference(found["explicit"][0], paper.C1):
        source = setting.reference.source if setting.reference else ""
        methods["reference"] = (f"{source} + LBFGS (C1)", foreign(method([outside])))
        remarks.append(
            f"{source} was trained on other data with another functional, so its energies are not "
            f"comparable and not shown. {_relaxed_on(setting, outside)}"
        )
    remarks += unlike(setting, ["implicit", *POTENTIALS, "static_final"])
    given = errors([lab.points(run).comparisons for run in found["egnn"]], "energy_mae")
    nothing = doing_nothing(own["explicit"])
    path = setting.out / "table5.png"
    caption = (
        f"Final frames, test split of {setting.name}. Error bars: standard deviation over seeds."
    )
    methods_figure(methods, nothing, path, caption)
    c2 = ", ".join(number(f) for f in limits["C2"])
    return Section(
        "table5",
        "Table 5: end-to-end RelaxNet against relaxation with an interatomic potential",
        "All methods are given the initial structures of the test split and predict the relaxed ones. "
        "Potentials are trained on the energies and forces of all frames and minimised with L-BFGS "
        "(steps of at most 0.2 Å, at most 500 of them) until the largest force is below 0.05 eV/Å (C1) or below "
        f"RelaxNet's own final force (C2: {c2} eV/Å, by seed; the paper's is {paper.C2}). Forces are those that each "
        "method predicts for its own final structure, compared with those of DFT at the final DFT structure. Doing "
        "nothing takes the initial structure, with its true energy and forces, as the final one.",
        [methods_table(methods, nothing)],
        _claims(methods, nothing, given),
        [(path, "final frames by method")],
        remarks,
    )


def _relaxed_on(setting: Setting, outside: Predicted) -> str:
    """A sentence on how and where the outside potential was run."""
    known = outside.facts.get("machine")
    text = "One structure at a time, by ASE's LBFGS"
    if known is None:
        return f"{text}, on a machine that was not recorded."
    threads = (
        "; its linear algebra used one" if setting.reference and setting.reference.serial else ""
    )
    name = known.get("processor", known["device"])
    return f"{text}, with {known['cores']} usable cores ({name}){threads}."


def _claims(methods: dict[str, tuple[str, Method]], nothing: Method, given: Score) -> list[Claim]:
    """The claims; ``given`` are EGNN's energy errors (eV) at the true final structures."""
    potentials = [name for name in methods if name.startswith("egnn")]

    def against(quantity: str, unit: str, factor: float = 1.0) -> Outcome:
        pairs = [(a, b) for a in ("explicit", "implicit") for b in potentials]
        outcomes = []
        for a, b in pairs:
            ours, theirs = (getattr(methods[name][1], quantity) for name in (a, b))
            outcomes.append(lower(ours, theirs, (methods[a][0], methods[b][0]), unit, factor))
        return all_of(outcomes)

    explicit, implicit = methods["explicit"][1], methods["implicit"][1]
    outside = []
    if "reference" in methods:
        label, theirs = methods["reference"]
        outside = [
            Claim(
                "final geometry: better than the outside potential",
                lower(explicit.positions, theirs.positions, ("RelaxNet explicit", label), "Å"),
                ours=True,
            ),
            Claim(
                "inference takes at most a twentieth of the time of the outside potential",
                lower(explicit.seconds, theirs.seconds, ("RelaxNet explicit", label), "s", 1 / 20),
                ours=True,
            ),
        ]
    names = ("RelaxNet explicit", "doing nothing")
    direct = methods["direct"][1].positions if "direct" in methods else EMPTY
    return [
        Claim("RelaxNet's final energies are better than EGNN + LBFGS's", against("energy", "eV")),
        Claim("RelaxNet's final forces are better than EGNN + LBFGS's", against("forces", "meV/Å")),
        Claim(
            "RelaxNet's inference takes less time than EGNN + LBFGS (in the paper, a sixth in the explicit scheme)",
            against("seconds", "s"),
        ),
        Claim(
            "EGNN's energy errors are larger at the end of its own relaxations than at the true final structures",
            all_of(
                [
                    lower(given, methods[p][1].energy, ("at the true ones", methods[p][0]), "eV")
                    for p in potentials
                ]
            ),
        ),
        Claim(
            "the explicit scheme's energies are better than the implicit one's",
            lower(explicit.energy, implicit.energy, ("explicit", "implicit"), "eV"),
        ),
        Claim(
            "the explicit scheme is faster in inference than the implicit one",
            lower(explicit.seconds, implicit.seconds, ("explicit", "implicit"), "s"),
        ),
        Claim(
            "RelaxNet's inference takes at most a sixth of the time of EGNN + LBFGS",
            against("seconds", "s", 1 / 6),
            ours=True,
        ),
        Claim("final geometry: better than EGNN + LBFGS", against("positions", "Å"), ours=True),
        Claim(
            "final geometry: better than the direct predictor",
            lower(explicit.positions, direct, (names[0], "direct"), "Å"),
            ours=True,
        ),
        Claim(
            "final geometry: better than doing nothing",
            lower(explicit.positions, nothing.positions, names, "Å"),
            ours=True,
        ),
        *(
            Claim(
                f"final geometry: explicit, less than {factor:g} of doing nothing",
                lower(explicit.positions, nothing.positions, names, "Å", factor),
                ours=True,
            )
            for factor in (0.5, 0.25)
        ),
        *outside,
    ]


EXPERIMENT = Experiment("table5", runs, section)
