"""What a run would take on devices that are not here, by arithmetic: no compiler, no jax."""
