"""What a run fixes when it begins, and goes on with whatever its data and its start are by then."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from relaxnet_jax.data.files import write_text
from relaxnet_jax.errors import InputError

FILE = "beginning.json"  # in a workdir; runs of before it was written have none


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Of a run.

    Attributes:
      checksum: of its data set. element_energies: (119,) eV, by atomic number. scale: eV/atom.
      start: what the exported model says of the model the run started from.
    """

    checksum: str
    element_energies: list[float]
    scale: float
    start: dict[str, Any]

    def write(self, workdir: Path) -> None:
        """Writes `FILE` in the workdir."""
        write_text(workdir / FILE, json.dumps(dataclasses.asdict(self), indent=1))

    def had(self, path: str, checksum: str) -> bool:
        """Whether a set (``data.path``) of this checksum is what the run began with.

        Those that the package generates differ in last bits from processor to processor, and are the same.
        """
        return path == "emt" or checksum == self.checksum


def read_beginning(workdir: Path) -> Beginning | None:
    """What `Beginning.write` wrote; None where there is no such file.

    Raises:
      InputError: it is damaged.
    """
    file = workdir / FILE
    if not file.exists():
        return None
    try:
        return Beginning(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{file}: damaged ({type(error).__name__}): the run cannot be gone on with; start in another "
            "--workdir"
        ) from None
