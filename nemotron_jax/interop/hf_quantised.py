"""Matrices that a hub directory stores as codes with scales, and the floats that they stand for.

A matrix is two to four tensors, in one file or in several:

| format | codes | scale | factor | value |
|---|---|---|---|---|
| NVFP4 (Model-Optimizer) | weight | weight_scale | weight_scale_2 | code x (scale x factor) |
| NVFP4 (compressed-tensors) | weight_packed | weight_scale | weight_global_scale | code x (scale / factor) |
| FP8 | weight | weight_scale | | code x scale |

NVFP4 codes are E2M1, two in a byte, the even column in the low half; a scale is E4M3 and serves 16
columns; the factor is one float32. FP8 codes are E4M3, with one scale for the matrix or for each
row. All products are float32, in this order, as Model-Optimizer computes them.
"""  # noqa: E501

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from nemotron_jax.config.untrusted import shown
from nemotron_jax.interop.hf_names import HubTensor
from nemotron_jax.interop.hf_recipe import BLOCK, FP8, NVFP4, Recipe
from nemotron_jax.interop.safetensors_file import SafetensorsFile, TensorEntry

_HINT = "download the checkpoint again"
_PIECE = 1 << 20  # values dequantised together: their float32 copies stay small
_MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # E2M1; bit 3 is the sign
_LARGEST_SCALE = 0x7E  # bits of E4M3's 448; above them are NaN and the negative numbers
PACKED_BLOCKS = 8  # `PackedExperts` has a multiple of these
_SCALARS = ((), (1,))
_FLOATS = ("float32", "bfloat16", "float16")
# Beside a matrix's own scales. `input_scale` is the activations', for products in the low format.
_OF_INPUTS = ("input_scale", "input_global_scale")
# Scales of an FP8 cache of keys and values. The cache here holds floats and needs none.
_OF_CACHE = (("k_proj", "k_scale"), ("v_proj", "v_scale"))
_SCALE_WORDS = ("scale", "packed", "zero_point", "amax")


class Stored(NamedTuple):
    """One tensor of a file."""

    name: str
    file: SafetensorsFile
    entry: TensorEntry

    def read(self) -> np.ndarray:
        """Its values."""
        return self.file.read_entry(self.entry)

    def wrong(self, rule: str) -> ValueError:
        """The error that names file, tensor and rule."""
        return ValueError(f"{self.file.path}: tensor {shown(self.name)} {rule}; {_HINT}")


@dataclasses.dataclass(frozen=True)
class Codes:
    """A matrix [N, K] of the hub, stored as codes."""

    kind: str
    shape: tuple[int, int]
    codes: Stored
    scale: Stored
    factor: Stored | None = None
    divides: bool = False  # the factor is a divisor

    def read(self, dtype: np.dtype) -> np.ndarray:
        """The matrix's values, each rounded once to `dtype`.

        Raises ValueError for scales and values that are none.
        """
        pieces = self._nvfp4() if self.kind == NVFP4 else self._fp8()
        values = np.empty(self.shape, dtype)
        rows = max(1, _PIECE // self.shape[1])
        for start in range(0, self.shape[0], rows):
            with np.errstate(over="ignore", invalid="ignore"):  # said below, with the tensor's name
                piece = pieces(slice(start, start + rows))
            if not np.isfinite(piece).all():
                raise self.codes.wrong("holds NaN or infinity once multiplied by its scales")
            values[start : start + rows] = piece
        return values

    def packed(self, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Words [2, B, C], scales [B, C] and factor [] of `PackedExperts`: the same bits.

        It has C `columns`; those beyond the matrix's own are zeros.
        A divisor becomes its reciprocal. Raises ValueError as `read` does.
        """
        scales, factor = self._nvfp4_scales()
        if self.divides:
            factor = np.float32(1) / factor
        if not np.isfinite(6 * scales.astype(np.float32).max() * factor):
            raise self.codes.wrong("holds NaN or infinity once multiplied by its scales")
        rows, blocks = scales.shape
        words = self.codes.read().view("<f4").reshape(rows, blocks, 2).transpose(2, 1, 0)
        filling = [(0, -blocks % PACKED_BLOCKS), (0, columns - rows)]
        return np.pad(words, [(0, 0), *filling]), np.pad(scales.T, filling), factor

    def _nvfp4_scales(self) -> tuple[np.ndarray, np.float32]:
        scales, factor = self.scale.read(), self._scalar(self.factor)
        if (scales.view(np.uint8) > _LARGEST_SCALE).any():
            raise self.scale.wrong("holds NaN or a negative number, and scales are neither")
        if self.divides and factor == 0:
            raise self.factor.wrong("is 0, and scales are divided by it")
        return scales, factor

    def _nvfp4(self) -> Callable[[slice], np.ndarray]:
        codes, (scales, factor), pairs = self.codes.read(), self._nvfp4_scales(), _pairs()

        def piece(rows: slice) -> np.ndarray:
            steps = scales[rows].astype(np.float32)
            steps = steps / factor if self.divides else steps * factor
            values = pairs[codes[rows]].reshape(-1, self.shape[1] // BLOCK, BLOCK)
            values *= steps[..., None]
            return values.reshape(-1, self.shape[1])

        return piece

    def _fp8(self) -> Callable[[slice], np.ndarray]:
        codes = self.codes.read()
        scales = self.scale.read().astype(np.float32).reshape(-1, 1)
        if not (np.isfinite(scales).all() and (scales >= 0).all()):
            raise self.scale.wrong("holds NaN, infinity or a negative number; scales are neither")
        scales = np.broadcast_to(scales, (self.shape[0], 1))
        return lambda rows: codes[rows].astype(np.float32) * scales[rows]

    @staticmethod
    def _scalar(stored: Stored) -> np.float32:
        value = stored.read().astype(np.float32).reshape(())[()]
        if not (np.isfinite(value) and value >= 0):
            raise stored.wrong(f"is {value}, and a scale is finite and not negative")
        return value


def take_codes(
    recipe: Recipe,
    files: Iterable[SafetensorsFile],
    tensors: dict[str, HubTensor],
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, Codes]:
    """The matrices among `tensors` that are stored as codes, taken out of the files' entries.

    Scales of activations and of an FP8 cache are taken out too, and not used. Raises ValueError,
    naming file, tensor and rule, for scales that are missing, misshapen or unknown, and where
    recipe and files differ.
    """
    found = {
        name: Stored(name, file, entry) for file in files for name, entry in file.entries.items()
    }
    _check_names(recipe, tensors)
    matrices = {}
    for name in [name for name in tensors if name.endswith(".weight")]:
        module = name.removesuffix(".weight")
        kind = _kind(found, module, recipe)
        _compare(recipe, found, module, kind)
        if kind:
            matrices[name] = _collect(found, module, kind, recipe, tensors[name].shape(shapes))
            _take(found, module, matrices[name])
    if bool(recipe.algorithm) != bool(matrices):
        algorithm = shown(recipe.algorithm)[1:-1]
        said = f"is quantised ({algorithm})" if algorithm else "has no quant_algo"
        held = f"{len(matrices)} matrices" if matrices else "no matrix"
        raise ValueError(
            f"{recipe.file} says that the model {said}, and its files store {held} as codes; "
            "they belong to different checkpoints: download both again"
        )
    _take_cache_scales(found, tensors)
    _refuse_unknown(found, tensors)
    for file in files:
        file.entries = {name: entry for name, entry in file.entries.items() if name in found}
    return matrices


def _check_names(recipe: Recipe, tensors: dict[str, HubTensor]) -> None:
    """Raise ValueError where the recipe lists a module that the text model does not have."""
    parts = {name.split(".")[0] for name in tensors}  # without "mtp" where that is left out
    for module in recipe.listed:
        if module.split(".")[0] in parts and f"{module}.weight" not in tensors:
            raise ValueError(
                f"{recipe.file} lists the module {shown(module)}, which the model of config.json "
                "does not have; one of the two belongs to another checkpoint: download both again"
            )


def _compare(recipe: Recipe, found: dict[str, Stored], module: str, kind: str) -> None:
    """Raise ValueError where the files store a module in another way than the recipe says."""
    expected = recipe.expected(module)
    stored = found.get(f"{module}.weight") or found.get(f"{module}.weight_packed")
    if stored is not None and expected not in (None, kind):
        rule = f"lists the module as {expected}" if expected else "does not list it as quantised"
        raise stored.wrong(f"is stored as {stored.entry.dtype}, and {recipe.file.name} {rule}")


def _kind(found: dict[str, Stored], module: str, recipe: Recipe) -> str:
    """How the files store a module's weight: NVFP4, FP8, or "" for floats and for nothing."""
    weight, packed = found.get(f"{module}.weight"), found.get(f"{module}.weight_packed")
    if packed is not None and recipe.is_packed:
        if weight is not None:
            raise packed.wrong(f"stands beside {weight.name!r}; a matrix is stored once")
        return NVFP4
    dtype = "" if weight is None else weight.entry.dtype.name
    if dtype == "uint8" and not recipe.is_packed:
        return NVFP4
    return FP8 if dtype == "float8_e4m3fn" else ""


def _collect(
    found: dict[str, Stored], module: str, kind: str, recipe: Recipe, shape: tuple[int, ...]
) -> Codes:
    """The parts of one matrix, each of the shape and dtype that the format has."""
    is_packed = kind == NVFP4 and recipe.is_packed
    codes = found[f"{module}.weight{'_packed' if is_packed else ''}"]
    if len(shape) != 2:
        raise codes.wrong(f"is stored as codes, and the model's has shape {shape}: no matrix")
    rows, columns = shape
    if kind == FP8:
        _expect(codes, (shape,), ("float8_e4m3fn",))
        scale = _part(found, codes, f"{module}.weight_scale")
        _expect(scale, (*_SCALARS, (rows,), (rows, 1), (1, 1)), _FLOATS)
        return Codes(kind, (rows, columns), codes, scale)
    if columns % BLOCK:
        raise codes.wrong(f"is NVFP4 of {columns} columns, and {BLOCK} share a scale")
    _expect(codes, ((rows, columns // 2),), ("uint8",))
    scale = _part(found, codes, f"{module}.weight_scale")
    _expect(scale, ((rows, columns // BLOCK),), ("float8_e4m3fn",))
    name = "weight_global_scale" if is_packed else "weight_scale_2"
    factor = _part(found, codes, f"{module}.{name}")
    _expect(factor, _SCALARS, _FLOATS)
    return Codes(kind, (rows, columns), codes, scale, factor, is_packed)


def _part(found: dict[str, Stored], codes: Stored, name: str) -> Stored:
    if name not in found:
        raise codes.wrong(f"holds codes, and their scale {name!r} is in no file")
    return found[name]


def _expect(stored: Stored, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]) -> None:
    shape, dtype = stored.entry.shape, stored.entry.dtype.name
    if shape not in shapes or dtype not in dtypes:
        allowed = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise stored.wrong(
            f"has shape {list(shape)} and dtype {dtype}, expected {allowed} and {dtypes[0]}"
        )


def _take(found: dict[str, Stored], module: str, matrix: Codes) -> None:
    for stored in (matrix.codes, matrix.scale, matrix.factor):
        if stored is not None:
            del found[stored.name]
    for name in _OF_INPUTS:
        stored = found.pop(f"{module}.{name}", None)
        if stored is not None:
            _expect(stored, _SCALARS, _FLOATS)


def _take_cache_scales(found: dict[str, Stored], tensors: dict[str, HubTensor]) -> None:
    for name in [name for name in tensors if name.endswith(".k_proj.weight")]:
        mixer = name.removesuffix("k_proj.weight")
        for projection, scale in _OF_CACHE:
            for place in (f"{mixer}{projection}.{scale}", f"{mixer}{scale}"):
                stored = found.pop(place, None)
                if stored is not None:
                    _expect(stored, _SCALARS, _FLOATS)


def _refuse_unknown(found: dict[str, Stored], tensors: dict[str, HubTensor]) -> None:
    for name, stored in found.items():
        module, _, part = name.rpartition(".")
        if name in tensors or not any(word in part for word in _SCALE_WORDS):
            continue
        weight = f"{module}.weight"
        if weight in found:
            rule = f"belongs to no format, beside {weight!r} of {found[weight].entry.dtype}"
        elif weight in tensors:
            rule = f"belongs to the matrix {shown(weight)}, which is in no file"
        else:
            rule = "belongs to no matrix of the model"
        raise stored.wrong(f"is an unknown scale: it {rule}")


def _pairs() -> np.ndarray:
    """The two E2M1 values of each byte."""
    values = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)
    values[8] = -0.0
    return np.stack([np.tile(values, 16), np.repeat(values, 16)], axis=1)
