"""Flax modules: layers, encoder, and the energy network."""
