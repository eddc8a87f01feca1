"""RelaxNet with relaxing cells (VASP's ISIF=3) and implicit latent evolution: a potential.

  relaxnet-jax train --config implicit_cell.py --set data.path=MY.h5 train.max_minutes=60

The first 25 epochs fit energies, forces and stresses at the data's own frames, without the ODE (see
implicit.py). Data may mix bulk crystals whose cell changes with fixed cells, slabs and molecules. Each
structure's cell is strained only if it was strained in the data, and never across a non-periodic direction.
Cost: docs/speed.md. Scores: docs/benchmarks.md.
"""


def get_config():
    return {
        "dynamics": {
            "latent": "implicit",
            "cell": "variable",
            "mass": "unit",
            "friction": True,
            "time_scale": True,
        },
        "graph": {"triplet_cutoff": 3.5, "skin": 0.5},
        "model": {
            "features": 48,
            "triplet_features": 24,
            "pair_features": 24,
            "vector_features": 8,
            "n_gaussian": 8,
            "n_bessel": 4,
            "l_max": 2,
            "l_angle": 3,
            "expansion_channels": 8,
        },
        "loss": {
            "energy": 5.0,
            "monotonicity": 5.0,
            "forces": 10.0,
            "positions": 30.0,
            "direction": 0.5,
            "stress": 300.0,
            "cell": 300.0,
        },
        "train": {
            "batch_size": 8,
            "learning_rate": 2e-3,
            "weight_decay": 0.1,
            "static_epochs": 25,
        },
    }
