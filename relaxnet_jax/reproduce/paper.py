"""The paper's own numbers, for comparison with ours (JARVIS-DFT data, two V100 GPUs).

Energies are in eV per structure and forces in eV/Å unless a name or comment says otherwise; None
means not reported.
"""

from __future__ import annotations

NAME = "Learning the Energy Relaxation Manifold from Unrelaxed Structures with RelaxNet"

# Table 1: (model, structures) -> energy MAE with 2 and 4 layers, minutes per epoch with 2 and 4
# layers, and seconds to 85, 95 and 99 % convergence with 2 layers.
TABLE1 = {
    ("dtnn", 1000): ((6.362, 16.947), (1.24, 2.10), (1337, 2109, 3118)),
    ("dtnn", 2000): ((5.824, 13.103), (2.32, 3.74), (326, 745, 2709)),
    ("dtnn", 5000): ((3.436, 8.606), (5.39, 9.38), (2029, 7250, 26505)),
    ("egnn", 1000): ((8.535, 7.739), (0.02, 0.02), (None, None, 116)),
    ("egnn", 2000): ((9.963, 6.886), (0.02, 0.02), (None, None, 147)),
    ("egnn", 5000): ((8.804, 7.987), (0.05, 0.08), (None, None, 1576)),
}
TABLE1_SIZES = (1000, 2000, 5000)
TABLE1_MEMORY = {"dtnn": 1584, "egnn": 1173}  # MB, 2 layers (section 5.2)
TABLE1_85_PERCENT = 34  # minutes, "under ~34 mins for all cases"

# Table 2: (scheme, frames, structures) -> energy MAE final and all frames, force MAE final and all
# frames in meV/Å, minutes per epoch.
TABLE2 = {
    ("implicit", 3, 5000): (3.670, 3.671, 0.5, 6.8, 133.30),
    ("implicit", 5, 5000): (5.053, 5.042, 0.1, 5.1, 293.63),
    ("implicit", 10, 5000): (6.457, 6.472, 0.3, 4.4, 311.25),
    ("implicit", 5, 2000): (8.727, 8.718, 0.8, 8.1, 61.88),
    ("implicit", 10, 1000): (5.892, 5.918, 0.5, 12.0, 31.16),
    ("explicit", 3, 5000): (2.983, 3.031, 0.8, 3.1, 17.95),
    ("explicit", 5, 5000): (2.764, 2.781, 0.4, 2.5, 27.50),
    ("explicit", 10, 5000): (2.235, 2.257, 0.3, 2.3, 49.84),
    ("explicit", 5, 2000): (4.582, 4.652, 0.7, 4.3, 11.34),
    ("explicit", 10, 1000): (4.503, 4.174, 1.5, 10.8, 11.54),
    ("explicit", 5, 24311): (2.919, 2.996, 0.0, 0.5, 136.80),
}

# Table 3: in-training scale (Å) -> energy MAE and force MAE in meV/Å of the final frame, by
# post-training scale.
TABLE3_SCALES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # the paper gives the first two in one column
TABLE3 = {
    0.0: ((2.7594, 2.7594, 2.7595, 2.7596, 2.7595, 2.7553), (0.4, 0.4, 0.4, 0.4, 0.4, 0.3)),
    1e-2: ((4.8779, 4.8779, 4.8779, 4.8778, 4.8776, 4.8679), (0.8, 0.8, 0.8, 0.8, 0.8, 0.8)),
    1e-1: ((4.7677, 4.7677, 4.7677, 4.7677, 4.7669, 4.7675), (0.6, 0.6, 0.6, 0.6, 0.6, 0.6)),
}

# Table 4: meV/atom and training structures.
TABLE4 = {
    "ALIGNN (all)": (55713, 33.1),
    "MatFormer (all)": (55713, 32.2),
    "potnet (all)": (55713, 29.3),
    "kgcnn_coNGN (all)": (55713, 29.1),
    "kgcnn_coGN (all)": (55713, 27.1),
}
TABLE4_RELAXNET = (24311, 17.1, 24.6)  # final frame, all frames

# Tables 5 and 6: method -> energy MAE, force MAE, inference time of 250 structures in seconds.
TABLE5_STRUCTURES = 250
TABLE5 = {
    "explicit": (2.76, 0.0004, 89),
    "implicit": (5.05, 0.0001, 392),
    "egnn C1": (36.71, 0.64, 534),
    "egnn C2": (33.28, 0.76, 549),
    "egnn4 C1": (39.62, 0.37, 1529),
    "egnn4 C2": (40.36, 0.59, 1509),
}
C1, C2 = 0.05, 0.0751  # eV/Å, stopping criteria of L-BFGS; C2 is RelaxNet's final force norm

# Section 5.4: explicit, 5 frames, 5,000 structures; implicit, 10 frames, 1,000 structures.
COORDINATE_MAE, RMSD = 0.0094, 0.0241  # Å, before and after alignment
PEARSON = 0.979  # over all energies (figure A.2)
ELEMENTS, MOST_ATOMS, STRUCTURES = 86, 96, 33473  # section 5.1, A.2
COMMON_DISPLACEMENT = (1e-3, 1e-2)  # Å, "most true displacements" (A.4)
