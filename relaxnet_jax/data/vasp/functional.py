"""Which functional a VASP run was made with: runs of different ones have different energies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FUNCTIONAL_TAGS = ("GGA", "METAGGA", "LHFCALC", "LUSE_VDW", "IVDW", "LDAU")
_UNSET = ("", "--", "NONE", "F", ".FALSE.", "0")


def is_true(value: bytes) -> bool:
    """Whether a logical tag is on: T, .TRUE. and what else Fortran takes for it."""
    return value.strip().lstrip(b".").upper().startswith(b"T")


def functional_of(values: Mapping[str, Sequence[bytes]]) -> str:
    """VASP and the INCAR tags that change the energy, e.g. "VASP GGA=PS LDAU".

    Without GGA the functional is that of the potentials (POTCAR), which are not told apart, nor are
    the U of different elements.

    Args:
      values: of `FUNCTIONAL_TAGS`, all that the file gives: as asked for, and as used.
    """
    words = ["VASP"]
    for tag in FUNCTIONAL_TAGS:
        known = [value.strip().decode("ascii", "replace").upper() for value in values.get(tag, ())]
        value = next((v for v in known if v not in _UNSET), None)
        if value is not None:
            words.append(tag if value in ("T", ".TRUE.") else f"{tag}={value}")
    return " ".join(words)
