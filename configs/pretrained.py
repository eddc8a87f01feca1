"""The model that comes with the package: crystals whose cells may relax, on CHGNet's energy surface.

  relaxnet-jax train --config pretrained.py --set data.path=crystals train.max_minutes=55

"crystals" is the folder of two stores that the model card's commands make (docs/pretrained.md, which
also has the scores). To fine-tune it on data of your own:

  relaxnet-jax train --config pretrained.py --workdir runs/mine \\
      --set data.path=mine.h5 train.start_from=pretrained train.learning_rate=5e-4
"""


def get_config():
    return {
        "dynamics": {
            "latent": "explicit",
            "cell": "variable",
            "mass": "unit",
            "friction": True,
            "time_scale": True,
        },
        "graph": {"skin": 0.6},
        "model": {"triplet_features": 48},
        "loss": {
            "errors": "norm",
            "energy": 5.0,
            "monotonicity": 5.0,
            "forces": 1.0,
            "positions": 10.0,
            "direction": 0.5,
            "stress": 5.0,
            "cell": 20.0,
        },
        "train": {
            "batch_size": 8,
            "learning_rate": 2e-3,
            "weight_decay": 0.1,
            "noise": 0.04,
            "strain_noise": 0.02,
        },
    }
