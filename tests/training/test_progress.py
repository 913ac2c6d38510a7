"""Progress tells what an evaluation brought, whatever stage it is of."""

import pytest

from nemotron_jax.training import progress
from nemotron_jax.training.progress import Progress

RECORD = {"step": 5, "tokens": 50, "loss": 1.5, "tokens_per_second": 10.0, "held_out_loss": 1.25}


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
    shown = Progress(10, 0)
    shown.show(RECORD | values)
    shown.close()
    assert capsys.readouterr().out.endswith(words)


def test_the_time_left_is_that_of_the_steps_at_their_speed(capsys, monkeypatch) -> None:
    """Not of the clock, which also ran while the step compiled."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    shown = progress.Progress(steps=100, start=40)
    for step, rate in ((50, None), (60, 10.0), (70, 20.0)):
        record = {"step": step, "tokens": 8 * step, "loss": 1.0, "tokens_per_second": rate}
        shown.show(record)
    first, second, third = capsys.readouterr().out.splitlines()
    assert "left" not in first
    assert second.endswith(", 0:32 left")  # 40 steps of 8 tokens at 10 a second
    assert third.endswith(", 0:16 left")  # 30 at 15, the mean of both readings
