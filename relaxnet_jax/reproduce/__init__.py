"""The paper's tables and figures, each reproduced by one command: ``relaxnet-jax reproduce``.

`registry` lists the experiments. Each states which training runs it needs (`setting`, `runs`) and
turns their predictions (`lab`) into a `section`: a CSV file, figures, and a page that sets our
numbers beside the paper's and says which of its claims hold (`verdict`).
"""
