"""Matrices as a quantised directory stores them, and the recipe that says which are."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nemotron_jax.config.checks import check_value
from nemotron_jax.interop.hf_names import HubTensor, hub_tensors
from nemotron_jax.interop.hf_presets import stored_formats
from nemotron_jax.interop.hf_recipe import BLOCK, FP8, NVFP4
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import abstract_model, flatten
from nemotron_jax.quant.calibrate import METHODS, fp8_codes, nvfp4_codes

_WEIGHTS_ONLY = "W4A16_NVFP4"  # Model-Optimizer's name for NVFP4 without scales of activations
# An input scale is the largest magnitude over what the format's largest number and scale give.
_BOUND = {NVFP4: 6 * 448, FP8: 448}
_MIXED = "MIXED_PRECISION"


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a directory stores its matrices as codes: a recipe's name, how scales are chosen, and
    the largest magnitude of each module's inputs, where that was measured."""

    recipe: str
    method: str = "max"
    inputs: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        rule = f"must be one of {', '.join(METHODS)}"
        check_value("quantize", "method", self.method, self.method in METHODS, rule)


class Encoder:
    """The tensors that a model's directory holds, its recipe's matrices as codes with scales."""

    def __init__(self, model: Nemotron, how: Quantization) -> None:
        """Experts that are codes in the model stay these codes. Raises ValueError for an unknown
        recipe, and for one that would store such experts as anything else."""
        self._how = how
        self._arrays = {name: np.asarray(leaf) for name, leaf in flatten(model).items()}
        dense = flatten(abstract_model(model.config))
        self._shapes = {name: leaf.shape for name, leaf in dense.items()}
        self.tensors = tuple(hub_tensors(model.config, set(dense)))
        self.formats = stored_formats(how.recipe, model.config, self.tensors, self._shapes)
        for tensor in self.tensors:
            if tensor.parameters[0] not in self._arrays:
                if self.formats.get(module_of(tensor), NVFP4) != NVFP4:
                    raise ValueError(
                        f"quantization={how.recipe!r}: the model holds {tensor.name} as NVFP4 "
                        "codes, and the recipe has no such experts; save unpacked(model)"
                    )
                self.formats[module_of(tensor)] = NVFP4

    def floats(self, tensor: HubTensor) -> np.ndarray:
        """The hub's array of a tensor that stays floats."""
        return tensor.to_hub(self._arrays)

    def codes(self, tensor: HubTensor, stored: str) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors that hold a matrix of the recipe, `stored` being the name of its weight."""
        module = stored.removesuffix(".weight")
        kind, factor = self.formats[module_of(tensor)], None
        if tensor.parameters[0] not in self._arrays:
            codes, scales, factor = self._held(tensor)
        elif kind == FP8:
            codes, scales = jax.device_get(fp8_codes(tensor.to_hub(self._arrays)))
        else:
            matrix = tensor.to_hub(self._arrays)
            codes, scales, factor = jax.device_get(nvfp4_codes(matrix, self._how.method))
        yield f"{module}.weight", np.ascontiguousarray(codes)
        yield f"{module}.weight_scale", np.ascontiguousarray(scales)
        if factor is not None:
            yield f"{module}.weight_scale_2", np.asarray(factor, np.float32)
        if (largest := self._how.inputs.get(module_of(tensor))) is not None:
            yield f"{module}.input_scale", np.asarray(largest / _BOUND[kind], np.float32)

    def recipe(self) -> dict[str, Any]:
        """What the directory's files say of it, in Model-Optimizer's words."""
        nvfp4 = NVFP4 if self._how.inputs else _WEIGHTS_ONLY
        words = {NVFP4: {"quant_algo": nvfp4, "group_size": BLOCK}, FP8: {"quant_algo": FP8}}
        linears = [module_of(t) for t in self.tensors if t.layout == "linear"]
        floats = [module for module in linears if module not in self.formats]
        drafts = [module for module in linears if module.startswith("mtp.")]
        if drafts and set(drafts) <= set(floats):
            floats = [m for m in floats if not m.startswith("mtp.")] + ["mtp*"]
        kinds = set(self.formats.values())
        listed = {module: words[kind] for module, kind in self.formats.items()}
        mixed = {"quant_algo": _MIXED, "quantized_layers": listed}
        whole = words[min(kinds)] if len(kinds) == 1 else mixed
        return {**whole, "kv_cache_quant_algo": None, "exclude_modules": floats}

    def counts(self) -> dict[str, int]:
        """How many modules are stored in each format."""
        kinds = list(self.formats.values())
        return {kind: kinds.count(kind) for kind in (NVFP4, FP8) if kind in kinds}

    def _held(self, tensor: HubTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes, scales and factor of an expert that is codes already: the same bits."""
        (matrix,) = tensor.parameters
        words, scales, factor = (
            self._arrays[f"{matrix}.{part}"][tensor.index] for part in ("words", "scales", "factor")
        )
        columns, rows = self._shapes[matrix][-2:]  # the hub's matrices are turned
        codes = np.ascontiguousarray(words[..., :rows].transpose(2, 1, 0)).view(np.uint8)
        codes = codes.reshape(rows, -1)[:, : columns // 2]
        return codes, scales.T[:rows, : columns // BLOCK], factor


def module_of(tensor: HubTensor) -> str:
    """The hub's module that a tensor is a parameter of."""
    return tensor.name.rpartition(".")[0]
