"""Which slice, and which mesh on it: a search over what the estimate knows."""

import dataclasses
from collections.abc import Iterator

from nemotron_jax.config.run import RunConfig
from nemotron_jax.planning.decode import HEADROOM
from nemotron_jax.planning.train import Planner, Step
from pallas_kernels.devices import Slice, slice_of

# What clouds rent, small to large; of a kind the sizes between which a choice is usual.
RENTED = (
    *("v5e:4x4", "v5e:8x8", "v5e:16x16"),
    *("v6e:2x4", "v6e:4x4", "v6e:8x8", "v6e:16x16"),
    *("v5p:2x2x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:8x8x4", "v5p:8x8x8", "v5p:8x8x16"),
    *("tpu7x:2x2x1", "tpu7x:2x2x4", "tpu7x:4x4x4", "tpu7x:8x8x4", "tpu7x:8x8x8"),
    *("h100:8", "h100:64", "h100:256", "h200:8", "h200:64", "b200:8", "b200:64"),
)
_ROWS = (1, 2, 4)  # of a device in a micro-batch


@dataclasses.dataclass(frozen=True)
class Choice:
    """A mesh with the micro-batches that give each device `rows` rows at a time."""

    mesh: dict[str, int]
    micro_batches: int
    step: Step

    @property
    def bytes(self) -> int:
        """Bytes that a device holds."""
        return sum(self.step.size.values())

    def fits(self, place: Slice) -> bool:
        """Whether that leaves a device of the slice the room that a compiler needs."""
        return self.bytes <= HEADROOM * place.device.memory


def rented() -> list[Slice]:
    """The slices of `--target=all`."""
    return [slice_of(target) for target in RENTED]


def best(config: RunConfig, place: Slice, links: int | None = None) -> Choice:
    """The fastest mesh that fits, or where none does the one that needs the fewest bytes.

    Raises ValueError where the batch has no row for every device.
    """
    if config.data.batch_size % place.size:
        raise ValueError(
            f"target={place.target!r}: data.batch_size={config.data.batch_size} is not a multiple "
            f"of its {place.size} devices"
        )
    planner = Planner(config, place, links)
    sizes = {key: sum(planner.size(*_named(key)).values()) for key in _meshes(config, place)}
    least = min(sizes, key=sizes.get)
    fitting = [key for key, size in sizes.items() if size <= HEADROOM * place.device.memory]
    found = [Choice(*_named(key), planner.step(*_named(key))) for key in fitting or [least]]
    return min(found, key=lambda one: one.step.seconds)


def _meshes(config: RunConfig, place: Slice) -> Iterator[tuple[int, int, int, int]]:
    """Sizes of data, fsdp and expert, and micro-batches."""
    count = config.model.moe.num_experts if config.model.moe else 1
    experts = [n for n in _divisors(place.size) if count % n == 0]
    for rows in _ROWS:
        micro, left = divmod(config.data.batch_size, place.size * rows)
        for expert in experts if not left else ():
            for fsdp in _divisors(place.size // expert):
                yield place.size // expert // fsdp, fsdp, expert, micro


def _named(sizes: tuple[int, int, int, int]) -> tuple[dict[str, int], int]:
    """A mesh by its axes, and its micro-batches."""
    data, fsdp, expert, micro = sizes
    return {"data": data, "fsdp": fsdp, "expert": expert}, micro


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]
