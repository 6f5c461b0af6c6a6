"""Benchmarks of childtune_fast: how they measure is in README.md, the numbers they gave are in results/."""
