"""VASP: vasprun.xml and OUTCAR, read in one pass, and what lies beside them."""
