"""The sources of a run, opened: text with all its documents, token shards with their index."""

from collections.abc import Iterable, Sequence

from nemotron_jax.config.run import DataConfig
from nemotron_jax.data.held_out import Split, split_documents
from nemotron_jax.data.packing import DocumentTokens
from nemotron_jax.data.shards import SHARDS_PREFIX, TokenShards
from nemotron_jax.data.sources import Collection, collect

Opened = Collection | TokenShards


def open_sources(data: DataConfig) -> list[Opened]:
    """Each source of a run, checked; raises ValueError for the first that cannot be read."""
    return [
        TokenShards(source) if source.startswith(SHARDS_PREFIX) else collect(source)
        for source in data.sources
    ]


def texts_of(opened: Sequence[Opened]) -> list[Collection]:
    """The sources whose text is in memory."""
    return [source for source in opened if isinstance(source, Collection)]


def shards_of(opened: Sequence[Opened]) -> list[TokenShards]:
    """The sources that are token shards."""
    return [source for source in opened if isinstance(source, TokenShards)]


def split_sources(opened: Sequence[Opened], data: DataConfig) -> Split:
    """Training documents of each text source; held-out documents of all, those of shards last.

    Shards hold their documents out, and drop what repeats their own training text, when they are
    made: `data.held_out_fraction` is for text sources alone.
    """
    texts = texts_of(opened)
    split = split_documents(texts, data.held_out_fraction) if texts else Split((), (), ())
    held_out = [document for source in shards_of(opened) for document in source.held_out()]
    dropped = [name for source in shards_of(opened) for name in source.index.dropped]
    return Split(split.train, (*split.held_out, *held_out), (*split.dropped, *dropped))


def in_order(
    opened: Sequence[Opened], texts: Iterable[DocumentTokens]
) -> tuple[DocumentTokens | TokenShards, ...]:
    """The training documents of each source, where `texts` are those of the text sources."""
    texts = iter(texts)
    return tuple(one if isinstance(one, TokenShards) else next(texts) for one in opened)


def describe_source(collection: Opened) -> str:
    """A line for the user of a run."""
    if isinstance(collection, TokenShards):
        return collection.describe()
    size = sum(record.bytes for record in collection.files) / 1e6
    line = f"{len(collection.documents)} documents, {len(collection.files)} files, {size:.2f} MB"
    if collection.skipped:
        line += f", {len(collection.skipped)} files skipped as not UTF-8"
    if others := collection.left_out:
        names = ", ".join(others[:3]) + (" …" if len(others) > 3 else "")
        line += f", {len(others)} files of other kinds left out ({names})"
    return f"{collection.source}: {line}"
