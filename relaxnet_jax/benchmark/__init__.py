"""Benchmarks: speed, memory and scaling, by themselves and compared with other programs."""
