"""What the numbers of a report depend on: model, data, device, versions."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import platform
import shlex
import sys
from typing import Any

import jax
import numpy as np

from nemotron_jax.config.convert import to_json
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten, stacks
from nemotron_jax.sharding.hosts import parts_on_host

LIBRARIES = ("nemotron-jax", "jax", "jaxlib", "flax", "numpy")


def model_facts(subject: Subject, model: Nemotron | None) -> dict[str, Any]:
    """What names the model: hashes of its parameters and sizes, which are empty behind a URL."""
    if model is None:
        return {
            "parameters_sha256": "",
            "config_sha256": "",
            "path_name": subject.model_name,
            "url": subject.url,
        }
    parameters = flatten(model)
    return {
        "parameters_sha256": parameters_sha256(model),
        "config_sha256": _sha256(json.dumps(dataclasses.asdict(model.config), sort_keys=True)),
        "path_name": subject.checkpoint.resolve().name,
        "step": model.origin and model.origin.step,
        "pattern": model.config.pattern,
        "width": model.config.width,
        "parameters": sum(leaf.size for leaf in parameters.values()),
        "dtype": str(parameters["embedding"].dtype),
        "experts": model.experts_format,
        "has_mtp": model.mtp_block is not None,
    }


def data_sha256(subject: Subject) -> str:
    """A hash of the configuration that data comes from; empty without one."""
    return "" if subject.config is None else _sha256(to_json(subject.config))


def where_and_when() -> dict[str, Any]:
    """`device`, `versions`, and `started`: the moment, the command and the machine."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
        "versions": {name: _version(name) for name in LIBRARIES},
        "started": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "machine": f"{platform.system()} {platform.machine()}, Python "
            f"{platform.python_version()}",
        },
    }


def parameters_sha256(model: Nemotron) -> str:
    """A hash of every parameter with its name, dtype and shape, in the order of names; of single
    layers that of their stacks."""
    whole = hashlib.sha256()
    for name, (shape, layers) in sorted(stacks(model).items()):
        whole.update(f"{name} {layers[0].dtype} {shape}\n".encode())
        for part in itertools.chain.from_iterable(map(parts_on_host, layers)):
            # NumPy lends no buffer of bfloat16 and 8-bit floats, but one of their bytes.
            whole.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return whole.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
