"""Training: state, step, devices, checkpoints, loop."""
