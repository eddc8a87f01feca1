"""Reading VASP's vasprun.xml and OUTCAR in one pass, with their companion files."""
