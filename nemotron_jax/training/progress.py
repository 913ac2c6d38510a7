"""What a run shows while it goes on: a bar on a terminal, a line now and then elsewhere."""

import collections
import sys
import time
from collections.abc import Mapping
from typing import Any

import tqdm

from nemotron_jax import distributed

# Between lines where there is no terminal for a bar: a log of a day has 8,640 of them.
LINE_EVERY_S = 10.0
# Readings of the speed that the time left is reckoned from: fewer make it jump, more make it lag.
READINGS = 5
# tqdm's own bar without its time left, which counts compiling as steps.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"

# What else an evaluation may bring, and how it is told.
_SHOWN = {"bits_per_byte": "bits/byte", "success": "of held-out tasks solved"}


def told(value: float | None, digits: int = 4) -> str:
    """A number as it is shown; records hold null for one that is not finite."""
    return "not finite" if value is None else f"{value:.{digits}f}"


def _evaluated(record: Mapping[str, Any]) -> bool:
    return "held_out_loss" in record or any(name in record for name in _SHOWN)


def _reached(record: Mapping[str, Any]) -> str:
    """What a step's batch reached: the reward where it earned one, since the loss of a policy
    gradient says nothing of it."""
    if "reward" not in record:
        return f"loss {told(record['loss'], 3)}"
    text = f"reward {told(record['reward'], 3)}"
    failed = round(record.get("infra_errors") or 0)
    return f"{text}, {failed} episodes whose environment failed" if failed else text


class Progress:
    """Steps done with loss or reward, speed and time left; an evaluation always gets a line of its
    own.

    The time left is that of the steps at the speed of the latest readings: it leaves out compiling
    and evaluating, as the readings do.
    """

    def __init__(self, steps: int, start: int) -> None:
        self._steps = steps
        self._last_line = time.monotonic()
        self._rates: collections.deque[float] = collections.deque(maxlen=READINGS)
        self._bar = (
            tqdm.tqdm(total=steps, initial=start, dynamic_ncols=True, bar_format=_BAR)
            if sys.stderr.isatty() and distributed.is_first()
            else None
        )

    def show(self, record: Mapping[str, Any]) -> None:
        """Bring what is shown up to the record of a step."""
        text, rate = _reached(record), record["tokens_per_second"]
        text += f", {rate:,.0f} tokens/s" if rate else ""
        text += self._left(record)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(record["step"] - self._bar.n)
        elif _evaluated(record) or time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(f"step {record['step']}/{self._steps}: {text}", flush=True)
        shown = [f"{told(record[name])} {unit}" for name, unit in _SHOWN.items() if name in record]
        if "held_out_loss" in record:
            shown.insert(0, f"held-out loss {told(record['held_out_loss'])} nats/token")
        if shown:
            self.note(f"step {record['step']}: {', '.join(shown)}")

    def note(self, line: str) -> None:
        """One line above the bar."""
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line)

    def close(self) -> None:
        """End the bar; what is printed next stands below it."""
        if self._bar is not None:
            self._bar.close()

    def _left(self, record: Mapping[str, Any]) -> str:
        if record["tokens_per_second"]:
            self._rates.append(record["tokens_per_second"])
        if not self._rates:
            return ""
        tokens = record["tokens"] / record["step"] * (self._steps - record["step"])
        minutes, seconds = divmod(round(tokens * len(self._rates) / sum(self._rates)), 60)
        return f", {minutes}:{seconds:02d} left"
