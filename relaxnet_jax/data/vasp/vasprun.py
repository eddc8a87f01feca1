"""Reading a vasprun.xml in one pass, with one ionic step in memory.

VASP writes each tag of interest on a line of its own, so the file is scanned for the few blocks that
a relaxation needs. Densities of states, eigenvalues and projections, which are nearly all of a large
file, are skipped up to their closing tag without being parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import IO, Literal, NamedTuple

import numpy as np

from relaxnet_jax.data.trajectory import (
    UNFINISHED,
    RelaxationTrajectory,
    reduced_formula,
    sound_and_unwrapped,
)
from relaxnet_jax.data.vasp.electronic import tell_unconverged
from relaxnet_jax.data.vasp.functional import FUNCTIONAL_TAGS, functional_of, is_true
from relaxnet_jax.data.vasp.unfinished import Cut, NoRelaxation, remark, too_few
from relaxnet_jax.errors import InputError

Energy = Literal["free", "sigma0", "internal"]
ENERGIES: dict[Energy, bytes] = {
    "free": b"e_fr_energy",
    "sigma0": b"e_0_energy",
    "internal": b"e_wo_entrp",
}

_CHUNK = 1 << 20
_LONGEST_TAG = 512
_LARGEST_BLOCK = 1 << 28  # bytes; far beyond any structure VASP can relax
KILOBAR = 1e-1 / 160.21766208  # eV/Å³; ASE's value of 0.1 GPa
_SKIPPED = (b"dos", b"eigenvalues", b"projected", b"kpoints", b"dielectricfunction", b"dynmat")
_TAG = re.compile(
    rb"<(/?(?:modeling|calculation|atominfo|structure|varray|energy|scstep|"
    + b"|".join(_SKIPPED)
    + rb"))\b([^<>]*)>|<[iv]\b[^<>]*name=\"(IBRION|ISIF|LATTICE_CONSTRAINTS|NELM|PSTRESS|IMAGES|"
    + rb"ML_LMLFF|ML_FF_LMLFF|"
    + b"|".join(tag.encode() for tag in FUNCTIONAL_TAGS)
    + rb")\"[^<>]*>([^<>]*)</[iv]>"
)
_NAME = re.compile(rb'name\s*=\s*"([^"]*)"')
_VECTORS = re.compile(rb"<v[^<>]*>([^<>]*)</v>")
_ATOM = re.compile(rb"<rc>\s*<c>([^<>]*)</c>\s*<c>[^<>]*</c>\s*</rc>")
# Runs that are not relaxations, by IBRION (1, 2 and 3 are). -1 and 0 with few steps are handled by the
# number of frames.
_NO_RELAXATION = {
    0: "molecular dynamics",
    5: "finite differences for phonons",
    6: "finite differences for phonons",
    7: "perturbation theory for phonons",
    8: "perturbation theory for phonons",
    40: "an intrinsic reaction coordinate",
    44: "the dimer method",
}
# What a relaxation with these ISIF holds fixed besides the atoms of selective dynamics; 0, 1 and 2
# hold the cell, 3 nothing. 8 is an option of VASP 6.4.
_HELD = {
    4: "the volume",
    5: "positions and volume",
    6: "the positions",
    7: "positions and the cell's shape",
    8: "the cell's shape",
}


class _Step(NamedTuple):
    """One ionic step.

    Attributes:
      cell: (3, 3), Å.
      fractional: (N, 3), fractional coordinates.
      energy: eV.
      forces: (N, 3), eV/Å.
      stress: (6,), eV/Å³ in ASE's sign convention, or None.
      n_electronic: number of electronic steps.
    """

    cell: np.ndarray
    fractional: np.ndarray
    energy: float
    forces: np.ndarray
    stress: np.ndarray | None
    n_electronic: int


class _Scanner:
    """Searches a binary stream for tags and forgets what it has passed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._buffer, self._at = file, b"", 0

    def _more(self) -> bool:
        """Reads the next chunk; False at the end of the file."""
        chunk = self._file.read(_CHUNK)
        self._buffer, self._at = self._buffer[self._at :] + chunk, 0
        return bool(chunk)

    def tag(self) -> re.Match[bytes] | None:
        """The next tag of interest; None at the end of the file."""
        while True:
            match = _TAG.search(self._buffer, self._at)
            if match:
                self._at = match.end()
                return match
            # A tag may lie across the boundary.
            self._at = max(self._at, len(self._buffer) - _LONGEST_TAG)
            if not self._more():
                return None

    def until(self, end: bytes, keep: bool = True) -> bytes:
        """The text before ``end`` (b"" if it is not kept).

        Raises:
          Cut: the file ends first, without its own end tag.
          InputError: an ionic step or the file's end tag comes first, so ``end`` is missing.
        """
        searched = self._at
        while True:
            found = self._buffer.find(end, searched)
            upto = found if found >= 0 else len(self._buffer)
            if self._buffer.find(b"calculation>", max(searched - 12, self._at), upto) >= 0:
                raise InputError(f"no {end.decode()} before the next ionic step: file damaged")
            if found >= 0:
                text = self._buffer[self._at : found] if keep else b""
                self._at = found + len(end)
                return text
            if not keep:
                self._at = max(self._at, len(self._buffer) - _LONGEST_TAG)
            elif len(self._buffer) - self._at > _LARGEST_BLOCK:
                raise InputError(f"no {end.decode()} within 256 MB: the file is damaged")
            searched = max(len(self._buffer) - self._at - len(end), 0)
            if not self._more():
                if b"</modeling>" in self._buffer:
                    raise InputError(f"no {end.decode()} before the end of the file: file damaged")
                raise Cut


def read_vasprun(
    file: IO[bytes],
    name: str,
    energy: Energy = "free",
    source: str | None = None,
    note: Callable[[str], None] | None = None,
) -> RelaxationTrajectory:
    """Reads the relaxation of a vasprun.xml.

    Positions are unwrapped; forces are raw; stresses have ASE's sign. The energy of an ionic step is
    that of its last electronic step. The complete ionic steps of a run that did not finish are kept
    (see `unfinished`), and so are electronically unconverged ones before the last (see `electronic`),
    i.e. those with as many electronic steps as NELM allows.

    Args:
      file: the file, opened in binary mode and decompressed.
      name: id of the relaxation.
      energy: "free" (TOTEN, consistent with the forces), "sigma0" (extrapolated to zero
        smearing) or "internal" (without entropy).
      source: ``source`` of the relaxation; VASP and its functional by default, see `functional_of`.
      note: called with one line if the run did not finish, and if it has unconverged ionic steps.

    Raises:
      NoRelaxation: the run is of another kind or under pressure, uses a machine-learned force field, has a single ionic
        step, or holds an atom in some directions only, all positions, or a part of the cell; or its
        last ionic step is electronically unconverged.
      InputError: the file holds fewer than two complete ionic steps or is damaged; the message is one
        line without the name of the file.
    """
    say = note or (lambda _: None)
    parser = _Parser(_Scanner(file), energy)
    try:
        steps = list(parser.steps())
    except (ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"ionic step {parser.done}: {error}: the file is damaged") from error
    if len(steps) < 2:
        whole = not parser.cut and steps
        raise (NoRelaxation if whole else InputError)(too_few(len(steps), parser.cut))
    at_nelm = tell_unconverged([0 < parser.nelm <= step.n_electronic for step in steps], say)
    if parser.cut:
        say(remark(len(steps)))
    assert parser.numbers is not None
    cells = np.array([step.cell for step in steps])
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused below
        positions = np.array([step.fractional @ step.cell for step in steps])
    stresses = [step.stress for step in steps if step.stress is not None]
    source = (functional_of(parser.functional) if source is None else source) + at_nelm
    trajectory = RelaxationTrajectory(
        id=name,
        atomic_numbers=parser.numbers,
        positions=positions,
        cells=cells,
        pbc=np.ones(3, dtype=bool),
        energies=np.array([step.energy for step in steps]),
        forces=np.array([step.forces for step in steps]),
        fixed_mask=parser.fixed,
        group=reduced_formula(parser.numbers),
        stresses=np.array(stresses) if len(stresses) == len(steps) else None,
        source=source + UNFINISHED if parser.cut else source,
    )
    return sound_and_unwrapped(trajectory)


class _Parser:
    """Turns tags into ionic steps.

    Attributes:
      numbers: (N,) atomic numbers, None until they have been read.
      fixed: (N,) bool, atoms held fixed by selective dynamics.
      done: number of complete ionic steps so far.
      cut: where the file ends if it is truncated, else "".
      nelm: NELM, 0 if it is not given.
      functional: values of INCAR tags, for `functional_of`.
    """

    def __init__(self, scanner: _Scanner, energy: Energy) -> None:
        self._scanner, self._energy = scanner, ENERGIES[energy]
        self.numbers: np.ndarray | None = None
        self.fixed: np.ndarray = np.zeros(0, dtype=bool)
        self.done = 0
        self.cut = ""
        self.nelm = 0
        self.functional: dict[str, list[bytes]] = {}
        self._inside = b""
        self._isif, self._constraints = 0, b""

    def steps(self) -> Iterator[_Step]:
        """Yields the complete ionic steps; raises InputError at damage other than truncation."""
        try:
            yield from self._steps()
        except Cut:
            self.cut = f"inside <{self._inside.decode()}>"

    def _steps(self) -> Iterator[_Step]:
        step: dict[str, np.ndarray] | None = None
        electronic: list[dict[bytes, float]] = []
        final: dict[bytes, float] = {}
        in_electronic = whole = False
        while (match := self._scanner.tag()) is not None:
            tag, attributes = match[1], match[2]
            if tag is None:
                self._read_setting(match[3].decode(), match[4])
            elif tag in _SKIPPED:
                self._upto(tag, keep=False)
            elif tag == b"atominfo":
                self._read_atoms(self._block(tag))
            elif tag == b"structure":
                name = _NAME.search(attributes)
                block = self._block(tag)
                if step is not None and name is None:
                    step["cell"] = self._vectors(block, b"basis", 3)
                    step["fractional"] = self._vectors(block, b"positions", self._n_atoms)
                elif name is not None and name[1] == b"initialpos":
                    self._read_fixed(block)
            elif tag in (b"calculation", b"/calculation") and (step is None) != (
                tag == b"calculation"
            ):
                raise InputError(
                    f"ionic step {self.done}: <calculation> and </calculation> do not match: the "
                    "file is damaged"
                )
            elif tag == b"calculation":
                step, electronic, final = {}, [], {}
            elif tag in (b"scstep", b"/scstep"):
                in_electronic = tag == b"scstep"
            elif step is None:
                whole |= tag == b"/modeling"
            elif tag == b"energy":
                found = _energies(self._block(tag))
                if in_electronic:
                    electronic.append(found)
                else:
                    final = found
            elif tag == b"varray":
                name = _NAME.search(attributes)
                if name is not None and name[1] in (b"forces", b"stress"):
                    rows = self._n_atoms if name[1] == b"forces" else 3
                    step[name[1].decode()] = _rows(self._block(tag), name[1], rows)
            elif tag == b"/calculation":
                yield self._finish(step, electronic, final)
                step, self.done = None, self.done + 1
        if step is not None and whole:
            raise InputError(f"ionic step {self.done}: no </calculation>: the file is damaged")
        if not whole:
            self.cut = "without </modeling>"

    def _read_setting(self, name: str, value: bytes) -> None:
        """Handles a tag of the INCAR, as requested or as used."""
        if name == "IBRION":
            check_ibrion(int(value))
        elif name == "ISIF":
            self._isif = int(value)
            check_isif(self._isif, self._constraints)
        elif name == "LATTICE_CONSTRAINTS":
            self._constraints = value
            check_isif(self._isif, self._constraints)
        elif name == "NELM":
            # The NELM of response functions comes later under the same name.
            self.nelm = self.nelm or int(value)
        elif name == "PSTRESS":
            check_pressure(value)
        elif name == "IMAGES":
            check_images(int(value))
        elif name in ("ML_LMLFF", "ML_FF_LMLFF"):
            check_force_field(is_true(value))
        else:
            self.functional.setdefault(name, []).append(value)

    def _block(self, tag: bytes) -> bytes:
        """The text up to the closing tag."""
        text = self._upto(tag)
        if b"<" + tag in text:
            raise InputError(
                f"ionic step {self.done}: <{tag.decode()}> inside <{tag.decode()}>: file damaged"
            )
        return text

    def _upto(self, tag: bytes, keep: bool = True) -> bytes:
        """Moves past the closing tag, see `_Scanner.until`."""
        self._inside = tag
        return self._scanner.until(b"</" + tag + b">", keep)

    @property
    def _n_atoms(self) -> int:
        if self.numbers is None:
            raise InputError("no <atominfo> before the first structure: the file is damaged")
        return len(self.numbers)

    def _read_atoms(self, block: bytes) -> None:
        from ase.data import atomic_numbers

        # atominfo holds two arrays: the atoms, then their types.
        start = block.find(b'name="atoms"')
        atoms = block[start : block.find(b"</array>", start)] if start >= 0 else b""
        symbols = [text.strip().decode("ascii", "replace") for text in _ATOM.findall(atoms)]
        # VASP truncates some symbols to two columns of the POTCAR's title.
        symbols = [{"r": "Zr", "X": "Xe"}.get(symbol, symbol) for symbol in symbols]
        unknown = sorted({s for s in symbols if s not in atomic_numbers or s == "X"})
        if unknown or not symbols:
            raise InputError(f"<atominfo>: elements {', '.join(unknown) or 'none'}: file damaged")
        self.numbers = np.array([atomic_numbers[s] for s in symbols], dtype=np.int64)
        self.fixed = np.zeros(len(symbols), dtype=bool)

    def _read_fixed(self, block: bytes) -> None:
        selective = _varray(block, b"selective")
        if selective is None:
            return
        flags = [text.split() for text in _VECTORS.findall(selective)]
        if len(flags) != self._n_atoms or any(
            len(row) != 3 or set(row) - {b"T", b"F"} for row in flags
        ):
            raise InputError("selective dynamics: not three flags T or F per atom: file damaged")
        held = np.array([[flag == b"F" for flag in row] for row in flags])
        if np.any(held.any(1) & ~held.all(1)):
            raise NoRelaxation(
                "selective dynamics: an atom is held in some directions only: fix or free it"
            )
        self.fixed = np.all(held, axis=1)

    def _vectors(self, block: bytes, name: bytes, rows: int) -> np.ndarray:
        text = _varray(block, name)
        if text is None:
            raise InputError(f"ionic step {self.done}: no {name.decode()}: the file is damaged")
        return _rows(text, name, rows)

    def _finish(
        self,
        step: dict[str, np.ndarray],
        electronic: list[dict[bytes, float]],
        final: dict[bytes, float],
    ) -> _Step:
        for field in ("cell", "fractional", "forces"):
            if field not in step:
                raise InputError(f"ionic step {self.done}: no {field}: the file is damaged")
        free = final.get(b"e_fr_energy", electronic[-1].get(b"e_fr_energy") if electronic else None)
        if free is None:
            raise InputError(f"ionic step {self.done}: no free energy: the file is damaged")
        if self._energy == b"e_fr_energy":
            energy = free
        else:
            # VASP before 5.4 writes other numbers under these names in the final block; those of the
            # last electronic step are right, up to what is added after it (van der Waals terms).
            last = electronic[-1] if electronic else final
            if self._energy not in last or b"e_fr_energy" not in last:
                raise InputError(f"ionic step {self.done}: no {self._energy.decode()}")
            energy = free + last[self._energy] - last[b"e_fr_energy"]
        stress = step.get("stress")
        if stress is not None:
            stress = stress_of(stress)
        n_electronic = len(electronic)
        return _Step(step["cell"], step["fractional"], energy, step["forces"], stress, n_electronic)


def _varray(block: bytes, name: bytes) -> bytes | None:
    """Text of the varray of the given name."""
    match = re.search(rb'<varray\s[^<>]*name="' + name + rb'"[^<>]*>(.*?)</varray>', block, re.S)
    return match[1] if match else None


def _rows(text: bytes, name: bytes, rows: int) -> np.ndarray:
    """Parses (rows, 3) numbers of a varray; raises InputError if that fails."""
    found = _VECTORS.findall(text)
    tokens = b" ".join(found).split()
    if len(found) != rows or len(tokens) != 3 * rows:
        raise InputError(
            f"{name.decode()}: {len(tokens)} numbers in {len(found)} rows instead of {rows} rows of "
            "3: the file is damaged"
        )
    try:
        return np.array(tokens, dtype="S").astype(np.float64).reshape(rows, 3)
    except ValueError:
        bad = next(t for t in tokens if not is_number(t)).decode("ascii", "replace")
        raise InputError(
            f"{name.decode()}: {bad!r} is not a number: too wide for VASP's format, or the file is "
            "damaged"
        ) from None


def stress_of(kilobar: np.ndarray) -> np.ndarray:
    """Converts VASP's stress to ASE's convention.

    Args:
      kilobar: (3, 3) stress in kB with the sign of a pressure.

    Returns:
      (6,) stress in eV/Å³, Voigt order, tension positive.
    """
    return -KILOBAR * kilobar.reshape(9)[[0, 4, 8, 5, 2, 1]]


def check_ibrion(ibrion: int) -> None:
    """Raises NoRelaxation if a run with this IBRION is not a relaxation."""
    if ibrion in _NO_RELAXATION:
        raise NoRelaxation(
            f"IBRION={ibrion}, {_NO_RELAXATION[ibrion]}: give a relaxation (IBRION 1, 2 or 3)"
        )


def check_isif(isif: int, constraints: bytes = b"") -> None:
    """Raises NoRelaxation if a run held all positions or a part of the cell.

    Args:
      isif: value of ISIF.
      constraints: value of LATTICE_CONSTRAINTS, b"" if not given; it does not matter if the cell is
        fixed.
    """
    if isif in _HELD:
        held, remedy = f"ISIF={isif} held {_HELD[isif]}", "give one with ISIF 2 or 3"
    elif isif == 3 and b"F" in constraints.upper():
        flags = b" ".join(constraints.split()).decode("ascii", "replace")
        held = f"LATTICE_CONSTRAINTS={flags} held part of the cell"
        remedy = "give one without them"
    else:
        return
    raise NoRelaxation(
        f"{held}: only relaxations of the positions, or of the positions and the whole cell, can be "
        f"used; {remedy}"
    )


def check_images(images: int) -> None:
    """Raises NoRelaxation if a run with this number of IMAGES is not a relaxation."""
    if images > 0:
        raise NoRelaxation("IMAGES, a path of images (NEB): give a relaxation")


def check_force_field(on: bool) -> None:
    """Raises NoRelaxation if a machine-learned force field was ``on``.

    While such a force field is trained, some steps are DFT and others are not.
    """
    if on:
        raise NoRelaxation(
            "made by a machine-learned force field (ML_LMLFF), wholly or in part: give a run with DFT "
            "only"
        )


def check_pressure(kilobar: bytes) -> None:
    """Raises NoRelaxation if PSTRESS is not zero, i.e. the run was relaxed under pressure."""
    if is_number(kilobar) and float(kilobar) != 0:
        raise NoRelaxation(
            f"PSTRESS={float(kilobar):g} kB: it minimises the enthalpy, and its stress is not that of "
            "the energy; give a relaxation without external pressure"
        )


def is_number(token: bytes) -> bool:
    """Whether Python can parse the token as a number."""
    try:
        float(token)
    except ValueError:
        return False
    return True


def _energies(block: bytes) -> dict[bytes, float]:
    """Energies by name, eV; those that VASP had no room to print are left out."""
    pairs = re.findall(rb'<i\s+name="(\w+)"[^<>]*>([^<>]*)</i>', block)
    return {key: float(text) for key, text in pairs if is_number(text)}
