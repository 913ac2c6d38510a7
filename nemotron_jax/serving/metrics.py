"""Counts of the server in Prometheus's text format, under vLLM's names where it has some."""

import bisect
from collections.abc import Iterator, Sequence

from nemotron_jax.decoding.generator import Stats

# Upper ends of the histograms' buckets, in seconds: from a fast step to a prompt of 1M tokens.
_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Histogram:
    """How often a value was at most so large."""

    def __init__(self, bounds: Sequence[float] = _LATENCY_S) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def lines(self, name: str) -> Iterator[str]:
        """It, as text."""
        yield f"# TYPE {name} histogram"
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Metrics:
    """What the event loop measures itself; for its thread alone."""

    def __init__(self) -> None:
        self.first_token, self.between_tokens, self.lag = Histogram(), Histogram(), Histogram()
        self.answers: dict[int, int] = {}  # by status

    def given(self, now: float, began: float, before: float | None, tokens: int) -> None:
        """Some tokens of a continuation came, the first ones where `before` is None."""
        if before is None:
            self.first_token.add(now - began)
        else:
            self.between_tokens.add((now - before) / tokens, tokens)

    def answered(self, status: int) -> None:
        """A request was answered."""
        self.answers[status] = self.answers.get(status, 0) + 1

    def text(self, stats: Stats | None) -> str:
        """All of it."""
        lines = list(_of_stats(stats)) if stats is not None else []
        lines += self.first_token.lines("vllm:time_to_first_token_seconds")
        lines += self.between_tokens.lines("vllm:inter_token_latency_seconds")
        lines += self.lag.lines("nemotron_event_loop_lag_seconds")
        lines.append("# TYPE nemotron_http_responses_total counter")
        for status, count in sorted(self.answers.items()):
            lines.append(f'nemotron_http_responses_total{{status="{status}"}} {count}')
        return "\n".join(lines) + "\n"


def _of_stats(stats: Stats) -> Iterator[str]:
    accepted, drafted = 0, 0
    if stats.acceptance is not None:
        accepted, drafted = stats.acceptance.accepted, stats.acceptance.drafted
    for kind, name, value in (
        ("gauge", "vllm:num_requests_running", stats.running),
        ("gauge", "vllm:num_requests_waiting", stats.waiting),
        ("counter", "vllm:prompt_tokens_total", stats.prompt_tokens),
        ("counter", "vllm:generation_tokens_total", stats.new_tokens),
        ("counter", "vllm:prefix_cache_queries_total", stats.prefix_queries),
        ("counter", "vllm:prefix_cache_hits_total", stats.prefix_hits),
        ("counter", "vllm:spec_decode_num_draft_tokens_total", drafted),
        ("counter", "vllm:spec_decode_num_accepted_tokens_total", accepted),
        ("counter", "nemotron_prefix_cache_tokens_total", stats.prefix_tokens),
        ("counter", "nemotron_requests_finished_total", stats.finished),
        ("counter", "nemotron_requests_cancelled_total", stats.cancelled),
        ("gauge", "nemotron_pages", stats.pages),
        ("gauge", "nemotron_free_pages", stats.free_pages),
    ):
        yield f"# TYPE {name} {kind}"
        yield f"{name} {value}"
