"""What a run says first and last: what it does, and what to do with what it made."""

from nemotron_jax.config.run import RunConfig
from nemotron_jax.model import accounting
from nemotron_jax.run_directory import RunDirectory


def opening(config: RunConfig, directory: RunDirectory) -> str:
    """One line: the stage, the model's size, the steps and their tokens, the directory."""
    size = _size(accounting.parameters(config.model).total)
    data, steps = config.data, config.training.steps
    made = directory.part("grpo") if config.stage == "grpo" else directory
    begun = max(made.steps(), default=0)
    return (
        f"{config.stage}: {size} parameters, {steps:,} steps of up to "
        f"{data.batch_size * data.sequence_length:,} tokens"
        + f", {begun:,} of them done" * (begun > 0)
        + f"; in {directory.path}. The time left is shown once the step is compiled"
    )


def closing(config: RunConfig, directory: RunDirectory) -> str:
    """What to do next with a finished run, in the form of its summary; nothing for one that was
    stopped."""
    made = directory.part("grpo") if config.stage == "grpo" else directory
    if config.training.steps not in made.steps():
        return ""
    chat = f"python -m nemotron_jax.chat --checkpoint={made.path} --no_thinking"
    report = f"python eval.py --checkpoint={made.path} --suites=perplexity --output=build/report"
    return f"{'next':15}{report if config.stage == 'pretrain' else chat}"


def _size(count: int) -> str:
    """Three digits of a number of parameters."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,}"
