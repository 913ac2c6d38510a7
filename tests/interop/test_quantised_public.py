"""Directories that public tools wrote load as the floats that the tools make of their codes."""

import json

import numpy as np
import pytest

import nemotron_jax as nj
from tests.golden_cases import GOLDEN
from tests.interop.test_quantised import table

CODES = GOLDEN.parent / "public_codes"  # see its make.py
EXPECTED = json.loads((CODES / "expected.json").read_text())


@pytest.mark.parametrize("tool", EXPECTED["values"])
def test_the_floats_are_the_tool_s_own(tool) -> None:
    found = table(nj.load_pretrained(CODES / tool))
    assert len(EXPECTED["values"][tool]) == 8
    for name, values in EXPECTED["values"][tool].items():
        own = np.float32(values)
        sampled = found[name].reshape(-1)[:: EXPECTED["stride"]]
        assert np.count_nonzero(own) > len(own) / 2
        # The tools multiply code, scale and factor in other orders: two roundings of float32.
        np.testing.assert_allclose(sampled, own, rtol=3e-7, err_msg=name)
