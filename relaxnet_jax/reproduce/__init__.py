"""The paper's tables and figures, each by one command: ``relaxnet-jax reproduce``.

`registry` names the experiments. Each says which training runs it needs (`setting`, `runs`) and
turns what they predict (`lab`) into a `section`: a CSV file, figures, and a page that sets our
numbers beside the paper's and says which of its claims hold (`verdict`).
"""
