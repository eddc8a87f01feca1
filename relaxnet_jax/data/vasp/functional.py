"""The functional of a VASP run; energies of runs with different ones are not comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from relaxnet_jax.data.trajectory import SPIN_POLARISED

_SETTINGS = ("GGA", "METAGGA", "LHFCALC", "LUSE_VDW", "IVDW", "LDAU", "LSORBIT")
# Tags of a hybrid functional (LHFCALC), with VASP's defaults, which are those of PBE0.
_HYBRID = {"AEXX": 0.25, "HFSCREEN": 0.0}
FUNCTIONAL_TAGS = (*_SETTINGS, *_HYBRID, "ISPIN")
_UNSET = ("", "--", "NONE", "F", ".FALSE.", "0")


def is_true(value: bytes) -> bool:
    """Whether a logical tag is on: T, .TRUE. and whatever else Fortran accepts as true."""
    return value.strip().lstrip(b".").upper().startswith(b"T")


def functional_of(values: Mapping[str, Sequence[bytes]]) -> str:
    """VASP and the INCAR tags that change the energy, e.g. "VASP GGA=PS LDAU ISPIN=2".

    Without GGA the functional is that of the potentials (POTCAR), which are not distinguished;
    neither are the values of U for different elements.

    Args:
      values: all values that the file gives for each of `FUNCTIONAL_TAGS`: as requested, and as used.
    """
    known = {
        tag: [value.strip().decode("ascii", "replace").upper() for value in values.get(tag, ())]
        for tag in FUNCTIONAL_TAGS
    }
    words = ["VASP"]
    for tag in _SETTINGS:
        value = next((v for v in known[tag] if v not in _UNSET), None)
        if value is None:
            continue
        words.append(tag if value in ("T", ".TRUE.") else f"{tag}={value}")
        if tag == "LHFCALC":
            used = {t: _used(known[t], default) for t, default in _HYBRID.items()}
            words += [f"{t}={x:g}" for t, x in used.items() if x != _HYBRID[t]]
    return " ".join(words) + (SPIN_POLARISED if _used(known["ISPIN"], 1) == 2 else "")


def _used(values: Sequence[str], default: float) -> float:
    """The last number, rounded to the four decimals of an OUTCAR; the default if there is none."""
    try:
        return round(float(values[-1]), 4)
    except (IndexError, ValueError):
        return default
