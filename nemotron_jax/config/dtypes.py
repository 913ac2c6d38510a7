"""The dtypes that a model's matrices are held and stored in, under every name they go by."""

from nemotron_jax.config.checks import check_value

DTYPES = ("float32", "bfloat16", "float16")
EXPERTS = ("dense", "nvfp4")  # how routed experts are held: as floats of a dtype, or as codes
_SPELLINGS = {
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
}


def dtype_name(owner: str, value: object) -> str:
    """The dtype that `value` means: a name, torch's name of one, or a dtype of numpy or jax.

    Raises ValueError, in the name of `owner`, for a dtype that no matrix is held in.
    """
    name = value if isinstance(value, str) else getattr(value, "name", None)
    name = str(name or getattr(value, "__name__", value)).removeprefix("torch.")
    name = _SPELLINGS.get(name, name)
    check_value(owner, "dtype", value, name in DTYPES, f"must be one of {', '.join(DTYPES)}")
    return name
