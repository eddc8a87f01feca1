"""RelaxNet with implicit latent evolution and the settings that the paper prints, to the letter.

  relaxnet-jax train --config paper_implicit.py --set data.path=MY.h5
  relaxnet-jax reproduce all --data MY.h5 --budget 600 --config explicit=paper_explicit.py implicit=paper_implicit.py

As printed in the paper:

- Newton's equations with atomic masses and nothing else; RK4;
- 2 DTNN layers with one MLP for each triplet, vector messages, position updates and attention;
- the energy loss per structure;
- AdamW with 5e-4 and 5e-5; the rate is multiplied by 0.8 after 8 epochs without a better loss, and training
  ends after 20; at most 1000 epochs, 64 structures per device. No averaged parameters, and no cool-down
  before a time limit.

Not printed, and therefore the defaults of relaxnet_jax.config: widths, cutoffs, basis sizes and the weights
of the loss.

Cannot be switched off, and therefore different from the paper:

- energies are learned on top of the composition's;
- embeddings start from the elements' properties;
- weight decay acts on kernels only;
- u(0) also has terms of the three-body vectors, and it has no total momentum;
- triplets see the lengths of their bonds only through the radial bases;
- positions inside the encoder act within the real cutoffs;
- means over atoms are taken over the whole batch;
- a gradient longer than train.clip_norm is clipped.

If the data have charges, add model.charges=True.

implicit.py works better.
"""


def get_config():
    return {
        "dynamics": {
            "latent": "implicit",
            "order": "second",
            "mass": "atomic",
            "friction": False,
            "time_scale": False,
            "max_speed": 0.0,
            "solver": "rk4",
            "substeps": 1,
            "rtol": 1e-3,
            "atol": 1e-3,
            "frames": 5,
        },
        "model": {
            "layers": 2,
            "interaction": "triplets",
            "attention": True,
            "vector_messages": True,
            "update_positions": True,
        },
        "loss": {"energy_per": "structure", "errors": "squared"},
        "data": {"frame_selection": "equidistant", "splits": (0.9, 0.05, 0.05)},
        "train": {
            "batch_size": 64,
            "learning_rate": 5e-4,
            "weight_decay": 5e-5,
            "plateau_factor": 0.8,
            "plateau_patience": 8,
            "early_stop_patience": 20,
            "epochs": 1000,
            "cooldown": 0.0,
            "static_epochs": 0,
            "ema": 0.0,
        },
    }
