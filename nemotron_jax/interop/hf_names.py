"""The one table between the hub's tensors and this project's parameters, read in both
directions."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from nemotron_jax.config.model import BLOCK_KINDS, ModelConfig

# Hub name within a layer -> our names within a block. Several of ours stand as consecutive rows of
# one of the hub's. `linear` matrices are stored output-first on the hub and input-first here;
# `conv` is [channels, 1, taps] there and [taps, channels] here.
_NORM = [("norm.weight", ("norm.weight",), "plain")]
_IN = ("z", "x", "b", "c", "dt")
_CONV = ("x_conv", "b_conv", "c_conv")
_BLOCKS = {
    "M": [
        ("mixer.in_proj.weight", tuple(f"mixer.{p}.weight" for p in _IN), "linear"),
        ("mixer.in_proj.bias", tuple(f"mixer.{p}.bias" for p in _IN), "plain"),
        ("mixer.conv1d.weight", tuple(f"mixer.{p}.weight" for p in _CONV), "conv"),
        ("mixer.conv1d.bias", tuple(f"mixer.{p}.bias" for p in _CONV), "plain"),
        ("mixer.A_log", ("mixer.A_log",), "plain"),
        ("mixer.D", ("mixer.D",), "plain"),
        ("mixer.dt_bias", ("mixer.dt_bias",), "plain"),
        ("mixer.norm.weight", ("mixer.norm.weight",), "plain"),
        ("mixer.out_proj.weight", ("mixer.out.weight",), "linear"),
        ("mixer.out_proj.bias", ("mixer.out.bias",), "plain"),
    ],
    "*": [
        (f"mixer.{hub}_proj.weight", (f"mixer.{ours}.weight",), "linear")
        for hub, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
    ],
    "-": [
        (f"mixer.{p}_proj.{part}", (f"mixer.{p}.{part}",), layout)
        for p in ("up", "down")
        for part, layout in (("weight", "linear"), ("bias", "plain"))
    ],
    "E": [
        ("mixer.gate.weight", ("mixer.router.weight",), "linear"),
        ("mixer.gate.e_score_correction_bias", ("mixer.router.selection_bias",), "plain"),
        ("mixer.fc1_latent_proj.weight", ("mixer.latent_down.weight",), "linear"),
        ("mixer.fc1_latent_proj.bias", ("mixer.latent_down.bias",), "plain"),
        ("mixer.fc2_latent_proj.weight", ("mixer.latent_up.weight",), "linear"),
        ("mixer.fc2_latent_proj.bias", ("mixer.latent_up.bias",), "plain"),
        ("mixer.experts.{e}.up_proj.weight", ("mixer.experts.up",), "linear"),
        ("mixer.experts.{e}.down_proj.weight", ("mixer.experts.down",), "linear"),
        ("mixer.shared_experts.up_proj.weight", ("mixer.shared.up.weight",), "linear"),
        ("mixer.shared_experts.up_proj.bias", ("mixer.shared.up.bias",), "plain"),
        ("mixer.shared_experts.down_proj.weight", ("mixer.shared.down.weight",), "linear"),
        ("mixer.shared_experts.down_proj.bias", ("mixer.shared.down.bias",), "plain"),
    ],
}
_TOP = [
    ("backbone.embeddings.weight", ("embedding",), "plain"),
    ("backbone.norm_f.weight", ("final_norm.weight",), "plain"),
    ("lm_head.weight", ("head.weight",), "linear"),
]
_MTP_FIRST = [
    ("enorm.weight", ("embedding_norm.weight",), "plain"),
    ("hnorm.weight", ("hidden_norm.weight",), "plain"),
    ("eh_proj.weight", ("project.weight",), "linear"),
]
_MTP_LAST = [("final_layernorm.weight", ("final_norm.weight",), "plain")]


@dataclasses.dataclass(frozen=True)
class HubTensor:
    """One tensor of a hub checkpoint and where its rows live here: parameters, each at the same
    index."""

    name: str
    parameters: tuple[str, ...]
    index: tuple[int, ...]
    layout: str

    def to_hub(self, parameters: dict[str, np.ndarray]) -> np.ndarray:
        """The hub's array from ours."""
        return np.concatenate(
            [_to_hub(parameters[name][self.index], self.layout) for name in self.parameters]
        )

    def shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The hub's shape from ours."""
        parts = [
            _hub_shape(shapes[name][len(self.index) :], self.layout) for name in self.parameters
        ]
        return (sum(part[0] for part in parts), *parts[0][1:])

    def from_hub(
        self, array: np.ndarray, shapes: dict[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The parameters' values at `index`, from the hub's rows."""
        start = 0
        for name in self.parameters:
            rows = _hub_shape(shapes[name][len(self.index) :], self.layout)[0]
            yield name, _from_hub(array[start : start + rows], self.layout)
            start += rows


def hub_tensors(config: ModelConfig, names: set[str]) -> Iterator[HubTensor]:
    """Every hub tensor of the parameters `names` of a model, stacked or split, in the hub's
    order."""
    for hub, ours, layout in _TOP:
        yield HubTensor(hub, ours, (), layout)
    count = dict.fromkeys(BLOCK_KINDS, 0)
    for layer, letter in enumerate(config.pattern):
        prefix, kind = f"backbone.layers.{layer}.", BLOCK_KINDS[letter]
        number = count[letter]
        if f"{kind}.{number}.norm.weight" in names:
            yield from _block(config, letter, prefix, f"{kind}.{number}.", (), names)
        else:
            yield from _block(config, letter, prefix, f"{kind}.", (number,), names)
        count[letter] += 1
    for number, letter in enumerate(config.mtp.pattern if config.mtp else ""):
        prefix = f"mtp.layers.{number}."
        yield from _block(config, letter, prefix, f"mtp_block.blocks.{number}.", (), names)
        for hub, ours, layout in (
            *(_MTP_FIRST if number == 0 else ()),
            *(_MTP_LAST if number == len(config.mtp.pattern) - 1 else ()),
        ):
            yield HubTensor(prefix + hub, tuple(f"mtp_block.{name}" for name in ours), (), layout)


def _block(
    config: ModelConfig, letter: str, hub: str, ours: str, index: tuple, names: set[str]
) -> Iterator[HubTensor]:
    for name, parts, layout in _NORM + _BLOCKS[letter]:
        parameters = tuple(ours + part for part in parts)
        if parameters[0] not in names:
            continue  # a bias or latent projection that this model does not have
        if "{e}" not in name:
            yield HubTensor(hub + name, parameters, index, layout)
            continue
        for expert in range(config.moe.num_experts):
            yield HubTensor(hub + name.format(e=expert), parameters, (*index, expert), layout)


def _to_hub(array: np.ndarray, layout: str) -> np.ndarray:
    if layout == "linear":
        return array.T
    return array.T[:, None, :] if layout == "conv" else array


def _from_hub(array: np.ndarray, layout: str) -> np.ndarray:
    if layout == "linear":
        return array.T
    return array[:, 0, :].T if layout == "conv" else array


def _hub_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    if layout == "linear":
        return shape[::-1]
    return (shape[1], 1, shape[0]) if layout == "conv" else shape
