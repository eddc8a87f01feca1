"""Reading an OUTCAR in one pass, with one ionic step in memory.

Few lines of an OUTCAR are of interest, and each begins with distinctive words. The text is searched
for these words chunk by chunk, and what lies between is never split into lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple, NoReturn

import numpy as np

from relaxnet_jax.data.trajectory import (
    UNFINISHED,
    RelaxationTrajectory,
    reduced_formula,
    sound_and_unwrapped,
)
from relaxnet_jax.data.vasp.electronic import tell_unconverged
from relaxnet_jax.data.vasp.functional import functional_of, is_true
from relaxnet_jax.data.vasp.outcar_lines import FUNCTIONAL_MARKS, Scanner, table
from relaxnet_jax.data.vasp.unfinished import Cut, NoRelaxation, remark, too_few
from relaxnet_jax.data.vasp.vasprun import (
    KILOBAR,
    Energy,
    check_force_field,
    check_ibrion,
    check_images,
    check_isif,
    check_pressure,
    is_number,
)
from relaxnet_jax.errors import InputError

# Written at each ionic step of an NEB image between the ends, by VASP's own method and by VTST's.
# ("CHAIN: Running the NEB" does not serve, as builds with VTST write it in every run.)
_BAND = (b"energy of chain is (eV)", b"NEB: projections on to tangent")
_SYMBOL = re.compile(rb"[A-Z][a-z]?(?![A-Za-z])")


class _Step(NamedTuple):
    """One ionic step.

    Attributes:
      cell: (3, 3), Å.
      own_cell: whether the cell was printed for this very step.
      positions: (N, 3), Å.
      energy: eV.
      forces: (N, 3), eV/Å.
      stress: (6,), eV/Å³ in ASE's sign convention, or None.
      converged: whether the electronic minimisation converged, judged by NELM and by what VASP
        reports; None if it reports nothing.
    """

    cell: np.ndarray
    own_cell: bool
    positions: np.ndarray
    energy: float
    forces: np.ndarray
    stress: np.ndarray | None
    converged: bool | None


def read_outcar(
    file: IO[bytes],
    name: str,
    energy: Energy = "free",
    source: str | None = None,
    fixed: np.ndarray | None = None,
    note: Callable[[str], None] | None = None,
) -> RelaxationTrajectory:
    """Reads the relaxation of an OUTCAR.

    Positions are unwrapped; forces are raw; stresses have ASE's sign. Positions have the five
    decimals of an OUTCAR (a vasprun.xml has more). The energy of an ionic step is that after its last
    electronic step, converged or not, as in `vasprun.read_vasprun`. The complete ionic steps of a run
    that did not finish are kept (see `unfinished`), and so are electronically unconverged ones before
    the last (see `electronic`). ``charges`` are the net charges of the PAW spheres from the last
    "total charge" table (see `Outcar.charges`), None if there is no table.

    Args:
      file: the file, opened in binary mode and decompressed.
      name: id of the relaxation.
      energy: "free" (TOTEN, consistent with the forces), "sigma0" (extrapolated to zero
        smearing) or "internal" (without entropy).
      source: ``source`` of the relaxation; VASP and its functional by default, see `functional_of`.
      fixed: (N,) bool, True where selective dynamics held the atom. An OUTCAR does not name these
        atoms; if ``fixed`` is None, no atom is taken as fixed.
      note: called with one line for each thing left out or assumed.

    Raises:
      InputError: the file is not a relaxation of two or more complete ionic steps, or is damaged; the
        message is one line without the name of the file.
    """
    say = note or (lambda _: None)
    run = Outcar(file, energy)
    steps = list(run.steps())
    if len(steps) < 2:
        raise (NoRelaxation if run.finished and steps else InputError)(too_few(len(steps)))
    if len({step.own_cell for step in steps}) > 1:
        missing = [step.own_cell for step in steps].index(False)
        raise InputError(f"ionic step {missing}: no lattice vectors: the file is damaged")
    at_nelm = tell_unconverged(_unconverged(steps), say)
    if not run.finished:
        say(remark(len(steps)))
    if run.charges_fault:
        say(f"charges left out: {run.charges_fault}")
    numbers = run.numbers
    if fixed is not None and fixed.shape != numbers.shape:
        raise InputError(f"{len(numbers)} atoms, but {len(fixed)} flags of selective dynamics")
    if fixed is None and run.selective:
        say(
            "selective dynamics, but an OUTCAR does not name the fixed atoms: none is taken as "
            "fixed; put the run's POSCAR beside it"
        )
    stresses = [step.stress for step in steps if step.stress is not None]
    source = (functional_of(run.functional) if source is None else source) + at_nelm
    trajectory = RelaxationTrajectory(
        id=name,
        atomic_numbers=numbers,
        positions=np.array([step.positions for step in steps]),
        cells=np.array([step.cell for step in steps]),
        pbc=np.ones(3, dtype=bool),
        energies=np.array([step.energy for step in steps]),
        forces=np.array([step.forces for step in steps]),
        fixed_mask=np.zeros(len(numbers), dtype=bool) if fixed is None else fixed,
        group=reduced_formula(numbers),
        stresses=np.array(stresses) if len(stresses) == len(steps) else None,
        charges=run.charges,
        source=source if run.finished else source + UNFINISHED,
    )
    return sound_and_unwrapped(trajectory)


def _unconverged(steps: list[_Step]) -> list[bool]:
    """For each ionic step, whether its electronic minimisation did not converge."""
    # VASP reports convergence at each step or, in some versions and for some algorithms, at none.
    said = any(step.converged for step in steps)
    return [not step.converged if said else step.converged is False for step in steps]


class Outcar:
    """The ionic steps of an OUTCAR, and what else is known once they have been read.

    Attributes:
      done: number of complete ionic steps so far.
      finished: whether VASP reached its end and wrote its timings.
      selective: whether selective dynamics was on.
      charges: (N,) net charge of each atom's PAW sphere (radius RWIGS), e: the charge ZVAL of its core
        minus the electrons in it, which are the column "tot" of the last table "total charge". The
        spheres neither fill space nor overlap equally, and what lies between them is assigned to no
        atom. The charges therefore depend on RWIGS, do not add up to that of the cell, and may be
        positive even for anions. None without a table (LORBIT not set).
      charges_fault: why there are no charges although there is a table, or "".
      functional: values of INCAR tags, for `functional_of`.
    """

    def __init__(self, file: IO[bytes], energy: Energy = "free") -> None:
        self._scanner, self._energy = Scanner(file), energy
        self._titles: list[bytes] = []
        self._valences: list[bytes] = []
        self._n_ions: int | None = None
        self._counts: list[int] | None = None
        self._cores: list[float] = []
        self._numbers: np.ndarray | None = None
        self._table: tuple[np.ndarray | None, str] = (None, "")
        self._nelm = 0
        self._isif, self._constraints = 0, b""
        self.done = 0
        self.finished = self.selective = False
        self.functional: dict[str, list[bytes]] = {}
        self.charges: np.ndarray | None = None
        self.charges_fault = ""

    @property
    def numbers(self) -> np.ndarray:
        """(N,) atomic numbers; raises InputError if the head of the file is damaged."""
        if self._numbers is None:
            self._numbers = self._read_numbers()
        return self._numbers

    def steps(self) -> Iterator[_Step]:
        """Yields the complete ionic steps; raises InputError at damage other than truncation."""
        try:
            yield from self._steps()
        except Cut:
            if self.finished:
                self._fail("ends inside a table")
        if self.finished:
            self.charges, self.charges_fault = self._net_charges()

    def _fail(self, what: str) -> NoReturn:
        raise InputError(f"ionic step {self.done}: {what}: the file is damaged")

    def _steps(self) -> Iterator[_Step]:
        cell: np.ndarray | None = None
        iteration: int | None = None
        own_cell = False
        n_electronic = 0
        stress = placed = free = reached = None
        while (hit := self._scanner.line()) is not None:
            mark, line = hit
            if mark == b" Iteration ":
                number = re.match(rb" Iteration\s+(\d+)\(\s*(\d*)", line)
                iteration = int(number[1]) if number else None
                n_electronic = int(number[2] or 0) if number else 0
            elif mark == b" aborting loop ":
                reached = b"EDIFF is reached" in line
            elif mark == b"total charge":
                if line.split() == [b"total", b"charge"]:
                    self._table = self._read_charges()
            elif mark == b"in kB":
                values = table([line[5:]], 6, f"ionic step {self.done}: stress")[0]
                stress = -KILOBAR * values[[0, 1, 2, 4, 5, 3]]
            elif mark == b"direct lattice vectors":
                cell, own_cell = self._read_cell(), iteration is not None
            elif mark == b"POSITION  ":
                if b"TOTAL-FORCE" not in line:
                    continue
                check_force_field(b"(ML)" in line)
                if placed is not None:
                    self._fail("no energy")
                placed = self._read_atoms()
            elif mark == b"free  energy":
                match = re.match(rb"free  energy\s+TOTEN\s*=\s*(\S+)\s+eV", line)
                if match is None or placed is None or free is not None:
                    self._fail(
                        "no positions and forces" if match and placed is None else "free energy"
                    )
                free = match[1]
            elif mark == b"energy  without entropy":
                match = re.match(
                    rb"energy  without entropy\s*=\s*(\S+)\s+energy\(sigma->0\)\s*=\s*(\S+)", line
                )
                if match is None or free is None or placed is None or cell is None:
                    missing = "no lattice vectors" if match and free and placed else "energies"
                    self._fail(missing)
                if iteration is not None and iteration != self.done + 1:
                    self._fail(f"the file counts it as {iteration - 1}")
                token = {"free": free, "internal": match[1], "sigma0": match[2]}[self._energy]
                if not is_number(token):
                    self._fail(f"energy {token.decode('ascii', 'replace')!r} is not a number")
                self.charges, self.charges_fault = self._net_charges()
                # VASP 5 also reports that EDIFF is reached when NELM was.
                converged = False if 0 < self._nelm <= n_electronic else reached
                forces = placed[:, 3:]
                yield _Step(cell, own_cell, placed[:, :3], float(token), forces, stress, converged)
                self.done += 1
                own_cell, n_electronic = False, 0
                stress = placed = free = reached = None
            elif mark in _BAND:
                check_images(1)
            elif mark == b"General timing and accounting":
                self.finished = True
            else:
                self._read_head(mark, line)
        if self.finished and placed is not None:
            self._fail("no energy")

    def _read_head(self, mark: bytes, line: bytes) -> None:
        if mark == b"TITEL  =":
            self._titles.append(line[len(mark) :])
        elif mark == b"VRHFIN =":
            self._valences.append(line[len(mark) :])
        elif mark == b"LDA+U is selected":
            self.functional["LDAU"] = [b"T"]
        elif mark in FUNCTIONAL_MARKS:
            tag, _, value = line.partition(b"=")
            self.functional.setdefault(tag.strip().decode(), []).append(
                value.strip().split(b" ")[0]
            )
        elif mark == b"IVDW ":
            if match := re.match(rb"IVDW\s*=\s*(\d+)", line):
                self.functional.setdefault("IVDW", []).append(match[1])
        elif mark == b"PSTRESS=":
            if match := re.match(rb"PSTRESS=\s*(\S+)", line):
                check_pressure(match[1])
        elif mark == b"using selective dynamics":
            self.selective = True
        elif mark == b"IBRION =":
            match = re.match(rb"IBRION =\s*(-?\d+)\s+ionic relax", line)
            if match:
                check_ibrion(int(match[1]))
        elif mark == b"NELM   =":
            if match := re.match(rb"NELM   =\s*(\d+);", line):
                self._nelm = int(match[1])
        elif mark == b"ISIF   =":
            if match := re.match(rb"ISIF   =\s*(\d+)\s+stress and relax", line):
                self._isif = int(match[1])
                check_isif(self._isif, self._constraints)
        elif mark == b"LATTICE_CONSTRAINTS":
            self._constraints = re.split(rb"[#!;]", line.partition(b"=")[2])[0]
            check_isif(self._isif, self._constraints)
        elif mark in (b"ML_LMLFF", b"ML_FF_LMLFF"):
            check_force_field(is_true(line.partition(b"=")[2]))
        elif mark == b"number of dos":
            match = re.search(rb"NIONS\s*=\s*(\d+)", line)
            self._n_ions = int(match[1]) if match else None
        elif mark == b"ions per type":
            if self._counts is not None:
                raise InputError("two runs in one file: give each its own file")
            text = self._numbers_from(line)
            if not re.fullmatch(rb"[\s\d]*", text):
                raise InputError("'ions per type': not all numbers: the file is damaged")
            self._counts = [int(token) for token in text.split()]
        elif mark == b"ZVAL   =":
            # Six columns wide each, so that numbers touch if they fill their field.
            self._cores = [float(x) for x in re.findall(rb"\d+\.\d\d", self._numbers_from(line))]

    def _numbers_from(self, line: bytes) -> bytes:
        """The text after "=", and the following lines that continue it with nothing but numbers."""
        text = line.partition(b"=")[2]
        while re.fullmatch(rb"[\s\d.]*\d[\s\d.]*", self._scanner.peek()):
            text += b" " + self._scanner.lines(1)[0]
        return text

    def _net_charges(self) -> tuple[np.ndarray | None, str]:
        """Net charges from the table read last, or why there are none."""
        electrons, fault = self._table
        if electrons is None:
            return None, fault
        counts = self._counts or []
        if len(self._cores) != len(counts):
            return None, f"{len(self._cores)} core charges ZVAL for {len(counts)} kinds of atoms"
        return np.repeat(self._cores, counts) - electrons, ""

    def _read_numbers(self) -> np.ndarray:
        from ase.data import atomic_numbers

        counts = self._counts or []
        n_atoms = sum(counts)
        if not n_atoms or (self._n_ions is not None and n_atoms != self._n_ions):
            raise InputError(
                f"'ions per type' gives {n_atoms} atoms, NIONS {self._n_ions}: the file is damaged"
            )
        # Titles are "PAW_PBE Li_sv 10Sep2004", once per type; valences "Li: 1s2s2p".
        titles = [[w for w in re.split(rb"\s+", t.strip()) if w] for t in self._titles]
        named = [_element([re.split(rb"[_.\d]", w)[0] for w in words[:2]]) for words in titles]
        valences = [_element([text.partition(b":")[0].strip()]) for text in self._valences]
        lists = [found for found in (named, valences) if len(found) == len(counts)]
        symbols = [{symbol for symbol in found if symbol} for found in zip(*lists)]
        if not symbols or any(len(found) != 1 for found in symbols):
            raise InputError(
                f"elements of {len(counts)} kinds of atoms: TITEL gives "
                f"{' '.join(s or '?' for s in named) or 'none'}, VRHFIN "
                f"{' '.join(s or '?' for s in valences) or 'none'}: the file is damaged"
            )
        kinds = np.array([atomic_numbers[found.pop()] for found in symbols], dtype=np.int64)
        return np.repeat(kinds, counts)

    def _read_cell(self) -> np.ndarray:
        rows = table(self._scanner.lines(3), 6, f"ionic step {self.done}: lattice vectors")
        cell, reciprocal = rows[:, :3], rows[:, 3:]
        if not np.allclose(cell @ reciprocal.T, np.eye(3), atol=1e-4):
            self._fail("lattice and reciprocal lattice vectors disagree")
        return cell

    def _read_atoms(self) -> np.ndarray:
        """(N, 6) array: positions, Å, and forces, eV/Å."""
        n_atoms = len(self.numbers)
        rule, *rows, end = self._scanner.lines(n_atoms + 2)
        if rule.strip(b" -\r") or end.strip(b" -\r") or not end.strip():
            self._fail(f"positions and forces: not {n_atoms} rows")
        return table(rows, 6, f"ionic step {self.done}: positions and forces")

    def _read_charges(self) -> tuple[np.ndarray | None, str]:
        """Electrons of each atom (column "tot") from a table, or why it cannot be read."""
        n_atoms = len(self.numbers)
        blank, head, rule, *rows = self._scanner.lines(n_atoms + 3)
        titles = head.split()
        fault = f"the last table 'total charge' does not have {n_atoms} rows that end in a total"
        if blank.strip() or titles[:3] != [b"#", b"of", b"ion"] or titles[-1] != b"tot":
            return None, fault
        try:
            values = table(rows, len(titles) - 2, "the last table 'total charge'")
        except InputError as bad:
            return None, str(bad)
        following = self._scanner.peek().split()
        if np.any(values[:, 0] != np.arange(1, n_atoms + 1)) or rule.strip(b" -\r"):
            return None, fault
        if following and following[0].isdigit():
            return None, fault
        if not np.isfinite(values).all():
            return None, fault
        return values[:, -1].copy(), ""


def _element(words: list[bytes]) -> str:
    """The last of the words that is the symbol of an element, "" if none is."""
    from ase.data import atomic_numbers

    symbols = [w.decode() for w in words if _SYMBOL.fullmatch(w)]
    return next((s for s in reversed(symbols) if s in atomic_numbers and s != "X"), "")
