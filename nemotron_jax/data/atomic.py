"""Files that are whole or absent: see nemotron_jax/files.py."""

from nemotron_jax.files import atomic_writer as atomic_writer
