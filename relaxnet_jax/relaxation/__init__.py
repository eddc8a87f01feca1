"""``relaxnet-jax relax``: structure files in; relaxed structures, paths and a report out."""
