"""What a run fixes when it begins and keeps when resumed, however its data and start have changed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from relaxnet_jax.data.files import write_text
from relaxnet_jax.errors import InputError

FILE = "beginning.json"  # in a workdir; runs of earlier versions have none


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a run fixed when it began.

    Attributes:
      checksum: checksum of the data set.
      element_energies: (119,) eV, composition energies by atomic number.
      scale: energy scale, eV/atom.
      start: what the exported model stores about the model the run started from.
    """

    checksum: str
    element_energies: list[float]
    scale: float
    start: dict[str, Any]

    def write(self, workdir: Path) -> None:
        """Writes `FILE` in the workdir."""
        write_text(workdir / FILE, json.dumps(dataclasses.asdict(self), indent=1))

    def had(self, path: str, checksum: str) -> bool:
        """Whether the data set of this path (``data.path``) and checksum is the one the run began with.

        The set that the package generates counts as the same, whatever its checksum: its last bits differ
        from processor to processor.
        """
        return path == "emt" or checksum == self.checksum


def read_beginning(workdir: Path) -> Beginning | None:
    """Reads what `Beginning.write` wrote; None if there is no such file.

    Raises:
      InputError: the file is damaged.
    """
    file = workdir / FILE
    if not file.exists():
        return None
    try:
        return Beginning(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{file}: damaged ({type(error).__name__}): the run cannot be resumed; start in another "
            "--workdir"
        ) from None
