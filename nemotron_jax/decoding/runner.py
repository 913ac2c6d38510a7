"""The engine's device side: what to compile, and calls of whole slots into arrays and back."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.config.execution import Execution
from nemotron_jax.decoding import store as programs
from nemotron_jax.decoding.choice import Costs, costs_of, fastest
from nemotron_jax.decoding.loop import Sizes
from nemotron_jax.decoding.pinned import Pinned
from nemotron_jax.decoding.prefix_cache import Entry
from nemotron_jax.decoding.rules import Asked, Free
from nemotron_jax.decoding.scheduler import Slot
from nemotron_jax.decoding.step import for_execution
from nemotron_jax.decoding.store import Decoded, DecodeRows, FlatModel, PrefillRows, Store
from nemotron_jax.decoding.wanted import MOST_TOP
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import laid_out, mesh_of, own_mesh
from nemotron_jax.sharding import on_mesh, replicated

# A table of pages is as wide as the longest row needs, in powers of this: attention reads all of
# it, and every width compiles a program of each kind.
_WIDTHS_FACTOR, _MOST_WIDTHS = 8, 3
_SMALLEST_CONTEXT = 512  # tokens; below that one width does for all
# Few rows decode in a program of a part of the slots: the last ones of a wave, or one alone.
_FEW_ROWS = 8  # the part is one in this many
_MOST_SLOTS_WHOLE = 8  # so many slots are always decoded together
_TIMED = 3  # times that each kind of call is timed where drafts are to be chosen


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A model, what programs take of it, and its version: they change together."""

    model: Nemotron
    weights: FlatModel
    version: int | str


class Runner:
    """A model and its store, and the handful of programs that serve every mix of slots."""

    def __init__(
        self, model: Nemotron, config: EngineConfig, execution: Execution, version: int | str
    ) -> None:
        self._mesh, self._loaded = mesh_of(model), None
        self.put_model(model, version)
        self._config, self._execution = config, execution
        top = min(MOST_TOP, self.vocabulary)
        self._sizes = {k: Sizes(config.capacity(k), k, top) for k in config.drafts}
        self._free = Free(model.config.vocab_size)
        # Tokens past a row's end that a call may write: a round's, or those that are read at once.
        self._room = max(config.most_drafts + 1, config.rounds if len(config.drafts) > 1 else 0)
        self._decode_widths = self._widths(config.max_length + self._room)
        slots = config.slots
        few = [max(slots // _FEW_ROWS, 1)] if slots > _MOST_SLOTS_WHOLE else []
        self._decode_rows = [*few, slots]
        self._prefill_widths = {
            shape: self._widths(config.max_length + shape[1]) for shape in config.prefill_shapes
        }
        self.renew()
        self._programs = programs if self._mesh is None else Pinned.of(self._store)
        self._compile()

    @property
    def model(self) -> Nemotron:
        """The model that runs."""
        return self._loaded.model

    @property
    def vocabulary(self) -> int:
        """How many tokens it has."""
        return self.model.config.vocab_size

    @property
    def version(self) -> int | str:
        """What its tokens bear."""
        return self._loaded.version

    def prepared(self, model: Nemotron) -> Nemotron:
        """The model as it runs here; it may be spread over other devices, as one in training is."""
        with on_mesh(own_mesh(model) or self._mesh):
            model = for_execution(model, self._execution)
        with self._on_mesh():
            return laid_out(model)

    def put_model(self, model: Nemotron, version: int | str) -> None:
        """Run this model from now on, where the first one lies; one of another shape would compile
        the programs anew."""
        like = None if self._loaded is None else self._loaded.model
        model = _placed(model, like, self._mesh)
        self._loaded = _Loaded(model, FlatModel.of(model), version)

    def renew(self) -> None:
        """Make the store anew: all that it held is lost."""
        self._store = None  # frees the old one first
        with self._on_mesh():
            self._store = Store.create(self.model, self._config)

    def prefill(
        self, slots: Sequence[Slot], shape: tuple[int, int]
    ) -> tuple[Int[np.ndarray, "B"], Float[Array, "B T D"]]:
        """Read the slots' next chunks: how many tokens of each, and the hidden states."""
        rows, chunk = shape
        numbers, start, lengths = (
            np.full(rows, fill, np.int32) for fill in (self._config.slots, 0, 0)
        )
        tokens = np.zeros((rows, chunk), np.int32)
        for row, slot in enumerate(slots):
            piece = slot.prompt[slot.length : slot.length + chunk]
            numbers[row], start[row], lengths[row] = slot.number, slot.length, len(piece)
            tokens[row, : len(piece)] = piece
        width = self._width(int(start.max()) + chunk, self._prefill_widths[shape])
        table = _table(slots, range(len(slots)), (rows, width))
        told = PrefillRows(numbers, table, start, tokens, lengths)
        hidden = self._prefill(told)
        return lengths, hidden

    def rows_for(self, slots: int) -> int:
        """Rows of the program that decodes for so many slots."""
        return next(rows for rows in self._decode_rows if rows >= slots)

    def decode(self, slots: Sequence[Slot], rounds: int, drafts: int) -> tuple[Decoded, list[int]]:
        """Decode for these slots, at most `rounds` rounds of so many drafts, while the others rest:
        what was given, on the host, and each slot's row in it."""
        grown = rounds * (drafts + 1)
        longest = max(slot.length + min(grown, slot.left - 1) for slot in slots)
        width = self._width(longest + self._room, self._decode_widths)
        count = self.rows_for(len(slots))
        every = count == self._config.slots
        rows = [slot.number if every else row for row, slot in enumerate(slots)]
        told = self._told(slots, rows, (count, width))
        found = self._decode(told, rounds, drafts)
        if not any(slot.job.request.wanted.top_logprobs for slot in slots):
            # They lie on the device as nothing; bringing them would take as long as all the rest.
            none = dict.fromkeys(("top_tokens", "top_logprobs"))
            given = dataclasses.replace(found.given, **none)
            found = dataclasses.replace(found, given=given)
        return jax.device_get(found), rows

    def score(
        self, hidden: Float[Array, "B T D"], targets: Int[np.ndarray, "B T"]
    ) -> programs.Scores:
        """Log-probabilities of what follows each hidden state, on the host."""
        with self._on_mesh():
            found = programs.score(self._loaded.weights, hidden, targets, execution=self._execution)
        return programs.Scores(*map(np.asarray, found))

    def save(self, slot: Slot, entry: Entry) -> None:
        """Keep the slot's states in the entry's snapshot."""
        self._save(slot.number, entry.snapshot)

    def load(self, entry: Entry, slot: Slot, shared: int) -> None:
        """Let the slot stand where the entry ends; a page after those that the two share is the
        slot's own copy."""
        copied = len(entry.pages) > shared
        pages = (entry.pages[shared], slot.pages[shared]) if copied else (0, 0)
        self._load(entry.snapshot, slot.number, *pages)

    def _prefill(self, rows: PrefillRows) -> Float[Array, "B T D"]:
        with self._on_mesh():
            store, hidden = self._programs.prefill(
                self._loaded.weights, self._without_snapshots(), rows, execution=self._execution
            )
        self._store = dataclasses.replace(store, snapshots=self._store.snapshots)
        return hidden

    def _without_snapshots(self) -> Store:
        """What prefill and decoding need of the store: what passes through a program unchanged may
        come back laid out by another name, for which the next one would be compiled again."""
        return dataclasses.replace(self._store, snapshots=None)

    def _decode(self, rows: DecodeRows, rounds: int, drafts: int) -> Decoded:
        with self._on_mesh():
            store, given = self._programs.decode(
                self._loaded.weights,
                self._without_snapshots(),
                rows,
                np.int32(rounds),
                sizes=self._sizes[drafts],
                execution=self._execution,
            )
        self._store = dataclasses.replace(store, snapshots=self._store.snapshots)
        return given

    def _save(self, *places: int) -> None:
        with self._on_mesh():
            self._store = self._programs.save_snapshot(self._store, *map(_int, places))

    def _load(self, *places: int) -> None:
        with self._on_mesh():
            self._store = self._programs.load_snapshot(self._store, *map(_int, places))

    def _on_mesh(self) -> AbstractContextManager:
        """Every call on the mesh that the engine was made on: on another a program is compiled
        anew."""
        return on_mesh(self._mesh)

    def _told(
        self, slots: Sequence[Slot], rows: Sequence[int], shape: tuple[int, int]
    ) -> DecodeRows:
        """What the decode program is told of the slots in these rows, with tables of this shape."""
        count, empty = shape[0], lambda fill=0: np.full(shape[0], fill, np.int32)
        requests = {row: slot.job.request for row, slot in zip(rows, slots, strict=True)}
        told = DecodeRows(
            slot=empty(self._config.slots),
            table=_table(slots, rows, shape),
            length=empty(),
            token=empty(),
            fresh=np.zeros(count, bool),
            active=np.zeros(count, bool),
            asked=Asked.of(requests, count, self._free),
        )
        for row, slot in zip(rows, slots, strict=True):
            request = slot.job.request
            told.slot[row], told.length[row] = slot.number, slot.length
            told.active[row], told.fresh[row] = True, not request.tokens
            told.token[row] = request.tokens[-1] if request.tokens else 0
        return told

    def _compile(self) -> None:
        """Run every program once, on slots that do not exist."""
        for shape, widths in self._prefill_widths.items():
            rows, zeros = (
                np.full(shape[0], self._config.slots, np.int32),
                np.zeros(shape[0], np.int32),
            )
            tokens = np.zeros(shape, np.int32)
            for width in widths:
                table = np.zeros((shape[0], width), np.int32)
                told = PrefillRows(rows, table, zeros, tokens, zeros)
                hidden = self._prefill(told)
            self.score(hidden, tokens)
        for width, rows in itertools.product(self._decode_widths, self._decode_rows):
            for drafts in self._sizes:
                self._decode(self._told([], [], (rows, width)), 0, drafts)
        self._save(0, 0)
        self._load(0, 0, 0, 0)

    def costs(self) -> dict[int, Costs]:
        """What drafts and verifications take beside a plain round, by rows of a decode program;
        timed on slots that nothing runs in, each kind in turn, the shortest of a few times."""
        return {rows: self._costs_of(rows) for rows in self._decode_rows}

    def _costs_of(self, rows: int) -> Costs:
        told = self._told([], [], (rows, self._decode_widths[0]))
        most = np.full(rows, max(size.capacity for size in self._sizes.values()), np.int32)
        asked = dataclasses.replace(told.asked, limit=most)
        told = dataclasses.replace(told, active=np.ones(rows, bool), asked=asked)
        rounds, kinds = self._config.rounds, [*self._sizes, "draft"]
        self._draft(told)  # compiled here
        turns = ((kind, self._seconds(told, kind)) for _ in range(_TIMED) for kind in kinds)
        found = fastest(turns)
        draft_seconds = found.pop("draft") / self._config.most_drafts
        return costs_of({k: found[k] / rounds for k in self._sizes}, draft_seconds)

    def _seconds(self, rows: DecodeRows, kind: int | str) -> float:
        """How long a call takes: all rounds of so many drafts, or a round's drafts alone."""
        begin = time.perf_counter()
        if kind == "draft":
            jax.block_until_ready(self._draft(rows))
        else:
            jax.block_until_ready(self._decode(rows, self._config.rounds, kind).count)
        return time.perf_counter() - begin

    def _draft(self, rows: DecodeRows) -> Int[Array, "B k"]:
        with self._on_mesh():
            store, tokens = self._programs.draft_alone(
                self._loaded.weights,
                self._without_snapshots(),
                rows,
                count=self._config.most_drafts,
                execution=self._execution,
            )
        self._store = dataclasses.replace(store, snapshots=self._store.snapshots)
        return tokens

    def _widths(self, tokens: int) -> list[int]:
        """Table widths in pages, of which the widest holds so many tokens."""
        widths = [-(-tokens // self._config.page_tokens)]
        while (
            widths[-1] * self._config.page_tokens > _SMALLEST_CONTEXT and len(widths) < _MOST_WIDTHS
        ):
            widths.append(-(-widths[-1] // _WIDTHS_FACTOR))
        return widths[::-1]

    def _width(self, tokens: int, widths: Sequence[int]) -> int:
        return next(width for width in widths if width * self._config.page_tokens >= tokens)


def _placed(model: Nemotron, like: Nemotron | None, mesh: Mesh | None) -> Nemotron:
    """The model where `like` lies, or where it is, committed to its devices: what a program gives
    back is so too, and arrays that are not would compile it once more."""

    def put(leaf: Array | np.ndarray, mine: Array | None) -> Array:
        leaf = jnp.asarray(leaf)
        place = leaf.sharding if mine is None else mine.sharding
        if mine is None and mesh is not None and not isinstance(place, NamedSharding):
            place = replicated(mesh)
        return jax.device_put(leaf, place)

    leaves, structure = jax.tree.flatten(model)
    likes = [None] * len(leaves) if like is None else jax.tree.leaves(like)
    return jax.tree.unflatten(structure, [*map(put, leaves, likes)])


def _table(
    slots: Sequence[Slot], rows: Sequence[int], shape: tuple[int, int]
) -> Int[np.ndarray, "B W"]:
    """Each slot's pages in its row, as many as the width takes."""
    table = np.zeros(shape, np.int32)
    for row, slot in zip(rows, slots, strict=True):
        pages = slot.pages[: shape[1]]
        table[row, : len(pages)] = pages
    return table


def _int(value: int) -> np.ndarray:
    """A number as programs take it: one of Python would compile another for its type."""
    return np.asarray(value, np.int32)
