"""Benchmarks of childtune_fast. README.md says how they measure; results/ holds the measured numbers."""
