"""``python -m relaxnet_jax`` is the command line, where its script is not on the path."""

import sys

from relaxnet_jax.cli import main

sys.exit(main())
