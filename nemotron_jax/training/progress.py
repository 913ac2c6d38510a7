"""What a run shows while it goes on: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import tqdm

LINE_EVERY_S = 10.0

# What else an evaluation may bring, and how it is told.
_SHOWN = {"bits_per_byte": "bits/byte", "success": "of held-out tasks solved"}


def told(value: float | None, digits: int = 4) -> str:
    """A number as it is shown; records hold null for one that is not finite."""
    return "not finite" if value is None else f"{value:.{digits}f}"


def _evaluated(record: Mapping[str, Any]) -> bool:
    return "held_out_loss" in record or any(name in record for name in _SHOWN)


class Progress:
    """Steps done with loss, tokens/s and time left; evaluations always get a line of their own."""

    def __init__(self, steps: int, start: int) -> None:
        self._steps, self._start = steps, start
        self._began = self._last_line = time.monotonic()
        self._bar = (
            tqdm.tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)
            if sys.stderr.isatty()
            else None
        )

    def show(self, record: Mapping[str, Any]) -> None:
        """Bring what is shown up to the record of a step."""
        loss, rate = record["loss"], record["tokens_per_second"]
        text = f"loss {told(loss, 3)}"
        text += f", {rate:,.0f} tokens/s" if rate else ""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(record["step"] - self._bar.n)
        elif _evaluated(record) or time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(f"step {record['step']}/{self._steps}: {text}{self._left(record['step'])}")
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
        if self._bar is not None:
            self._bar.close()

    def _left(self, step: int) -> str:
        if step == self._start:
            return ""
        seconds = (time.monotonic() - self._began) / (step - self._start) * (self._steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        return f", {minutes}:{seconds:02d} left"
