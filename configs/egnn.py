"""The EGNN baseline: static.py with the layers of Satorras et al. (2021) instead of DTNN's.

  relaxnet-jax train --config egnn.py --set data.path=MY.h5 train.max_minutes=60
  relaxnet-jax train --config egnn.py --set model.layers=4 data.path=MY.h5 train.max_minutes=60
  relaxnet-jax eval --workdir runs/egnn        # relaxes the test split with it: MLIP + LBFGS

Inputs, energy head, attention block, data and training are those of static.py. With
dynamics.latent=implicit or explicit, the same layers become the encoder of the ODE.

Score on 1,141 relaxations of 12-atom DFT slabs, unseen compositions: after 4 minutes on one core, 31.1 ± 0.8
meV/atom where its relaxations end, and 0.72 ± 0.04 of doing nothing in coordinates (three seeds;
docs/benchmarks.md).
"""


def get_config():
    return {
        "dynamics": {"latent": "static", "mass": "unit"},
        "data": {"frame_selection": "all"},
        "graph": {"triplet_cutoff": 3.5, "skin": 0.4},
        "model": {
            "architecture": "egnn",
            "features": 48,
            "pair_features": 24,
            "n_gaussian": 8,
            "n_bessel": 4,
            "l_max": 2,
            "expansion_channels": 8,
        },
        "loss": {"energy": 5.0, "forces": 10.0},
        "train": {"batch_size": 8, "learning_rate": 2e-3, "weight_decay": 0.1},
    }
