"""RelaxNet with relaxing cells (VASP's ISIF=3) and explicit latent evolution.

  relaxnet-jax train --config explicit_cell.py --set data.path=MY.h5 train.max_minutes=60

Data may mix bulk crystals whose cell changes with fixed cells, slabs and molecules. Each structure's cell is
strained only if it was strained in the data, and never across a non-periodic direction.
Cost: docs/speed.md. Scores: docs/benchmarks.md.
"""


def get_config():
    return {
        "dynamics": {
            "latent": "explicit",
            "cell": "variable",
            # How far a force moves an atom depends on the stiffness of its surroundings.
            "mass": "learned",
            "friction": True,
            "time_scale": True,
        },
        # A strain of a few percent brings pairs closer than atoms alone would.
        "graph": {"skin": 0.6},
        "model": {"triplet_features": 48},
        "loss": {
            "errors": "norm",
            "energy": 5.0,
            "monotonicity": 5.0,
            # Most frames are nearly relaxed: with lengths of errors, predicting no forces would be best.
            "huber_forces": 0.3,
            "forces": 20.0,
            "positions": 10.0,
            "direction": 0.5,
            "stress": 5.0,
            "cell": 20.0,
        },
        # Relaxations of crystals take dozens of steps: each is trained on again from a half, a quarter
        # and an eighth of them.
        "data": {"later_starts": 3},
        "train": {
            "batch_size": 8,
            "learning_rate": 2e-3,
            "weight_decay": 0.1,
            # Relaxations of crystals are few and their starts arbitrary: half of them get perturbed starts.
            "noise": 0.1,
            "strain_noise": 0.02,
        },
    }
