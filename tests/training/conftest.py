"""The texts and one finished run that several tests compare with."""

import pytest

from tests.training.runs import small_run, train, write_texts


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def finished_run(texts, tmp_path_factory):
    """(config, directory, outcome) of a run that was never stopped."""
    config = small_run(texts)
    directory = tmp_path_factory.mktemp("finished")
    return config, directory, train(config, directory)
