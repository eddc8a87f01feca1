"""A direct predictor: the final positions and energy from one pass of the encoder.

  relaxnet-jax train --config static_final.py --set data.path=MY.h5 train.max_minutes=60
  relaxnet-jax train --config static_final.py --set model.architecture=egnn data.path=MY.h5

The displacement is what u(0) of the ODE would be, and the energy is that of the final structure. The frames
in between lie on a straight line, with the final energy. No forces are predicted. The encoder, its sizes and
the errors in the loss are those of explicit.py. With dynamics.cell=variable loss.stress=0 loss.cell=20, the
final cell is predicted too.

Score on 1,141 relaxations of 12-atom DFT slabs, unseen compositions: after 2 minutes on one core,
0.297 ± 0.003 of doing nothing in coordinates and 29.9 ± 2.4 meV/atom (three seeds; docs/benchmarks.md).
"""


def get_config():
    return {
        "dynamics": {"latent": "direct", "mass": "unit"},
        "model": {"triplet_features": 48},
        "loss": {
            "errors": "norm",
            "energy": 5.0,
            "forces": 0.0,
            "positions": 20.0,
            "direction": 0.5,
        },
        "train": {"batch_size": 8, "learning_rate": 2e-3, "weight_decay": 0.1},
    }
