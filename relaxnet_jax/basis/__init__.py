"""Radial and angular bases: pure functions of distances and directions."""
