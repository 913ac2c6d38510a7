"""A model whose quantised weights carry their codes, made once a step."""

import jax
from flax import nnx

from nemotron_jax.config.precision import PrecisionConfig
from nemotron_jax.layers.experts import Experts
from nemotron_jax.layers.kept_codes import KeptCodes
from nemotron_jax.layers.packed import PackedMatrix
from nemotron_jax.model.adapters import Site, adapter_sites
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.quant.codes import is_kept, quantized_once


def with_codes(model: Nemotron, precision: PrecisionConfig) -> Nemotron:
    """The model with codes beside each weight whose products take the same ones, forward and
    backward, of all layers. The MTP block runs in high precision and has none."""
    model = jax.tree.map(lambda leaf: leaf, model)  # new modules around the same arrays
    groups: dict[tuple, list[Site]] = {}  # projections of one matrix share its largest magnitude
    for site in adapter_sites(model):
        is_packed = isinstance(getattr(site.module, site.matrix), PackedMatrix)
        if is_kept(_role(site), precision) and not is_packed:
            groups.setdefault((id(site.shares or site.module), site.matrix), []).append(site)
    for sites in groups.values():
        matrices = [getattr(site.module, site.matrix) for site in sites]
        leading = matrices[0].ndim - 2  # layers, and experts
        found = quantized_once([matrix[...] for matrix in matrices], leading)
        for site, matrix, codes in zip(sites, matrices, found, strict=True):
            setattr(site.module, f"{site.matrix}_codes", nnx.data(KeptCodes(codes, matrix.axes)))
    return model


def _role(site: Site) -> str:
    return f"expert_{site.matrix}" if isinstance(site.module, Experts) else site.module.role
