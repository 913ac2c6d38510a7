"""Evidence for what the project claims: python -m experiments.NAME."""
