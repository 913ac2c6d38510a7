"""Frozen, checked descriptions of models and runs; plain Python, no jax."""
