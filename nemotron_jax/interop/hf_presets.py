"""Which matrices a quantised directory stores as codes, by the name of a recipe.

Sources: hf_quant_config.json of the published NVFP4 directories of Super, Nano and 3.5 Lightning;
Model-Optimizer's recipes for Super and Ultra; docs/precision.md.
"""

from collections.abc import Iterable

from nemotron_jax.config.model import ModelConfig
from nemotron_jax.interop.hf_names import HubTensor
from nemotron_jax.interop.hf_recipe import BLOCK, FP8, NVFP4

RECIPES = ("released", "nvfp4", "fp8")

SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
# Super's release picked FP8 layer by layer, by the loss that each cost: layers, by projection.
_SUPER_FP8 = {
    "in_proj": (0, 2, 4, 6, 9, 11, 13, 15, 18, 20, 27, 29, 31, 40, 49, 51, 53, 55, 57, 60, 62, 66)
    + (68, 71, 73, 82, 84, 86),
    "out_proj": (0, 2, 4, 9, 11, 13, 18, 38, 40, 42, 44, 49, 51, 53, 55, 57, 60, 62, 64, 66, 68)
    + (71, 73, 75, 77, 80, 82, 84, 86),
    "fc1_latent_proj": (1, 3, 5),
    "fc2_latent_proj": (3,),
    "o_proj": (69, 78),
}
_SUPER_SHARED_NOT_FP8 = {"up_proj": (41,), "down_proj": (1, 8, 76)}

_MAMBA = ("in_proj", "out_proj")


def stored_formats(
    recipe: str, config: ModelConfig, tensors: Iterable[HubTensor], shapes: dict[str, tuple]
) -> dict[str, str]:
    """The modules that a recipe stores as codes, each as NVFP4 or FP8; all others are floats.

    `released` is the list of the model's own release, known by its layers, and for another model
    the rule of Super's and Ultra's: routed experts in NVFP4; shared experts, dense MLPs and Mamba's
    projections in FP8. `nvfp4` is Nano's rule: all of these in NVFP4, but for the Mamba layer
    before an attention layer. `fp8` has them all in FP8. Embedding, head, attention, routers,
    latent projections and the MTP block are floats, as is NVFP4's matrix whose columns are not a
    multiple of 16. Raises ValueError for another recipe and where nothing is left to store.
    """
    if recipe not in RECIPES:
        raise ValueError(f"quantization={recipe!r}: must be one of {', '.join(RECIPES)}")
    found = {}
    for tensor in tensors:
        module, _, part = tensor.name.rpartition(".")
        kind = _kind(recipe, config, module) if part == "weight" else ""
        if kind == NVFP4 and tensor.shape(shapes)[1] % BLOCK:
            kind = ""
        if kind:
            found[module] = kind
    if not found:
        raise ValueError(
            f"quantization={recipe!r}: the model of pattern {config.pattern!r} has no matrix that "
            "it stores as codes; choose another recipe"
        )
    return found


def _kind(recipe: str, config: ModelConfig, module: str) -> str:
    """NVFP4, FP8 or "" for one module."""
    parts = module.split(".")
    if module == "lm_head":
        return NVFP4 if recipe == "released" and _is_lightning(config) else ""
    if parts[:2] != ["backbone", "layers"]:
        return ""
    layer, inside = int(parts[2]), ".".join(parts[4:])  # after `mixer`
    if recipe == "released" and config.pattern == SUPER:
        return _of_super(layer, inside)
    is_expert = inside.startswith("experts.")
    is_shared = inside.startswith("shared_experts.")
    is_mamba = config.pattern[layer] == "M" and inside in _MAMBA
    if not (is_expert or is_shared or is_mamba or config.pattern[layer] == "-"):
        return ""
    if recipe == "fp8":
        return FP8
    if recipe == "nvfp4" or (config.pattern == NANO and not _is_lightning(config)):
        before_attention = config.pattern[layer + 1 : layer + 2] == "*"
        return "" if is_mamba and before_attention else NVFP4
    if is_shared and _is_lightning(config):
        return NVFP4
    return NVFP4 if is_expert else FP8


def _of_super(layer: int, inside: str) -> str:
    place, _, projection = inside.rpartition(".")
    if place.startswith("experts"):
        return NVFP4
    if place == "shared_experts":
        if (layer, projection) == (1, "down_proj"):
            return NVFP4
        return "" if layer in _SUPER_SHARED_NOT_FP8[projection] else FP8
    return FP8 if layer in _SUPER_FP8.get(projection, ()) else ""


def _is_lightning(config: ModelConfig) -> bool:
    """3.5 Lightning has Nano's layers and an MTP block."""
    return config.pattern == NANO and config.mtp is not None
