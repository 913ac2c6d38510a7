"""Progress tells what an evaluation brought, whatever stage it is of."""

import json

import pytest

from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training import plots, progress
from nemotron_jax.training.progress import Progress
from nemotron_jax.training.summary import summary

RECORD = {"step": 5, "tokens": 50, "loss": 1.5, "tokens_per_second": 10.0, "held_out_loss": 1.25}
LOADS = {"max": 2.0, "95": 1.5, "5": 0.5, "min": 0.0}


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


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"reward": 0.25, "infra_errors": 0.0}, "step 5/10: reward 0.250, 10 tokens/s"),
        (
            {"reward": 0.25, "infra_errors": 3.0},
            "step 5/10: reward 0.250, 3 episodes whose environment failed, 10 tokens/s",
        ),
        ({"reward": None}, "step 5/10: reward not finite, 10 tokens/s"),
        ({}, "step 5/10: loss 1.500, 10 tokens/s"),
    ],
)
def test_what_is_learned_from_rewards_shows_them(capsys, monkeypatch, values, words) -> None:
    """And not the loss of the policy gradient, whose height says nothing."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    record = {name: value for name, value in RECORD.items() if name != "held_out_loss"}
    Progress(10, 0).show(record | values)
    assert capsys.readouterr().out.startswith(words)


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []


@pytest.mark.parametrize(
    ("values", "name", "shown"),
    [
        ({}, "loss", [["training loss"]]),
        ({"held_out_loss": 1.0}, "loss", [["training loss", "held-out loss"]]),
        (
            {"reward": 0.5},
            "reward",
            [["mean reward of a batch"], ["policy-gradient surrogate"]],
        ),
        (
            {"reward": 0.5, "success": 0.25},
            "reward",
            [["mean reward of a batch", "held-out success"], ["policy-gradient surrogate"]],
        ),
    ],
)
def test_a_picture_names_what_it_shows_and_nothing_else(
    tmp_path, monkeypatch, values, name, shown
) -> None:
    drawn = []
    monkeypatch.setattr(plots, "_write", lambda figure, path, data: drawn.append((figure, path)))
    records = [{"step": n, "tokens": 8 * n, "loss": 1.0} | values for n in (1, 2)]
    plots.draw_curves(records, RunDirectory(tmp_path))
    ((figure, path),) = drawn
    assert path == tmp_path / f"plots/{name}.png"
    assert [legend(axes) for axes in figure.axes] == shown


def test_the_balance_of_experts_and_the_fate_of_drafts_are_drawn_where_they_are_known(
    tmp_path,
) -> None:
    load = {f"expert_load_{name}": value for name, value in LOADS.items()}
    names = ("acceptance/mean_length_1", "acceptance/mean_length_3", "acceptance/mean_length_3/x")
    records = [{"step": n, "tokens": 8 * n, "loss": 1.0} | load for n in range(1, 31)]
    records[-1] |= dict.fromkeys(names, 1.25)
    records[3]["expert_load_min"] = None  # a band needs both its edges
    assert plots.draw_curves(records, RunDirectory(tmp_path)).name == "loss.png"
    read = lambda name: json.loads((tmp_path / "plots" / f"{name}.json").read_text())
    assert [len(read("router")[name]) for name in ("fullest expert", "emptiest")] == [30, 29]
    assert {k: v for k, v in read("acceptance").items() if k[0] == "k"} == {
        "k = 1": [[30, 1.25]],
        "k = 3": [[30, 1.25]],
    }
    alone = [{"step": 1, "tokens": 8, "loss": 1.0} | dict.fromkeys(load, 1.0)]
    plots.draw_curves(alone, RunDirectory(tmp_path / "dense"))
    assert {path.stem for path in (tmp_path / "dense" / "plots").iterdir()} == {"loss"}


def test_a_summary_names_samples_that_are_there(tmp_path) -> None:
    records = [{"step": 1, "tokens_per_second": None, "held_out_loss": 1.0}]
    samples = tmp_path / "samples.txt"
    assert "samples.txt" not in summary(records, RunDirectory(tmp_path))
    samples.touch()
    assert "samples.txt" not in summary(records, RunDirectory(tmp_path))
    samples.write_text("step 1\n  x\n")
    assert str(samples) in summary(records, RunDirectory(tmp_path))


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
