"""``python -m relaxnet_jax`` runs the command line, e.g. where its script is not on the PATH."""

import sys

from relaxnet_jax.cli import main

sys.exit(main())
