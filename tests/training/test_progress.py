"""Progress tells what an evaluation brought, whatever stage it is of."""

import pytest

from nemotron_jax.training.progress import Progress

RECORD = {"step": 5, "loss": 1.5, "tokens_per_second": 10.0, "held_out_loss": 1.25}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bits_per_byte": 2.0}, "held-out loss 1.2500 nats/token, 2.0000 bits/byte\n"),
        ({"success": 0.5}, "held-out loss 1.2500 nats/token, 0.5000 of held-out tasks solved\n"),
        ({}, "held-out loss 1.2500 nats/token\n"),
        (
            {"held_out_loss": None, "bits_per_byte": None},
            "held-out loss not finite nats/token, not finite bits/byte\n",
        ),
    ],
)
def test_an_evaluation_is_told_in_one_line(capsys, values: dict, words: str) -> None:
    progress = Progress(10, 0)
    progress.show(RECORD | values)
    progress.close()
    assert capsys.readouterr().out.endswith(words)
