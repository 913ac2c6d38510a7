"""The texts of the runs."""

import pytest

from tests.training.runs import write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))
