"""A static model: RelaxNet's encoder as an interatomic potential E(x), without the ODE.

  relaxnet-jax train --config static.py --set data.path=MY.h5 train.max_minutes=60
  relaxnet-jax eval --workdir runs/static      # relaxes the test split with it: MLIP + LBFGS

Trained on energies and forces of single frames: in every epoch, one frame of each relaxation, drawn from all
its frames. It has the inputs, encoder and energy head of implicit.py, but squared errors in the loss.
dynamics.cell=variable adds the stress, and relaxes the cell too.

Score on 1,141 relaxations of 12-atom DFT slabs, unseen compositions: after 4 minutes on one core, 29.7 ± 1.3
meV/atom where its relaxations end, and 0.65 ± 0.05 of doing nothing in coordinates (three seeds;
docs/benchmarks.md).
"""


def get_config():
    return {
        "dynamics": {"latent": "static", "mass": "unit"},
        "data": {"frame_selection": "all"},
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
        "loss": {"energy": 5.0, "forces": 10.0},
        "train": {"batch_size": 8, "learning_rate": 2e-3, "weight_decay": 0.1},
    }
