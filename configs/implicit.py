"""RelaxNet with implicit latent evolution: the whole encoder at every evaluation of the ODE.

  relaxnet-jax train --config implicit.py --set data.path=MY.h5 train.max_minutes=60

The encoder and its gradient run 17 times per trajectory of 5 frames, so a step costs about ten times as
much as in the explicit scheme. The model is therefore narrower than the explicit one, and the first 25 epochs
fit energies and forces at the data's own frames, without the ODE, at a tenth of the cost. With a short
train.max_minutes on a lot of data, lower train.static_epochs.

Cost and score on 1,141 relaxations of 12-atom DFT slabs, unseen compositions: a static epoch takes 9 s on one
core and an epoch of the ODE 100 s. In 12 minutes (3 to 5 epochs of the ODE) the final coordinates reach
0.360 ± 0.021 of doing nothing and the energies 32.7 ± 2.2 meV/atom (three seeds; docs/benchmarks.md,
docs/speed.md).
"""


def get_config():
    return {
        "dynamics": {
            "latent": "implicit",
            "mass": "unit",
            "friction": True,
            "time_scale": True,
        },
        "graph": {"triplet_cutoff": 3.5, "skin": 0.4},
        "model": {
            "features": 48,
            "triplet_features": 16,
            "pair_features": 24,
            "vector_features": 8,
            "n_gaussian": 8,
            "n_bessel": 4,
            "l_max": 2,
            "l_angle": 3,
            "expansion_channels": 8,
        },
        "loss": {
            "errors": "norm",
            "energy": 5.0,
            "energy_change": 10.0,
            "monotonicity": 5.0,
            "forces": 3.0,
            "positions": 20.0,
            "direction": 0.5,
        },
        "train": {
            "batch_size": 8,
            "learning_rate": 2e-3,
            "weight_decay": 0.1,
            "noise": 0.1,
            "static_epochs": 25,
        },
    }
