"""Episodes: a model and an environment take turns, and every token stays as it was drawn.

A model's turn is never encoded again. What the environment says is encoded once and appended; the
text of a conversation is only a view of its tokens.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.playing import PlayConfig
from nemotron_jax.data.chat.parse import parse_turn
from nemotron_jax.data.chat.render import ANSWER, END, ChatOptions, pieces
from nemotron_jax.data.chat.tokens import encode_pieces, encode_prompt
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.wanted import Budget, Wanted
from nemotron_jax.environments.base import Task, Verdict
from nemotron_jax.environments.sound import sound_text, sound_value
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.playing.conversations import Conversations, Sampler, Written
from nemotron_jax.playing.episode import UNPLAYED, Episode, TurnSpan, turn_span
from nemotron_jax.playing.players import Players, Replies, sound_verdict

_MAX_REASON = (
    300  # characters of what an error says: a transcript holds it, and it may quote a turn
)


class Playing:
    """Tasks while they are played, each `copies` times, next to each other.

    `turn` lets every episode that goes on write one turn; the model may be another at each turn.
    What environments say to it is waited for only when it is needed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        players: Players,
        tasks: Sequence[Task],
        config: PlayConfig,
        *,
        sampler: Sampler,
        seed: int,
        copies: int = 1,
        low_effort: Sequence[bool] | None = None,
        execution: Execution = Execution(),
    ) -> None:
        """Begins every session; `sampler` is how the model is asked, and runs with `execution`.

        A prompt that leaves no room to answer, or that cannot be encoded, makes an episode that
        does not count, and so does whatever fails in one episode later: it costs no other.
        """
        self._tokenizer, self._players, self._config = tokenizer, players, config
        self._copies, self._seed, self._begin = copies, seed, sampler
        self._execution = execution
        low = list(low_effort or [False] * len(tasks))
        options = [ChatOptions(enable_thinking=config.thinking, low_effort=flag) for flag in low]
        prompts = [
            _prompt(tokenizer, task, chosen, config.max_tokens)
            for task, chosen in zip(tasks, options, strict=True)
        ]
        self._prompts = [prompt for prompt, _ in prompts]
        self._places = [place for place in range(len(tasks)) for _ in range(copies)]
        self._options = [options[place] for place in self._places]
        self._episodes = [_Unfinished(tasks[place], *prompts[place]) for place in self._places]
        self._sampler: Conversations | None = None
        self._turns = 0
        self._replies: Replies | None = None  # to the last turns, if they were not heard yet
        players.start([one.task for one in self._episodes])

    @property
    def over(self) -> bool:
        """Whether no episode goes on."""
        self._hear()
        return not any(one.waiting or self._writes(one) for one in self._episodes)

    def turn(self, model: Nemotron, version: int = 0) -> None:
        """Every episode that goes on hears its environment and writes a turn for it.

        One whose last turn waits for a sandbox writes nothing and asks again.
        """
        self._hear()
        config, going = self._config, self._episodes
        if self._sampler is None:
            self._sampler = self._new_sampler(model)
        else:
            self._sampler.swap(model)
        self._sampler.read([one.take_unread() for one in going])
        room = lambda one: min(config.max_turn_tokens, config.max_tokens - len(one.tokens))
        limits = [room(one) if self._writes(one) else 0 for one in going]
        turns: dict[int, dict | None] = {n: None for n, one in enumerate(going) if one.waiting}
        for place, new in enumerate(self._sampler.write(limits) if any(limits) else ()):
            if limits[place]:
                one = going[place]
                turns[place] = one.add(new, self._tokenizer, config.thinking, version)
        if failed := [place for place in turns if going[place].over]:
            self._players.end(failed)
            turns = {place: turn for place, turn in turns.items() if place not in failed}
        self._replies = self._players.begin_reply(turns)
        self._turns += 1

    def finish(self) -> list[Episode]:
        """The episodes with their verdicts; group numbers are the tasks' places."""
        self._hear()
        verdicts = self._players.verify()
        found = zip(self._episodes, self._places, self._options, verdicts, strict=True)
        return [
            one.finished(place, options.low_effort, verdict)
            for one, place, options, verdict in found
        ]

    def state(self) -> dict[str, Any]:
        """What has been written and heard so far, as JSON values."""
        self._hear()
        return {"turns": self._turns, "episodes": [one.state() for one in self._episodes]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same tasks, in new sessions that hear the same turns again."""
        assert self._turns == 0, "an episode has begun already"
        self._turns = state["turns"]
        for one, values in zip(self._episodes, state["episodes"], strict=True):
            one.restore(values)
        said = [one.own_messages() for one in self._episodes]
        for number in range(max(map(len, said), default=0)):
            turns = {place: own[number] for place, own in enumerate(said) if number < len(own)}
            self._players.reply(turns)
        self._players.end([n for n, one in enumerate(self._episodes) if self._ended(one)])

    def _new_sampler(self, model: Nemotron) -> Conversations:
        config, budget = self._config, None
        if config.budget is not None:
            budget = Budget(config.budget, self._tokenizer.token_id(ANSWER))
        wanted = Wanted(
            config.max_turn_tokens,
            stop_tokens=(self._tokenizer.token_id(END),),
            temperature=config.temperature,
            seed=self._seed,
            logprobs="drawn",
            budget=budget,
        )
        return self._begin(model, self._prompts, self._copies, wanted, self._execution)

    def _writes(self, one: "_Unfinished") -> bool:
        return not one.over and not one.waiting and len(one.turns) < self._config.max_turns

    def _ended(self, one: "_Unfinished") -> bool:
        """Whether an episode is over, or is cut off by its number of turns."""
        return not one.waiting and not self._writes(one)

    def _hear(self) -> None:
        """Take in what environments have said to the last turns; end what does not go on."""
        replies, self._replies = self._replies, None
        ended = []
        for place, reply in replies().items() if replies else ():
            one = self._episodes[place]
            one.waiting = reply.waiting
            if one.waiting:
                continue
            one.over = reply.over or not one.turns[-1].closed
            if not one.over:
                with one.failing("what its environment said cannot be encoded"):
                    messages = sound_value(reply.messages)
                    ids = encode_reply(self._tokenizer, messages, self._options[place])
                    one.hear(messages, ids, self._config.max_tokens)
            if self._ended(one) and not reply.over:
                ended.append(place)
        if ended:
            self._players.end(ended)


def play_episodes(
    model: Nemotron,
    tokenizer: Tokenizer,
    players: Players,
    tasks: Sequence[Task],
    config: PlayConfig,
    *,
    sampler: Sampler,
    seed: int,
    copies: int = 1,
    execution: Execution = Execution(),
) -> list[Episode]:
    """Each task played `copies` times to its end by one model."""
    playing = Playing(
        tokenizer,
        players,
        tasks,
        config,
        sampler=sampler,
        seed=seed,
        copies=copies,
        execution=execution,
    )
    while not playing.over:
        playing.turn(model)
    return playing.finish()


class _Unfinished:
    """An episode while it lasts."""

    def __init__(self, task: Task, prompt: list[int], failure: str | None) -> None:
        """`failure`: why it cannot be played, if it cannot."""
        self.task, self.failure = task, failure
        self.tokens = list(prompt)
        self.logprobs = [0.0] * len(prompt)
        self.turns: list[TurnSpan] = []
        self.forced: list[int] = []  # places of tokens that the budget put there
        self.messages: list[dict] = list(task.messages)
        self.truncated = False
        self.over = failure is not None
        self.waiting = False  # for the answer to its last turn
        self._unread: list[int] = []  # tokens that the model has not been fed yet

    def add(self, written: Written, tokenizer: Tokenizer, thinking: bool, version: int) -> dict:
        """The message that the model has just written."""
        start = len(self.tokens)
        self.forced += (start + n for n, forced in enumerate(written.forced) if forced)
        self.tokens += written.tokens
        self.logprobs += written.logprobs
        stop = len(self.tokens)
        span = TurnSpan(start, stop, False, 0, written.stopped, version)
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        with self.failing("its turn cannot be read"):
            text = tokenizer.decode(written.tokens, show_special=True)
            parsed = parse_turn(text, thinking=thinking, tools=self.task.tools, strict=True)
            span = turn_span(parsed, start, stop, written.stopped, version)
            message = sound_value(parsed.message())
        self.turns.append(span)
        self.truncated |= not written.stopped
        self.messages.append(message)
        return message

    @contextlib.contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Ends the episode where the block raises: it does not count, and the others go on."""
        try:
            yield
        except Exception as error:
            self.failure, self.over = _reason(what, error), True

    def hear(self, messages: Sequence[dict], ids: list[int], limit: int) -> None:
        """Append what the environment said; without room for it and a token more the episode is
        cut off."""
        self.messages += messages
        if len(self.tokens) + len(ids) >= limit:
            self.truncated = self.over = True
            return
        self.tokens += ids
        self.logprobs += [0.0] * len(ids)
        self._unread = self._unread + ids

    def take_unread(self) -> list[int]:
        """What the model is to be fed now."""
        unread, self._unread = self._unread, []
        return unread

    def own_messages(self) -> list[dict]:
        """The turns in messages format."""
        said = self.messages[len(self.task.messages) :]
        return [message for message in said if message["role"] == "assistant"]

    def finished(self, group: int, low_effort: bool, verdict: Verdict) -> Episode:
        return Episode(
            task=self.task,
            group=group,
            tokens=tuple(self.tokens),
            logprobs=np.array(self.logprobs, np.float32),
            turns=tuple(self.turns),
            truncated=self.truncated or not self.over,
            verdict=sound_verdict(verdict) if self.failure is None else _unplayed(self.failure),
            messages=tuple(self.messages),
            low_effort=low_effort,
            forced=tuple(self.forced),
        )

    def state(self) -> dict[str, Any]:
        kept = ("tokens", "logprobs", "forced", "messages")
        kept += ("truncated", "over", "failure", "waiting")
        turns = [dataclasses.asdict(turn) for turn in self.turns]
        return {**{name: getattr(self, name) for name in kept}, "turns": turns}

    def restore(self, state: dict[str, Any]) -> None:
        prompt = len(self.tokens)
        for name, value in state.items():
            setattr(self, name, value)
        self.turns = [TurnSpan(**turn) for turn in state["turns"]]
        self._unread = [] if self.over else self.tokens[prompt:]  # a new cache holds nothing of it


def _prompt(
    tokenizer: Tokenizer, task: Task, options: ChatOptions, limit: int
) -> tuple[list[int], str | None]:
    """A task's prompt, cut to what an episode has room for, and why it cannot be played."""
    try:
        prompt = encode_prompt(tokenizer, task.messages, task.tools, options)
    except Exception as error:
        return [tokenizer.pad], _reason(f"the prompt of {task.id} cannot be encoded", error)
    if len(prompt) < limit:
        return prompt, None
    return prompt[: limit - 1], f"the prompt of {task.id} alone has {len(prompt)} tokens"


def _unplayed(reason: str) -> Verdict:
    return Verdict(0.0, {UNPLAYED: 1.0}, infra_error=reason)


def _reason(what: str, error: Exception) -> str:
    return sound_text(f"{what}: {error!r}"[:_MAX_REASON])


def encode_reply(tokenizer: Tokenizer, messages: Sequence[dict], options: ChatOptions) -> list[int]:
    """The ids between a turn that the model closed and its next one: what it reads in between."""
    whole = pieces([{"role": "assistant", "content": ""}, *messages], None, options, True)
    last = max(place for place, piece in enumerate(whole) if piece.turn == 0)
    return encode_pieces(tokenizer, whole[last + 1 :])
