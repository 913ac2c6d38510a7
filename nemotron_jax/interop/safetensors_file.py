"""Reading one safetensors file tensor by tensor, with its header checked before anything is
believed.

The library's numpy reader knows no 8-bit floats; this one reads every dtype of the format's list.
"""

import dataclasses
import json
import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """The tensors of one file, read on request."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.entries = _read_entries(self.path)

    def read(self, name: str) -> np.ndarray:
        """One tensor, alone in memory."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        array = np.fromfile(self.path, entry.dtype, count=count, offset=entry.offset)
        return array.reshape(entry.shape)


def _read_entries(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise _broken(path, f"its header claims {length} bytes of a file of {size}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            unknown = {name: value["dtype"] for name, value in header.items()}
            unknown = {name: dtype for name, dtype in unknown.items() if dtype not in DTYPES}
            known = {name: value for name, value in header.items() if name not in unknown}
            entries = {name: _entry(value, 8 + length) for name, value in known.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _broken(path, f"its header cannot be read ({error})") from error
    for name, dtype in unknown.items():
        raise ValueError(
            f"{path}: tensor {name} has dtype {dtype}, which no model here is stored in (known: "
            f"{', '.join(DTYPES)}); the safetensors library reads it"
        )
    for name, entry in entries.items():
        end = entry.offset + math.prod(entry.shape) * entry.dtype.itemsize
        if end > size:
            raise _broken(path, f"tensor {name} ends at byte {end} of a file of {size}")
    return entries


def _entry(value: dict, start: int) -> Entry:
    dtype, shape = DTYPES[value["dtype"]], tuple(int(n) for n in value["shape"])
    begin, end = value["data_offsets"]
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} does not fit bytes {begin}..{end}")
    return Entry(dtype, shape, start + begin)


def _broken(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: not a whole safetensors file: {reason}; download or copy it again")
