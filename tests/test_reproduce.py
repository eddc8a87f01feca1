"""The paper's experiments by command: runs shared and kept, budgets, verdicts, pages."""

import csv
import dataclasses
import json
import math
import re
import shutil
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import t as student
from tiny import TINY

from relaxnet_jax import cli
from relaxnet_jax.config import load_config
from relaxnet_jax.data.dataset import load_dataset
from relaxnet_jax.data.generation.calculators import load_calculator
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import build_structure
from relaxnet_jax.metrics import Comparison, evaluate, structure_errors
from relaxnet_jax.model import create_model
from relaxnet_jax.reproduce import (
    budget,
    energies,
    fig3a,
    fig3b,
    fig3c,
    figa1,
    figa2,
    figa3,
    formats,
    predictions,
    table4,
    table5,
)
from relaxnet_jax.reproduce.archive import from_record, read_records, to_record, write_records
from relaxnet_jax.reproduce.convergence import convergence_seconds
from relaxnet_jax.reproduce.lab import Lab, Predicted
from relaxnet_jax.reproduce.methods import averaged, passes, scaled
from relaxnet_jax.reproduce.plan import Entry, keep_plan, make_plan
from relaxnet_jax.reproduce.reference import relaxed_by
from relaxnet_jax.reproduce.registry import EXPERIMENTS
from relaxnet_jax.reproduce.report import FEW, _first, _write_runs, provenance
from relaxnet_jax.reproduce.runs import Run, _digest, folder_of, read_facts, state_of, write_facts
from relaxnet_jax.reproduce.scores import (
    Difference,
    Score,
    bound,
    difference,
    errors,
    numbers,
    relative,
    score,
)
from relaxnet_jax.reproduce.section import Section, Table
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.table1 import quickly
from relaxnet_jax.reproduce.table4 import by_fold
from relaxnet_jax.reproduce.unlike import unlike
from relaxnet_jax.reproduce.verdict import (
    FAILS,
    HOLDS,
    OPEN,
    RULE,
    Claim,
    Outcome,
    all_of,
    decided,
    lower,
)
from relaxnet_jax.reproduce.workers import core_shares, train_side_by_side
from relaxnet_jax.runtime import usable_cores

SMALL = (
    "data.n_emt=24",
    "data.splits=(0.6,0.15,0.25)",
    "data.seed=2",
    "train.batch_size=4",
    "train.epochs=1",
    "train.max_buckets=1",
    "model.layers=1",
    "model.attention=False",
    "model.features=8",
    "model.vector_features=3",
    "model.triplet_features=4",
    "model.moment_channels=3",
    "model.pair_features=4",
    "model.n_gaussian=4",
    "model.n_bessel=3",
    "model.l_max=1",
    "model.l_angle=1",
    "model.expansion_channels=3",
    "model.attention_heads=2",
    "graph.cutoff=4.0",
    "graph.triplet_cutoff=3.2",
)


pytestmark = pytest.mark.usefixtures("own_cache")


def setting(out, seeds=(0, 1), changes=SMALL, **more):
    return Setting("emt", out, seeds, changes=changes, **more)


# Runs and budgets


def test_runs_are_known_by_what_they_compute(tmp_path):
    own = setting(tmp_path)
    run = own.run("explicit", 0)
    assert own.run("explicit", 0, label="another name").digest == run.digest
    assert own.run("explicit", 0, dynamics__frames=5).digest == run.digest  # as shipped
    assert setting(tmp_path / "moved").run("explicit", 0).digest == run.digest
    others = [
        own.run("explicit", 1),
        own.run("implicit", 0),
        own.run("explicit", 0, dynamics__frames=3),
        own.run("explicit", 0, share=0.5),
        setting(tmp_path, changes=(*SMALL, "data.n_emt=25")).run("explicit", 0),
        setting(tmp_path, changes=(*SMALL, "train.epochs=2")).run("explicit", 0),
    ]
    assert len({run.digest, *(r.digest for r in others)}) == 7
    watched = setting(tmp_path, changes=(*SMALL, "train.checkpoint_minutes=1"))
    assert watched.run("explicit", 0).digest == run.digest
    for reserved in ("data.path=x.h5", "train.seed=1", "train.max_minutes=3"):
        with pytest.raises(InputError, match=reserved.partition("=")[0]):
            setting(tmp_path, changes=(reserved,))


def test_shares_are_nested_and_keep_the_other_splits(tmp_path):
    own = setting(tmp_path)
    runs = [own.run("explicit", 0, share=share) for share in (0.25, 0.5)]
    own.write_shares(runs, lambda _: None)
    found = [load_dataset(run.config).ids() for run in runs]
    whole = own.dataset.ids()
    small, large = (set(ids["train"]) for ids in found)
    assert small < large < set(whole["train"])
    assert [len(small), len(large)] == [run.relaxations for run in runs]
    for ids in found:
        assert ids["validation"] == whole["validation"] and ids["test"] == whole["test"]


def test_every_experiment_shares_the_shipped_runs(tmp_path):
    own = setting(tmp_path, changes=("data.n_emt=24",))
    needs = {name: experiment.runs(own) for name, experiment in EXPERIMENTS.items()}
    digests = {name: {run.digest for run in runs} for name, runs in needs.items()}
    explicit = {own.run("explicit", seed).digest for seed in own.seeds}
    for name in ("table2", "table3", "table5", "table6", "fig3b", "fig3c", "figA3", "frames", "energies"):
        assert explicit <= digests[name], name
    assert explicit <= digests["ablation"]
    assert digests["fig3a"] == digests["figA2"] <= digests["table2"]
    assert digests["fig3b"] <= digests["table5"] and digests["figA1"] == set()
    direct = {own.run("static_final", seed).digest for seed in own.seeds}
    assert direct <= digests["table1"] & digests["table5"]
    for runs in needs.values():
        by_digest = {run.digest: run.name for run in runs}
        assert len(set(by_digest.values())) == len(by_digest)


def test_roles_are_tested_on_the_same(tmp_path):
    first = setting(tmp_path, changes=(*SMALL, "dynamics.order=first"))
    assert "order" in first.why_not("static_final") and not first.why_not("explicit")
    cells = setting(tmp_path, changes=(*SMALL, "dynamics.cell=variable", "model.l_max=2"))
    assert "stress" in cells.why_not("static_final") and not cells.why_not("static")
    assert len(EXPERIMENTS["table5"].runs(cells)) == 8
    for name in ("table3", "fig3b", "fig3c", "figA3"):  # whose strain would be displacement
        with pytest.raises(InputError, match=f"{name}: .* different cells.*dynamics.cell=fixed"):
            EXPERIMENTS[name].runs(cells)
        assert EXPERIMENTS[name].runs(setting(tmp_path))
    other = tmp_path / "other.py"
    other.write_text(
        'def get_config():\n    return {"dynamics": {"latent": "static"}, "data": {"fold": 1}}\n'
    )
    with pytest.raises(InputError, match="tested on the same"):
        setting(tmp_path, changes=(), sources={"static": str(other)}).run("static", 0)


def fake_run(digest, weight):
    return Run(digest, load_config(TINY), weight, digest, 10)


def test_budget_is_divided_among_the_missing(tmp_path):
    runs = {name: fake_run(name, w) for name, w in zip("abcd", (1.0, 3.0, 1.0, 0.5))}
    needs = {"one": [runs["a"], runs["b"]], "two": [runs["b"], runs["c"], runs["d"]]}
    done = folder_of(tmp_path, runs["a"])
    (done / "model").mkdir(parents=True)
    write_facts(done, {"minutes": 7.0})
    plan = make_plan(needs, tmp_path, 9.0, "first")
    minutes = {e.run.digest: e.minutes for e in plan.entries}
    assert minutes == pytest.approx({"a": 7.0, "b": 6.0, "c": 2.0, "d": 1.0})
    assert [e.run.digest for e in plan.left] == list("bcd")
    assert plan.entries[1].needed_by == ("one", "two")
    keep_plan(plan, tmp_path, "first")

    # An interrupted run keeps what it was promised; what it has left of it is not there for others.
    part = folder_of(tmp_path, runs["b"])
    (part / "checkpoints" / "latest" / "5").mkdir(parents=True)
    (part / "config.json").write_text(json.dumps({"train": {"max_minutes": 6.0}}))
    (part / "metrics.jsonl").write_text(json.dumps({"seconds": 240.0}) + '\n{"cut sh')
    other = make_plan(needs, tmp_path, 5.0, "second")
    assert [e.state for e in other.entries] == ["finished", "interrupted", "missing", "missing"]
    assert [e.minutes for e in other.entries] == pytest.approx([7.0, 6.0, 2.0, 1.0])
    other = make_plan(needs, tmp_path, 3.5, "second")
    assert [e.minutes for e in other.entries] == pytest.approx([7.0, 6.0, 1.0, 0.5])
    with pytest.raises(InputError, match="--budget"):
        make_plan(needs, tmp_path, 1.0, "second")
    # The same command goes on with its own division.
    same = make_plan(needs, tmp_path, 9.0, "first")
    assert [e.minutes for e in same.entries] == pytest.approx([7.0, 6.0, 2.0, 1.0])
    assert [e.minutes for e in make_plan(needs, tmp_path, None, "").entries][2:] == [None, None]


def test_weights():
    def weight(share=1.0, **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        return budget.weight_of(load_config("explicit.py", changes), share)

    assert weight() == 1.0
    assert weight(dynamics__frames=10, dynamics__substeps=2) == 4.0
    assert weight(0.25, dynamics__latent="implicit") == 1.5
    assert budget.divide(6.0, {"x": 1.0, "y": 2.0}) == {"x": 2.0, "y": 4.0}
    assert budget.clock([1.0, 3.0, 2.0], 1) == 6.0 and budget.clock([], 2) == 0.0
    assert budget.clock([2.0, 2.0, 2.0], 2) == 4.0 and budget.clock([1.0, 3.0, 2.0], 2) == 3.0


@pytest.mark.parametrize("latent", ("explicit", "implicit"))
def test_paper_configs(latent):
    """What the paper prints of its model and training."""
    config = load_config(f"paper_{latent}.py")
    d, t, loss = config.dynamics, config.train, config.loss
    assert (d.latent, d.order, d.mass, d.solver, d.rtol, d.atol) == (
        *(latent, "second", "atomic", "rk4"), 1e-3, 1e-3
    )  # fmt: skip
    assert not d.friction and not d.time_scale and not d.max_speed and config.model.interaction == "triplets"
    assert config.model.layers == 2 and config.model.update_positions
    assert (t.learning_rate, t.weight_decay, t.batch_size, t.epochs) == (5e-4, 5e-5, 64, 1000)
    assert (t.plateau_factor, t.plateau_patience, t.early_stop_patience) == (0.8, 8, 20)
    assert config.data.splits == (0.9, 0.05, 0.05) and t.static_epochs == 0 and t.ema == 0
    assert (loss.energy_per, loss.errors) == ("structure", "squared")


# Numbers and verdicts


def test_scores_leave_out_what_is_missing():
    found = score([{"a": 1.0, "b": 3.0}, {"a": 2.0, "b": math.nan, "c": 6.0}])
    assert found.ids == ("a", "b", "c") and found.missing == 2
    assert found.by_seed.tolist() == [2.0, 4.0]
    assert found.mean == 3.0 and found.deviation == pytest.approx(math.sqrt(2)) and found.seeds == 2
    assert numbers([1.0]).deviation is None and math.isnan(numbers([None]).mean)
    other = score([{"b": 4.0, "c": 8.0, "d": 100.0}])
    apart = difference(found, other)  # b: 4 - 3, c: 8 - 6
    assert apart.structures == 2 and apart.value == pytest.approx(1.5)
    assert difference(found, score([{"d": 1.0}])) is None


def test_ratios_are_of_the_same_structures():
    """A model that fails on the structure that moves most is no better for it."""
    nothing = score([{"easy": 1.0, "hard": 9.0, "other": 5.0}])
    found = relative(score([{"easy": 0.5, "hard": 4.5}, {"easy": 0.5, "hard": math.nan}]), nothing)
    assert found.by_seed.tolist() == [0.5, 0.5]
    assert relative(numbers([1.0]), numbers([0.0])).seeds == 0  # nothing moves
    assert relative(numbers([1.0]), numbers([])).seeds == 0


def test_standard_error_of_a_difference():
    a = score([{"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 4.0}])
    b = score([{"x": 5.0, "y": 8.0}, {"x": 7.0, "y": 10.0}])
    # Structures: differences 4 and 6, variance 2, over 2; seeds: means 1.5, 3.5 and 6.5, 8.5.
    assert difference(a, b).value == 5.0
    assert difference(a, b).error == pytest.approx(math.sqrt(2 / 2 + 2 / 2 + 2 / 2))
    # Three variances of 1 with one degree of freedom each: 3² / 3 by Welch and Satterthwaite.
    assert difference(a, b).degrees == pytest.approx(3.0)
    assert difference(a, b).p == pytest.approx(2 * student.sf(5 / math.sqrt(3), 3))
    assert difference(a, bound(2.5, a)).p == pytest.approx(1.0)
    assert Difference(1.0, ((0.0, 2),), 1, False).p == 0.0 and Difference(1.0, (), 1, True).p is None


def test_verdicts():
    a = score([{"x": 1.0, "y": 1.1}, {"x": 1.1, "y": 1.0}])
    b = score([{"x": 2.0, "y": 2.1}, {"x": 2.1, "y": 2.1}])
    noisy = score([{"x": 0.0, "y": 3.0}, {"x": 9.0, "y": -7.0}])
    names = "A", "B"
    assert lower(a, b, names).verdict == HOLDS and lower(b, a, names).verdict == FAILS
    assert lower(a, noisy, names).verdict == OPEN
    assert "not significant" in lower(a, noisy, names).reason
    assert lower(b, a, names, factor=3.0).verdict == HOLDS
    assert "of both" not in lower(a, b, names).reason
    fewer = score(2 * [{"x": 2.0, "y": 2.1, "z": 9.0}])
    assert lower(a, fewer, names).reason.endswith("on the 2 structures of both")
    assert lower(a, numbers([]), names).verdict == OPEN
    one = [lower(*(score([{"": v}], exact=True) for v in (x, 2.0)), names) for x in (1.0, 3.0)]
    assert [o.verdict for o in one] == [HOLDS, FAILS] and "one measurement" in one[0].reason
    holds, fails, unknown = (decided(value, str(value)) for value in (True, False, None))
    assert all_of([holds, holds]).verdict == HOLDS
    assert all_of([holds, unknown]).verdict == OPEN
    assert all_of([holds, unknown, fails]).verdict == FAILS and all_of([]).verdict == OPEN


def test_methods_that_diverge_are_not_better_on_what_is_left():
    easy = {f"easy {k}": 1.0 + 0.01 * k for k in range(4)}
    whole = [easy | {"hard": 1.5}] * 2
    names = "A", "B"
    better = [{k: 0.5 * v for k, v in row.items()} for row in whole]
    assert lower(score(better), score(whole), names).verdict == HOLDS
    lost = score([better[0] | {"hard": math.nan}, better[1]])
    found = lower(lost, score(whole), names)
    assert found.verdict == OPEN and "but 1 of 10 of A are missing" in found.reason
    # It may lose, and what loses as many, or what is compared with one that does, is not held back.
    assert lower(score(whole), scaled(lost, 0.1), names).verdict == FAILS
    worse = scaled(score(whole), 3.0)
    assert lower(scaled(lost, 3.0), worse, names, factor=0.1).verdict == FAILS
    assert lower(score(better), scaled(lost, 9.0), names).verdict == HOLDS
    assert lower(lost, scaled(lost, 9.0), names).verdict == HOLDS
    # A part of them: one row of what no training is behind lacks none.
    still = score(whole[:1], exact=True)
    assert "but 1 of 10 of A are missing" in lower(lost, still, names).reason
    assert lower(lost, scaled(bound(1.0, lost), 9.0), names).verdict == HOLDS


def test_figures_count_what_diverged(tmp_path):
    """Of one structure, with every seed: of the others the claims would hold."""

    class Lost(Inventor):
        def predicted(self, run, n_frames, **facts):
            found = super().predicted(run, n_frames, **facts)
            if run.config.dynamics.latent == "explicit":
                for array in ("pred_positions", "pred_energies", "pred_forces"):
                    getattr(found.comparisons[0], array)[:] = np.nan
            return found

    for lab, verdict in ((Inventor, HOLDS), (Lost, OPEN)):
        claims = {}
        for name in ("table3", "fig3b", "fig3c"):
            made = EXPERIMENTS[name].section(lab(setting(tmp_path)))
            claims |= {c.text.split()[0]: c.outcome for c in made.claims}
        for first in ("noise", "intermediate", "pathways"):
            assert claims[first].verdict == verdict, claims[first].reason
            assert ("missing" in claims[first].reason) == (verdict == OPEN)


def test_frames_of_the_same_runs_are_paired():
    """One seed is twice as bad as the other, at every frame: its paths get better all the same."""
    before = score([{"x": 10.0, "y": 11.0, "z": 12.0}, {"x": 1.0, "y": 2.0, "z": 3.0}])
    after = dataclasses.replace(before, values=before.values - np.array([[0.50], [0.49]]))
    assert lower(after, before, ("A", "B")).verdict == OPEN
    assert lower(after, before, ("A", "B"), paired=True).verdict == HOLDS
    found = difference(after, before, paired=True)
    assert found.value == pytest.approx(0.495) and found.error == pytest.approx(0.005)
    assert fig3b.falling([before, after]).verdict == HOLDS
    assert fig3a._lowest([before, after], "errors").verdict == HOLDS
    once = Score(before.ids, before.values[:1])
    assert difference(once, once, paired=True).one_seed
    with pytest.raises(ValueError, match="1 and 2 runs"):
        difference(once, before, paired=True)


def test_few_seeds_and_many_cases_need_more():
    """Of two seeds each, 2.5 standard errors are not significant; of many cases, p = 0.03 in one is
    not either."""
    a, b = numbers([0.0, 1.0]), numbers([1.77, 2.77])  # standard error √½, two degrees of freedom
    found = lower(a, b, ("A", "B"))
    assert difference(a, b).value / difference(a, b).error == pytest.approx(2.5, abs=0.01)
    assert found.verdict == OPEN and found.p == pytest.approx(0.13, abs=0.01)
    many = [lower(numbers([0.0, 1.0] * 3), numbers([1.77, 2.77] * 3), ("A", "B"))] * 2
    assert [o.verdict for o in many] == [HOLDS] * 2 and all_of(many).verdict == HOLDS
    chance, sure = Outcome(FAILS, "by chance", 0.03), Outcome(FAILS, "sure", 0.004)
    assert all_of([chance]).verdict == FAILS
    for others, verdict in (([chance], OPEN), ([chance, sure], FAILS), ([sure] + 9 * [chance], FAILS)):
        found = all_of([*others, *many])
        assert found.verdict == verdict, found.reason
        assert found.p == pytest.approx(len(others + many) * min(o.p for o in others))
    found = all_of([chance, *many])
    assert "1 of 3 do not hold, which may be chance in 3 cases (p = 0.09)" in found.reason
    # Claims of claims: as if all cases were one list.
    assert all_of([all_of([sure, *many]), all_of(3 * many)]).p == pytest.approx(2 * 3 * 0.004)


def test_one_seed_decides_nothing():
    """How much trainings differ is unknown, however many structures there are."""
    once, twice = ([{"x": 1.0 + k, "y": 1.1 + k} for k in range(n)] for n in (1, 2))
    far = [{"x": 90.0 + row["x"], "y": 90.1 + row["y"]} for row in twice]
    names = "A", "B"
    for a, b in ((once, far), (far, once), (once, far[:1])):
        found = lower(score(a), score(b), names)
        assert found.verdict == OPEN
        assert found.reason.endswith("one seed: the spread between trainings is unknown")
    for a, b in ((numbers([1.0]), numbers([2.0])), (numbers([1.0]), bound(2.0, numbers([1.0])))):
        assert lower(a, b, names).verdict == OPEN
    # With the other seed lost, one is left.
    lost = score([twice[0], dict.fromkeys("xy", math.nan)])
    assert "one seed" in lower(lost, score(far), names).reason
    # No training is behind these.
    still = score(far[:1], exact=True)
    assert lower(score(twice), still, names).verdict == HOLDS
    assert lower(score(twice), scaled(still, 10.0), names, factor=0.5).verdict == HOLDS
    assert lower(score(once, exact=True), still, names).verdict == HOLDS
    nothing = errors([relaxations(3, 0.1)], "positions_mae", predictor="nothing")
    assert nothing.exact and not errors([relaxations(3, 0.1)], "positions_mae").exact


def test_convergence_times():
    losses = [10.0, 4.0, 1.4, 0.0, 0.5]
    records = [{"seconds": 10.0 * (k + 1), "validation": {"loss": v}} for k, v in enumerate(losses)]
    assert convergence_seconds(records) == [30.0, 40.0, 40.0]
    assert convergence_seconds(records[:1]) == [None] * 3
    assert convergence_seconds([{"seconds": 1.0, "validation": {"loss": None}}]) == [None] * 3


def test_numbers_as_people_read_them():
    assert formats.with_deviation(0.123456, 0.01) == "0.123 ± 0.010"
    assert formats.with_deviation(26.44, 0.04) == "26.44 ± 0.04"
    assert formats.with_deviation(math.nan, None) == formats.number(None) == "–"
    assert formats.percent_change(0.75) == "-25.0 %" and formats.percent_change(np.nan) == "–"


def test_sections_are_csv_and_markdown(tmp_path):
    spread = numbers([1.0, 2.0])
    table = Table("T", ("name", "value (Å)"), [["a|b", spread], ["c", None]])
    claim = Claim("A < B", decided(True, "1 < 2"), "by sign", ours=True)
    made = Section("x", "X", "Intro.", [table], [claim])
    pages = made.write(tmp_path, ["Data: d"])
    rows = list(csv.reader(pages[0].open()))
    assert rows[1] == ["name", "value (Å)", "value (Å): standard deviation", "value (Å): seeds"]
    assert rows[2] == ["a|b", "1.5", str(math.sqrt(0.5)), "2"] and rows[3] == ["c", "", "", ""]
    text = pages[1].read_text()
    assert "| a\\|b | 1.50 ± 0.71 |" in text and "| c | – |" in text
    assert "A < B (ours" in text and "holds" in text and "by sign" in text and "- Data: d" in text


# Sections, of made-up predictions


def relaxations(n_frames, error, count=8, atoms=4):
    """Comparisons of relaxations with predictions that are wrong by ``error``."""
    decay = np.exp(-3 * np.linspace(0, 1, n_frames))
    out = []
    for s in range(count):
        rng = np.random.default_rng(s)
        start, step = rng.uniform(0, 5, (atoms, 3)), rng.normal(0, 0.05, (atoms, 3))
        true = start + (1 - decay)[:, None, None] * step
        forces = decay[:, None, None] * rng.normal(size=(n_frames, atoms, 3))
        energies = -4.0 * atoms + 0.1 * rng.normal() + 0.3 * decay
        wrong = error * (1 + 0.05 * rng.normal())
        one = Comparison(
            f"s{s}", np.full(atoms, 29), 5 * np.eye(3), np.ones(3), np.zeros(atoms),
            true, energies, forces, start + (1 - wrong) * (true - start), energies + wrong,
            (1 - wrong) * forces, -4.0 * atoms, np.arange(n_frames), n_frames,
        )  # fmt: skip
        out.append(one)
    return out


class Inventor:
    """A lab whose models err by a number made of their configuration: explicit ones least."""

    def __init__(self, own):
        self.setting, self.report = own, print

    def predicted(self, run, n_frames, worse=0.0, **facts):
        latent = run.config.dynamics.latent
        error = worse + {"explicit": 0.1, "implicit": 0.2, "direct": 0.4, "static": 0.6}[latent]
        error += 0.01 * (zlib.crc32(run.digest.encode()) % 5) / 5
        slow = {"explicit": 0.01, "implicit": 0.05}
        seconds = {"seconds": slow.get(latent, 0.5), "left_out": []}
        return Predicted(tuple(relaxations(n_frames, error)), seconds | facts)

    def paths(self, run, n_frames=None):
        return self.predicted(run, n_frames or run.config.dynamics.frames)

    def relaxed(self, run, fmax, n_frames=5):
        ended = {"steps": [7] * 8, "converged": [True] * 7 + [False]}
        return self.predicted(run, n_frames, worse=0.1, **ended)

    def points(self, run, n_frames=5):
        return self.predicted(run, n_frames)

    def reference(self, run, fmax):
        if self.setting.reference is None:
            return None
        facts = {"seconds": 5.0, "left_out": [], "steps": [9] * 8, "converged": [True] * 8}
        return Predicted(tuple(relaxations(2, 0.5)), facts)

    def shaken(self, run, scale):
        found = self.predicted(run, run.config.dynamics.frames)
        moved = []
        for c in found.comparisons:
            fall = np.linspace(1, 0.5, len(c.slots))[:, None, None]
            noise = scale * np.random.default_rng(1).normal(size=c.pred_positions.shape[1:])
            moved.append(dataclasses.replace(c, pred_positions=c.pred_positions + fall * noise))
        return Predicted(tuple(moved), found.facts)

    def dense(self, run, n_frames):
        return [
            {"pred": c.pred_positions, "true": c.true_positions, "id": np.array(c.id)}
            | {"cell": c.cell, "numbers": c.atomic_numbers, "fixed": c.fixed_mask}
            for c in self.predicted(run, n_frames).comparisons
        ]

    def facts(self, run):
        return {"minutes": 1.0}

    def epochs(self, run):
        losses = (3.0, 2.0, 1.0)
        return [{"seconds": 10.0 * k, "validation": {"loss": v}} for k, v in enumerate(losses)]

    def epoch_seconds(self, run):
        return 1.0 if run.config.dynamics.latent == "explicit" else 20.0

    def memory(self, run):
        return 2**20


def test_rules_of_their_own_need_two_seeds():
    falling = [[numbers([v] * n) for v in (3.0, 2.0, 1.0)] for n in (1, 2)]
    assert [fig3a._shifting(medians).verdict for medians in falling] == [OPEN, HOLDS]
    sure = (-0.9, 1e-6)
    assert [figa3._correlated([sure] * n, -1).verdict for n in (1, 2)] == [OPEN, HOLDS]
    assert [figa3._correlated([sure] * n, 1).verdict for n in (1, 2)] == [OPEN, FAILS]
    walls = [{1.0: numbers([60.0] * n)} for n in (1, 2)]
    assert [quickly(w, 40.0, n).verdict for n, w in zip((1, 2), walls)] == [OPEN, HOLDS]
    late = [{1.0: numbers([6000.0] * n)} for n in (1, 2)]
    assert [quickly(w, 40.0, n).verdict for n, w in zip((1, 2), late)] == [OPEN, FAILS]
    assert [table4._reached(numbers([9.0] * n), 10.0).verdict for n in (1, 2)] == [OPEN, HOLDS]


@pytest.mark.parametrize("changes", [(), ("loss.energy_change=0",), ("loss.energy_change=3",)])
def test_energies_with_and_without_the_term(tmp_path, changes):
    own = setting(tmp_path, changes=(*SMALL, *changes))
    weights = {
        kind: {run.config.loss.energy_change for run in energies.case_runs(own, kind)}
        for kind in energies.KINDS
    }
    shipped = own.config("explicit").loss.energy_change
    assert weights == {energies.WITH: {shipped or energies.WEIGHT}, energies.WITHOUT: {0.0}}
    assert {shipped} in weights.values()


@pytest.mark.parametrize("name", ["table3", "fig3a", "fig3b", "fig3c", "figA3", "energies", "ablation"])
def test_one_seed_leaves_every_claim_open(tmp_path, name):
    """Those with rules of their own, too; what is of the data alone is no claim about a training."""
    claims = EXPERIMENTS[name].section(Inventor(setting(tmp_path, seeds=(0,)))).claims
    about = [c.outcome for c in claims if "true displacements" not in c.text]
    assert about and all(outcome.verdict == OPEN for outcome in about)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_section(tmp_path, name):
    own = setting(tmp_path)
    made = EXPERIMENTS[name].section(Inventor(own))
    pages = made.write(tmp_path, ["Data: made up"])
    assert {p.name for p in pages} >= {f"{name}.csv", f"{name}.md", f"{name}.png"}
    for page in pages:
        assert page.stat().st_size > 100
    text = (tmp_path / f"{name}.md").read_text()
    assert f"]({name}.png)" in text and "Traceback" not in text
    widths = {len(row) for row in csv.reader((tmp_path / f"{name}.csv").open()) if len(row) > 1}
    assert len(widths) == 1
    if name != "figA1":
        assert "doing nothing" in text
    assert made.claims
    for table in made.tables:
        assert all(len(row) == len(table.columns) for row in table.rows), table.title


class Diverged(Inventor):
    """A lab whose models have diverged with some seeds: their predictions are no numbers."""

    def __init__(self, own, seeds):
        super().__init__(own)
        self.lost = seeds

    def predicted(self, run, n_frames, **facts):
        found = super().predicted(run, n_frames, **facts)
        if run.config.train.seed in self.lost:
            for c in found.comparisons:
                for array in (c.pred_positions, c.pred_energies, c.pred_forces):
                    array[:] = np.nan
        return found

    def epochs(self, run):
        lost = run.config.train.seed in self.lost
        return [r | {"validation": {"loss": math.nan}} if lost else r for r in super().epochs(run)]


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("seeds", [(1,), (0, 1)])
def test_every_section_of_runs_that_diverged(tmp_path, name, seeds):
    own = setting(tmp_path)
    made = EXPERIMENTS[name].section(Diverged(own, seeds))
    made.write(tmp_path, ["Data: made up"])
    assert all(path.is_file() for path, _ in made.figures)
    if seeds == own.seeds and name != "figA1":
        # Nothing was predicted: only what it took can be said.
        left = [c.text for c in made.claims if c.outcome.verdict == HOLDS]
        assert all("time" in text or "faster" in text or "memory" in text for text in left), left


def test_verdicts_of_table5_follow_from_the_predictions(tmp_path):
    made = EXPERIMENTS["table5"].section(Inventor(setting(tmp_path)))
    assert [c.outcome.verdict for c in made.claims] == [HOLDS] * len(made.claims)
    rows = {row[0]: row for row in made.tables[0].rows}
    explicit = relaxations(5, 0.1)
    ratio = rows["RelaxNet explicit"][7].mean
    assert 0.05 < ratio < 0.15 and evaluate(explicit).final_ratio == pytest.approx(0.1, abs=0.02)
    assert rows["EGNN, 2 layers + LBFGS (C1)"][12].mean == pytest.approx(100 * 7 / 8)


def test_committee_averages_what_seeds_predict(tmp_path):
    """Two seeds that err by 0.3 and -0.1 of the way: together by 0.1, up to the noise of each."""
    seeds = [Predicted(tuple(relaxations(3, e)), {"seconds": 2.0}) for e in (0.3, -0.1)]
    together = averaged(seeds)
    assert together.facts["seconds"] == 4.0
    for one, a, b in zip(together.comparisons, *(s.comparisons for s in seeds)):
        np.testing.assert_allclose(one.pred_positions, (a.pred_positions + b.pred_positions) / 2)
        np.testing.assert_array_equal(one.true_positions, a.true_positions)
    assert evaluate(together.comparisons).final_ratio == pytest.approx(0.1, abs=0.03)
    seeds[0].comparisons[0].pred_energies[:] = np.nan
    alone = averaged(seeds).comparisons[0]
    np.testing.assert_array_equal(alone.pred_energies, seeds[1].comparisons[0].pred_energies)


def test_table1_on_elements_that_small_parts_lack(tmp_path):
    """Doing nothing is told of the whole test split; convergence with its spread."""

    class Small(Inventor):
        def predicted(self, run, n_frames, **facts):
            found = super().predicted(run, n_frames, **facts)
            few = run.relaxations < len(self.setting.dataset.splits["train"])
            return dataclasses.replace(found, comparisons=found.comparisons[few:])

    (table,) = EXPERIMENTS["table1"].section(Small(setting(tmp_path))).tables
    rows = [dict(zip(table.columns, row)) for row in table.rows]
    assert rows[-1]["energy MAE (eV)"].structures == 8
    assert rows[0]["energy MAE (eV)"].structures == 7
    assert rows[0]["85% convergence (s)"].deviation == 0.0
    assert rows[0]["paper: 85 / 95 / 99 % (s)"] == "1337 / 2109 / 3118"


def test_numbers_of_frames_are_compared_on_the_same_ones(tmp_path):
    """Models that err alike at every frame: only on their own frames do more look better."""

    class Alike(Inventor):
        def paths(self, run, n_frames=None):
            n = n_frames or run.config.dynamics.frames
            return Predicted(tuple(relaxations(n, 0.1)), {"seconds": 1.0, "left_out": []})

    made = EXPERIMENTS["table2"].section(Alike(setting(tmp_path)))
    verdicts = {c.text: c.outcome.verdict for c in made.claims}
    assert verdicts["explicit: more frames, lower force errors"] == HOLDS
    assert verdicts["explicit: more frames, lower force errors on 10 frames"] == OPEN
    assert verdicts["explicit: more frames, lower energy errors on 10 frames"] == OPEN
    more = "for the same total number of frames, more structures give lower force errors"
    assert (verdicts[more], verdicts[f"{more} on 10 frames"]) == (FAILS, OPEN)


def test_most_displacements_are_more_than_half_of_them():
    spread = np.array([1e-4, 1e-4, 5e-3, 1.0, 1.0])  # a median within the paper's range
    assert figa1.common(spread).verdict == FAILS
    assert figa1.common(np.array([2e-3, 5e-3, 1.0, np.nan, 0.0])).verdict == HOLDS
    assert figa1.common(np.zeros(3)).verdict == OPEN


def test_frames_are_compared_on_structures_that_have_them():
    """The hard structure has no frame 1."""
    frames = [{"easy": 1.0, "hard": 9.0}, {"easy": 0.5}, {"easy": 0.4, "hard": 4.0}]
    assert fig3b.falling([score(2 * [row]) for row in frames]).verdict == HOLDS
    frames[2]["easy"] = 0.6
    assert fig3b.falling([score(2 * [row]) for row in frames]).verdict == FAILS


def test_frames_of_a_structure_are_no_more_evidence():
    """Three structures whose errors fall by chance say as much as their 300 equal frames."""
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([4.0, 3.0, 1.0, 2.0])
    r, p = figa3.rank(x, y, np.arange(4))
    assert r == pytest.approx(-0.8) and p == pytest.approx(0.2)
    again = figa3.rank(*(np.repeat(v, 100) for v in (x, y, np.arange(4))))
    assert again == pytest.approx((r, p), abs=0.01)
    assert figa3.rank(x[:2], y[:2], np.arange(2)) == (None, 1.0)


def test_correlations_that_the_composition_has_too_say_nothing():
    """Total energies of some data span thousands of eV."""

    def agreement(own, composition):
        return figa2.agreement(numbers([own, own]), composition)

    assert agreement(0.99, 0.9).verdict == HOLDS
    found = agreement(0.9999, 0.9998)
    assert found.verdict == OPEN and "composition alone" in found.reason
    assert agreement(0.9, 0.9998).verdict == FAILS
    assert agreement(math.nan, 0.5).verdict == OPEN
    assert figa2.agreement(numbers([0.99]), 0.9).verdict == OPEN  # one seed


def test_runs_that_never_converge_are_not_quick():
    quick, never = numbers([60.0, 60.0]), numbers([60.0, None])
    assert quickly({1.0: quick}, 40.0, 2).verdict == HOLDS
    assert quickly({1.0: quick, 0.2: never}, 40.0, 2).verdict == OPEN
    assert quickly({1.0: quick}, 30.0, 2).verdict == OPEN
    assert quickly({1.0: numbers([60.0, 6000.0])}, 30.0, 2).verdict == FAILS


def test_atoms_that_swing_back_are_not_smooth():
    free, t = np.zeros(1, bool), np.linspace(0, 1, 21)
    straight, swing = (
        np.stack([x, 0 * t, 0 * t], axis=-1)[:, None] for x in (t, np.sin(2 * np.pi * t))
    )
    assert fig3c._length(straight, free) == pytest.approx(1) and fig3c._forward(straight, free) == 1
    assert (
        fig3c._length(swing, free) == pytest.approx(4 / fig3c.MOVES)
        and fig3c._forward(swing, free) < 0.95
    )
    assert math.isnan(fig3c._length(1e-3 * swing, free))
    assert math.isnan(fig3c._length(swing, ~free))


def test_smoothness_is_told_from_its_spread():
    forward = score([dict(zip("abcd", 2 * shares)) for shares in ((1.0, 0.99), (0.99, 1.0))])
    for lengths, verdict in (((1.1, 1.2), HOLDS), ((1.3, 1.8), OPEN), ((2.5, 2.6), FAILS)):
        length = score(2 * [dict(zip("abcd", 2 * lengths))])
        assert fig3c.smooth(length, forward).verdict == verdict
    assert fig3c.smooth(score([{"a": math.nan}]), forward).verdict == OPEN


def test_exact_forces_count_in_their_distribution():
    errors, share = fig3a.distribution(np.array([3.0, 0.0, 1.0, 0.0]))
    assert errors.tolist() == [1.0, 3.0] and share.tolist() == [0.75, 1.0]
    assert all(len(part) == 0 for part in fig3a.distribution(np.zeros(0)))


def test_folds_are_told_as_folds(tmp_path):
    own = setting(tmp_path, folds=3)
    made = EXPERIMENTS["table4"].section(Inventor(own))
    assert "energy MAE, final (meV/atom): folds" in made.tables[0].csv_rows()[0]
    lines = provenance(own, EXPERIMENTS["table4"].runs(own)[:0], "x", made.spread, [])
    assert "3 folds, each tested once" in lines[0] and "structures tested" not in lines[0]


def test_pages_tell_of_runs_that_saw_no_path_and_of_load(tmp_path):
    own = setting(tmp_path)
    machine = {"device": "d", "platform": "cpu", "cores": 2, "versions": {}}
    run = own.run("implicit", 0, train__static_epochs=4)
    for epochs, told, few in ((4, True, False), (5, False, True), (4 + FEW, False, False)):
        facts = {"minutes": 1.0, "limit": 1.0, "epochs": epochs, "machine": machine}
        write_facts(folder_of(tmp_path, run), facts)
        loads = [machine | {"load_average": load} for load in (0.5, 2.0, 1.0)]
        lines = provenance(own, [run], "x", "seeds", loads)
        assert any("never on a path: implicit, seed 0" in x for x in lines) == told
        assert any("1 of 1 implicit runs were trained on paths for only 1 epoch(s)" in x for x in lines) == few
        assert sum("Predicted on: d (cpu), 2 cores, , load 0.5 to 2" in x for x in lines) == 1


def test_runs_of_other_code_are_told(tmp_path):
    """Runs are found by configuration and data: the code may have changed between them."""
    own = setting(tmp_path)
    machine = {"device": "d", "platform": "cpu", "cores": 2, "versions": {}, "load_average": 0.0}
    runs = [own.run("explicit", seed) for seed in (0, 1)]
    for codes, told in ((("a", "a"), False), (("a", "b"), True), ((None, "b"), True)):
        for run, code in zip(runs, codes):
            facts = {"minutes": 1.0, "limit": 1.0, "epochs": 9, "machine": machine}
            facts |= {"reason": "epochs", "ended": ""} | ({"code": code} if code else {})
            write_facts(folder_of(tmp_path, run), facts)
        lines = provenance(own, runs, "x", "seeds", [])
        assert any("different versions of this package" in x for x in lines) == told
        rows = list(csv.DictReader(_write_runs(own, runs).open()))
        assert [row["code"] for row in rows] == [code or "" for code in codes]
    # A table of an earlier version has no such column.
    (tmp_path / "runs.csv").write_text("run,name\nold,of old\n")
    first, *_ = csv.DictReader(_write_runs(own, runs).open())
    assert first["run"] == "old" and first["code"] == ""


def test_few_reasons_are_told():
    assert _first({"b", "a"}) == "a; b"
    assert _first({f"{k}" for k in range(9)}) == "0; 1; 2; 3; 4; … and 4 more"


def test_what_differs_beside_the_method_is_told(tmp_path):
    """What acts on both and is not the same; nothing of paths where there are none."""
    own = setting(tmp_path, changes=("data.n_emt=24", "model.features=32"))
    (text,) = unlike(own, ["implicit"])
    assert "implicit that differ from explicit (in brackets): " in text and "graph.triplet_cutoff 3.5 (4)" in text
    assert "static_epochs 25 (0)" in text and "model.features" not in text and "latent" not in text
    static, egnn, direct = unlike(own, ["static", "egnn", "static_final"])
    assert "loss.errors squared (norm)" in static and "train.noise" not in static
    assert "model.triplet_features 16 (48)" in static and "triplet" not in egnn
    assert "model.architecture egnn (dtnn)" in egnn and "loss.positions" not in static + egnn
    assert "direct that differ" in direct and "train.noise 0 (0.1)" in direct and "dynamics" not in direct
    same = setting(tmp_path, changes=("loss.errors=norm", "loss.forces=3", *SMALL))
    assert "loss" not in "".join(unlike(same, ["static"]))
    assert unlike(own, ["explicit"]) == []
    for name in ("table2", "table4", "table5"):
        remarks = EXPERIMENTS[name].section(Inventor(own)).remarks
        assert any(r.startswith("Settings of ") for r in remarks), name


def test_static_models_are_all_compared_with(tmp_path):
    """RelaxNet between the two static models: as good as one of them is not as good as them."""

    class Between(Inventor):
        def points(self, run, n_frames=5):
            error = {"dtnn": 0.6, "egnn": 0.01}[run.config.model.architecture]
            return Predicted(tuple(relaxations(n_frames, error)), {"seconds": 1.0, "left_out": []})

    found = {}
    for lab in (Inventor, Between):
        made = EXPERIMENTS["table4"].section(lab(setting(tmp_path, folds=4)))
        found[lab] = {c.text: c.outcome.verdict for c in made.claims}
        assert made.tables[0].rows[0][1].mean < 0.2 and made.tables[0].rows[-6][1] == 1
    claim = "RelaxNet's all-frame energies are as good as those of static models, from less input"
    assert (found[Inventor][claim], found[Between][claim]) == (HOLDS, FAILS)
    assert found[Inventor]["final geometry: less than 0.25 of doing nothing"] == HOLDS


def test_medians_of_structures_are_compared_in_pairs():
    """Every structure's force errors fall, though those left at the last frame are the hard ones."""
    easy, hard = {"a": 1.0, "b": 1.1, "c": 1.2}, {"d": 9.0, "e": 9.1, "f": 9.2}
    before = score(2 * [easy | hard])
    after = score(2 * [{name: 0.9 * v for name, v in hard.items()}])
    assert after.mean > before.mean and fig3a._shifting([before, after]).verdict == HOLDS
    made = [relaxations(3, error) for error in (0.1, 0.2)]
    medians = [fig3a.structure_medians(made, k) for k in range(3)]
    one = made[1][4]
    wrong = 1e3 * np.abs(one.pred_forces - one.true_forces)[2]
    assert medians[2].values[1, 4] == pytest.approx(np.median(wrong))


def test_folds_are_compared_in_pairs():
    """One model is always a little better, whatever the fold; folds differ much more."""
    rows = [{f"{k} {i}": 10.0 * k + i for i in range(3)} for k in range(1, 5)]
    better = by_fold(score([{name: v - 0.5 - 0.01 * v for name, v in row.items()} for row in rows]))
    assert lower(better, by_fold(score(rows)), ("a", "b")).verdict == HOLDS
    assert by_fold(score(rows)).mean == pytest.approx(score(rows).mean)


def test_outside_potentials_have_no_comparable_energies(tmp_path):
    own = setting(tmp_path, reference=load_calculator("emt"))
    made = EXPERIMENTS["table5"].section(Inventor(own))
    made.write(tmp_path, ["Data: made up"])
    (row,) = (dict(zip(made.tables[0].columns, r)) for r in made.tables[0].rows if "EMT" in r[0])
    assert row["energy MAE (meV/atom)"].seeds == 0 and row["L-BFGS steps"].mean == 9
    assert row["/ doing nothing"].mean == pytest.approx(0.5, abs=0.05)
    outside = [c for c in made.claims if "outside" in c.text]
    assert [c.outcome.verdict for c in outside] == [HOLDS, HOLDS]
    assert sum(r.endswith("LBFGS, on a machine that was not recorded.") for r in made.remarks) == 1
    machine = Predicted((), {"machine": {"device": "d", "processor": "some CPU", "cores": 2}})
    text = table5._relaxed_on(own, machine)
    assert text.endswith("with 2 usable cores (some CPU); its linear algebra used one.")


def test_errors_are_those_of_the_metrics():
    compared = relaxations(4, 0.2)
    compared[2].pred_energies[:] = np.nan
    reference = evaluate(compared)
    for metric in ("energy_mae", "forces_mae", "positions_mae", "rmsd"):
        for frames, own in (("final", reference.final), ("all", reference.all_frames)):
            assert errors([compared], metric, frames).mean == pytest.approx(getattr(own, metric))
    found = structure_errors(compared[0], "nothing")
    assert found["energy_mae"][0] == 0 and found["positions_mae"][-1] > 0


# Predictions and runs


def test_comparisons_keep_in_files(tmp_path):
    compared = relaxations(3, 0.1, count=2)
    write_records(tmp_path / "a.npz", [to_record(c) for c in compared], {"seconds": 0.5})
    records, facts = read_records(tmp_path / "a.npz")
    assert facts == {"seconds": 0.5}
    for one, record in zip(compared, records):
        again = from_record(record)
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(again, field.name), getattr(one, field.name))
    (tmp_path / "a.npz").write_bytes(b"damaged")
    assert read_records(tmp_path / "a.npz") is None and read_records(tmp_path / "b.npz") is None


def test_kinds_of_predictions(tmp_path):
    """By an untrained potential: what each kind asks of it, and of what."""
    own = setting(tmp_path, changes=(*SMALL, "model.architecture=egnn"))
    test = [own.dataset.trajectories[int(i)] for i in own.dataset.splits["test"][:2]]
    model = create_model(own.config("static"))
    told = []
    records, _ = predictions.points(model, test, 3, told.append)
    assert told == []  # every frame has a neighbour list of its own: nothing can be missing
    for record, t in zip(records, test, strict=True):
        c = from_record(record)
        assert c.usable
        middle = round((t.n_frames - 1) / 2)
        np.testing.assert_allclose(c.pred_positions, t.positions[[0, middle, -1]], atol=1e-12)
        energy, forces = model.energy_and_forces(t.atoms(-1))
        assert c.pred_energies[-1] == pytest.approx(energy, rel=1e-5)
        np.testing.assert_allclose(c.pred_forces[-1], forces, atol=1e-4)
    records, facts = predictions.relaxed(model, test, 3, 1e3, print)
    assert facts["converged"] == [True, True] and facts["steps"] == [0, 0]

    model = create_model(own.config("explicit", dynamics__frames=2))
    still, facts = predictions.paths(model, test, 2, print)
    assert facts["seconds"] > 0 and facts["passes"] == 3 and facts["left_out"] == []
    shaken, _ = predictions.shaken(model, test, 0.01, print)
    for a, b in zip(still, shaken):
        moved = b["pred_positions"][0] - a["pred_positions"][0]
        assert 0.003 < moved.std() < 0.03
        if not a["fixed_mask"].any():
            np.testing.assert_allclose(moved.mean(0), 0, atol=1e-9)  # unit masses
        np.testing.assert_array_equal(a["true_positions"], b["true_positions"])
    lost, _ = predictions.shaken(model, test, 1e4, print)
    assert len(lost) == 2
    (record, _), _ = predictions.dense(model, test, 2, print)
    np.testing.assert_allclose(record["pred"], still[0]["pred_positions"], atol=1e-6)


def test_time_is_that_of_the_best_pass(monkeypatch):
    for seconds, made in (((4.0, 1.0, 2.0), 3), ((4.0, 5.0), 2), ((9.0,), 1), ((30.0,), 1)):
        clock, calls = iter(np.cumsum([v for s in seconds for v in (1.0, s)])), []
        counter = SimpleNamespace(perf_counter=lambda clock=clock: next(clock))
        monkeypatch.setattr(predictions, "time", counter)
        found, times = predictions.timed(lambda calls=calls: calls.append(0) or calls)
        assert times == pytest.approx(seconds) and len(found) == made
    told = [Predicted((), facts) for facts in ({}, {"passes": 3}, {"passes": 2})]
    assert "one pass" in passes(told[:1]) and "in 3 passes" in passes(told[1:2])
    assert "in 1 to 3 passes" in passes(told)  # some of an earlier version


def test_static_models_are_asked_about_what_they_are_compared_on(tmp_path, monkeypatch):
    """Without the first relaxation the second one's energies are still its own."""
    own = setting(tmp_path, changes=(*SMALL, "model.architecture=egnn"))
    test = [own.dataset.trajectories[int(i)] for i in own.dataset.splits["test"][:2]]
    model = create_model(own.config("static"))
    (_, whole), _ = predictions.points(model, test, 3, print)

    def build(*args, **more):
        if args[7] == test[0].id:
            raise InputError(f"{test[0].id}: has no charges")
        return build_structure(*args, **more)

    for module in ("reproduce.predictions", "evaluate.run"):
        monkeypatch.setattr(f"relaxnet_jax.{module}.build_structure", build)
    (record,), facts = predictions.points(model, test, 3, print)
    assert facts["left_out"] == [f"{test[0].id}: has no charges"]
    assert str(record["id"]) == test[1].id
    np.testing.assert_allclose(record["pred_energies"], whole["pred_energies"], rtol=1e-5)


def test_time_of_an_epoch_is_of_all_it_trains_on(tmp_path):
    """Later starts of the relaxations take time too."""
    run = fake_run("a", 1.0)
    folder = folder_of(tmp_path, run)
    (folder / "model").mkdir(parents=True)
    rates = [{"epoch": k, "structures_per_second": v} for k, v in enumerate((1.0, 2.0, 2.0))]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rates)))
    for known, seconds in (({}, 5.0), ({"later_starts": 30}, 20.0)):
        facts = {"statistics": {"training_relaxations": 10} | known}
        (folder / "model" / "model.json").write_text(json.dumps(facts))
        assert Lab(setting(tmp_path), print).epoch_seconds(run) == seconds


def test_reference_relaxes_to_where_its_own_data_end(tmp_path):
    """The test relaxations are EMT's: EMT must find their final frames, from their first ones."""
    own = setting(tmp_path, changes=(*SMALL, "model.architecture=egnn"))
    test = [own.dataset.trajectories[int(i)] for i in own.dataset.splits["test"][:3]]
    model, emt = create_model(own.config("explicit")), load_calculator("emt")
    records, facts = relaxed_by(emt, model, test, 0.02, print)
    assert facts["converged"] == [True] * 3 and min(facts["steps"]) > 0 and facts["seconds"] > 0
    for record, t in zip(records, test):
        c = from_record(record)
        assert c.pred_energies == pytest.approx(t.energies[[0, -1]], abs=5e-3)
        np.testing.assert_allclose(c.pred_forces[0], t.forces[0], atol=1e-6)
        found = [structure_errors(c, who)["positions_mae"][-1] for who in ("model", "nothing")]
        assert found[0] < 0.2 * found[1]
    gold = emt._replace(elements=frozenset([79]))
    records, facts = relaxed_by(gold, model, test, 0.02, print)
    lost = [not set(t.atomic_numbers.tolist()) <= {79} for t in test]
    assert any(lost) and [not from_record(r).finite for r in records] == lost


@pytest.fixture(scope="module")
def report(own_cache, tmp_path_factory):
    """fig3b, then figA3, which needs nothing more: (folder, arguments)."""
    out = tmp_path_factory.mktemp("report")
    changes = (*SMALL, "model.architecture=egnn")
    more = ["--data", "emt", "--seeds", "3", "--out", str(out), "--set", *changes]
    assert cli.main(["reproduce", "fig3b", "--budget", "5", *more]) == 0
    return out, more


def test_experiments_share_runs(report, capsys, monkeypatch):
    out, more = report
    folders = sorted((out / "runs").iterdir())
    assert len(folders) == 2 and all(state_of(f) == "finished" for f in folders)
    facts = [json.loads((f / "finished.json").read_text()) for f in folders]
    assert all(f["reason"] == "epochs" and f["machine"]["cores"] > 0 for f in facts)
    assert sum(f["limit"] for f in facts) == pytest.approx(5.0)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.npz")}
    monkeypatch.setattr("relaxnet_jax.reproduce.training.train", None)
    assert cli.main(["reproduce", "figA3", *more]) == 0
    told = capsys.readouterr()
    assert "1 runs, 0 to train" in told.out and "figA3.md" in told.out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    page = (out / "figA3.md").read_text()
    assert "Seeds: 3" in page and "reproduce figA3" in page and "Trained on: " in page
    # Its predictions are fig3b's: made there, on the machine that was, whatever this one is.
    assert "Predicted on: " in page
    monkeypatch.setattr("relaxnet_jax.reproduce.lab.describe", dict)
    assert cli.main(["reproduce", "figA3", *more]) == 0
    assert (out / "figA3.md").read_text() == page
    claims = json.loads((out / "figA3.json").read_text())["claims"]
    assert {c["verdict"] for c in claims} <= {HOLDS, FAILS, OPEN}


def test_finished_runs_are_found_after_the_configuration_got_new_fields(
    report, capsys, monkeypatch, tmp_path
):
    out, more = report
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    more = [str(copy) if item == str(out) else item for item in more]

    def wanted(*changes, data="emt", seed=3):
        given = tuple(more[more.index("--set") + 1 :])
        return Setting(data, copy, (seed,), changes=(*given, *changes)).run("explicit", seed)

    own = Setting("emt", copy, (3,), changes=tuple(more[more.index("--set") + 1 :]))
    folder = folder_of(copy, own.run("explicit", 3))
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    del fields["loss"]["huber_forces"], fields["data"]["later_starts"]  # as before there were any
    text = json.dumps(fields)
    earlier = _digest(fields, own.checksum, "", "")
    assert earlier != folder.name
    file.write_text(text)
    folder = folder.rename(folder.with_name(earlier))
    assert wanted().digest == earlier
    monkeypatch.setattr("relaxnet_jax.reproduce.training.train", None)
    assert cli.main(["reproduce", "figA3", *more]) == 0
    assert "1 runs, 0 to train" in capsys.readouterr().out

    # Nothing that differs is passed over: what is wanted, what is stored, on what it was trained.
    for other in ("loss.huber_forces=0.3", "data.later_starts=1", "train.weight_decay=0.2"):
        assert wanted(other).digest != earlier
    assert wanted(seed=4).digest != earlier
    assert wanted("data.n_emt=25").digest != earlier  # other data
    fields["train"]["weight_decay"] = 0.2
    (folder / "config.json").write_text(json.dumps(fields))
    assert wanted().digest != earlier and wanted("train.weight_decay=0.2").digest != earlier
    fields["train"] |= {"weight_decay": 0.1, "of_a_later_version": 1}
    (folder / "config.json").write_text(json.dumps(fields))
    assert wanted().digest != earlier
    (folder / "config.json").write_text(text)
    (folder / "finished.json").unlink()
    assert wanted().digest != earlier


def test_plan_trains_nothing(report, capsys, tmp_path):
    out, more = report
    before = sorted(out.rglob("*"))
    # The tiny model has EGNN layers: "static" and "egnn" are one run.
    assert cli.main(["reproduce", "table5", "--plan", *more]) == 0
    assert "4 runs, 2 to train" in capsys.readouterr().out
    assert sorted(out.rglob("*")) == before
    assert cli.main(["reproduce", "table5", *more]) == 2
    assert "--budget" in capsys.readouterr().err
    if usable_cores() > 1:  # of two runs of weights 1 and 3 the longer one takes all of the time
        jobs = ["--jobs", "2", "--budget", "60"]
        assert cli.main(["reproduce", "table5", "--plan", *jobs, *more]) == 0
        told = capsys.readouterr().out
        assert "2 to train: 60.0 min" in told and " 60.00 " in told and " 20.00 " in told


def test_interrupted_runs_are_gone_on_with(report, capsys, monkeypatch, tmp_path):
    out, more = report
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    more = [str(copy) if item == str(out) else item for item in more]
    own = Setting("emt", copy, (3,), changes=tuple(more[more.index("--set") + 1 :]))
    folder = folder_of(copy, own.run("explicit", 3))
    (folder / "finished.json").unlink()
    assert state_of(folder) == "interrupted"
    epochs = (folder / "metrics.jsonl").read_text()

    def told_to_stop(config, workdir, resume, **_):
        assert resume and config.train.max_minutes == pytest.approx(10 / 3)
        return SimpleNamespace(stopped=True)

    command = ["reproduce", "figA3", "--budget", "9", *more]
    with monkeypatch.context() as patch:
        patch.setattr("relaxnet_jax.reproduce.training.train", told_to_stop)
        assert cli.main(command) == 143
    assert state_of(folder) == "interrupted"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def told_too_late(*_, **__):  # the run is over, but no other experiment begins
        return SimpleNamespace(stopped=False, told=True, epochs=1, reason="epochs")

    capsys.readouterr()
    for ended, code, state in ((interrupted, 130, "interrupted"), (told_too_late, 143, "finished")):
        with monkeypatch.context() as patch:
            patch.setattr("relaxnet_jax.reproduce.training.train", ended)
            assert cli.main(command) == code
        assert state_of(folder) == state
        assert "run the same command again to resume" in capsys.readouterr().err
    (folder / "finished.json").unlink()
    assert cli.main(command) == 0
    assert state_of(folder) == "finished"
    assert (folder / "metrics.jsonl").read_text() == epochs
    assert "resuming" in capsys.readouterr().err


def test_all_tells_what_cannot_be_done(report, monkeypatch, capsys):
    out, more = report

    def broken(lab):
        raise InputError("no such thing: give another")

    few = {name: EXPERIMENTS[name] for name in ("fig3b", "figA1")}
    few["figA1"] = dataclasses.replace(few["figA1"], section=broken)
    monkeypatch.setattr("relaxnet_jax.reproduce.registry.EXPERIMENTS", few)
    assert cli.main(["reproduce", "all", *more]) == 1
    told = capsys.readouterr()
    assert "figA1: failed: no such thing" in told.err
    text = (out / "REPORT.md").read_text()
    assert "| fig3b |" in text and "## Figure 3b" in text and "Could not be done" in text

    def crashing(lab):
        raise RuntimeError("out of memory")

    few["figA1"] = dataclasses.replace(few["figA1"], section=crashing)
    assert cli.main(["reproduce", "figA1", "fig3b", *more]) == 1
    told = capsys.readouterr()
    assert "Traceback" in told.err and "failed: RuntimeError: out of memory" in told.err
    assert "RuntimeError: out of memory" in (out / "REPORT.md").read_text()
    assert "fig3b.md" in told.out
    assert cli.main(["reproduce", "fig3b", "--folds", "1", *more]) == 2
    assert cli.main(["reproduce", "fig3b", "--config", "explicit.py", *more]) == 2
    assert "NAME=FILE" in capsys.readouterr().err
    assert cli.main(["reproduce", "fig3b", "--config", "static_final=mistyped.py", *more]) == 2
    assert "mistyped.py" in capsys.readouterr().err


def test_reports_do_not_mix_data(report, tmp_path):
    out, more = report
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    more = [str(copy) if item == str(out) else item for item in more]
    kept = json.loads((copy / "fig3b.json").read_text())
    (copy / "fig3b.json").write_text(json.dumps(kept | {"data": "another"}))
    assert cli.main(["reproduce", "figA1", "figA3", *more]) == 0
    text = (copy / "REPORT.md").read_text()
    assert "they are of other data: fig3b" in text and "## Figure 3b" not in text
    assert "| fig3b |" not in text and "| figA3 |" in text
    assert text.count(RULE) == 1 and RULE in (copy / "figA3.md").read_text()
    (counts,) = re.findall(r"Of (\d+) claims of the paper: (\d+) hold, (\d+) do not hold, (\d+) are", text)
    assert int(counts[0]) == sum(map(int, counts[1:])) == text.count("| the paper |") > 2


def test_runs_side_by_side(report, tmp_path, capsys):
    """Two at a time on a core each: the same files, one that cannot be trained told, others done."""
    _, more = report
    changes = tuple(more[more.index("--set") + 1 :])
    own = Setting("emt", tmp_path, (0, 1), changes=changes)
    runs = [own.run("static_final", seed) for seed in own.seeds]
    lost = own.run("static_final", 2)
    data = dataclasses.replace(lost.config.data, path=str(tmp_path / "lost.h5"))
    lost = dataclasses.replace(lost, config=dataclasses.replace(lost.config, data=data))
    entries = [Entry(run, ("x",), "missing", m) for run, m in zip((lost, *runs), (90.0, 30.0, 40.0))]
    told = []
    train_side_by_side(entries, tmp_path, min(2, usable_cores()), told.append)
    assert any(re.search(r"seed 2: .*lost\.h5", line) for line in told)
    assert sum(line.endswith(": done") for line in told) == 2
    assert [state_of(folder_of(tmp_path, run)) for run in runs] == ["finished"] * 2
    started = [line for line in told if line.startswith("[")]
    assert ["seed 2" in started[0], "seed 1" in started[1], "seed 0" in started[2]] == [True] * 3
    facts = [read_facts(folder_of(tmp_path, run)) for run in runs]
    assert all(f["reason"] == "epochs" for f in facts)
    assert all(f["machine"]["cores"] == len(core_shares(min(2, usable_cores()))[0]) for f in facts)
    log = (tmp_path / "logs" / f"{runs[0].digest}.log").read_text()
    assert "ended after epoch 0" in log


def test_workers_that_die_are_told(report, tmp_path, monkeypatch):
    _, more = report
    run = Setting("emt", tmp_path, (0,), changes=tuple(more[more.index("--set") + 1 :])).run(
        "static_final", 0
    )
    broken = dataclasses.replace(run, config=None)  # no config: a TypeError in the process
    told = []
    train_side_by_side([Entry(broken, ("x",), "missing", 1.0)], tmp_path, 1, told.append)
    assert re.search(r"exit code 1 .*\.log", told[-1])
    assert "Traceback" in (tmp_path / "logs" / f"{run.digest}.log").read_text()


def test_more_jobs_than_cores_are_refused(report, capsys):
    _, more = report
    assert cli.main(["reproduce", "figA3", "--jobs", "4096", *more]) == 2
    assert "--jobs 4096" in capsys.readouterr().err
    assert cli.main(["reproduce", "figA3", "--jobs", "0", *more]) == 2
    shares = core_shares(usable_cores())
    assert len({core for share in shares for core in share}) == usable_cores()


@pytest.mark.heavy
def test_table5_and_table1_end_to_end(tmp_path):
    changes = (*SMALL, "data.n_emt=120", "model.architecture=egnn", "train.epochs=2")
    more = ["--data", "emt", "--seeds", "0", "--out", str(tmp_path), "--set", *changes]
    config = tmp_path / "implicit.py"
    config.write_text('def get_config():\n    return {"dynamics": {"latent": "implicit"}}\n')
    more += ["--config", f"implicit={config}"]
    for name in ("table5", "table1"):
        assert cli.main(["reproduce", name, "--budget", "5", *more]) == 0
        assert (tmp_path / f"{name}.csv").is_file()
