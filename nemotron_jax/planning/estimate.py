"""The planner's answer without a compiler: bytes, seconds and utilisation of a run on a slice."""

import dataclasses
import math
from collections.abc import Mapping

from nemotron_jax.config.run import RunConfig
from nemotron_jax.model import accounting
from nemotron_jax.planning import kernels, slices
from nemotron_jax.planning.decode import HEADROOM, Decoding, Wish, decoding, sums_bytes
from nemotron_jax.planning.network import layouts
from nemotron_jax.planning.train import Planner, Step
from pallas_kernels.devices import Slice

STAGES = ("train", "decode", "grpo")
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked: a run, its stage, and where the answer is not to be searched for.

    `mesh` None: the best one; `rows` and `context` None: those of the stage. `links` replaces the
    links that a device has along the axes that share a weight.
    """

    config: RunConfig
    stage: str = "train"
    mesh: Mapping[str, int] | None = None
    rows: int | None = None
    context: int | None = None
    experts: str = "dense"
    speculative: int = 0
    acceptance: float | None = None
    links: int | None = None

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"--stage={self.stage}: must be one of {', '.join(STAGES)}")
        if self.links is not None and self.links < 1:
            raise ValueError(f"--links={self.links}: must be at least 1")
        self.wish()  # its values too are checked before anything is counted

    def wish(self, rows: int = 64, context: int = 32_768) -> Wish:
        """What is to be decoded, with these sizes where none are asked for."""
        rows = rows if self.rows is None else self.rows
        context = context if self.context is None else self.context
        return Wish(rows, context, self.experts, self.speculative, self.acceptance)


def estimate(question: Question, place: Slice) -> dict:
    """The report of one slice; the keys of a compiled one, and what only arithmetic knows."""
    answer = {"train": _train, "decode": _decode, "grpo": _grpo}[question.stage]
    config = question.config
    report = {
        "target": place.target,
        "stage": question.stage,
        "estimated": True,
        "devices": place.size,
        "collectives": {},
        "overlap": {},
        "compile_seconds": 0.0,
        "rows": config.data.batch_size,
        "sequence_length": config.data.sequence_length,
        "remat": config.execution.remat,
        "precision": precision_of(config),
        "trains": config.training.trains,
        "jax": "",
        "why": "",
    }
    return report | answer(question, place)


def over_slices(question: Question) -> list[dict]:
    """Reports of every slice that is rented; with a mesh, of those with as many devices."""
    places = slices.rented()
    if question.mesh is not None:
        size = math.prod(question.mesh.values())
        places = [place for place in places if place.size == size]
        if not places:
            raise ValueError(f"--target=all: no slice in the table has the mesh's {size} devices")
    found = []
    for place in places:
        try:
            found.append(estimate(question, place))
        except ValueError as error:  # of a batch that this slice cannot share
            found.append({"target": place.target, "devices": place.size, "why": str(error)})
    if all("fits" not in report for report in found):
        raise ValueError(found[0]["why"])
    return sorted(found, key=lambda report: report["devices"])


def precision_of(config: RunConfig) -> str:
    """The formats of a run's products, as text."""
    execution = config.execution
    text = execution.compute_dtype
    formats = set(execution.precision.formats.values())
    if formats:
        high = execution.precision.num_last_layers_high
        text += f", emulated {' and '.join(sorted(formats))} but in the last {high} layers"
    return text


def _train(question: Question, place: Slice) -> dict:
    mesh, micro, step = _step(question, place)
    return {
        "mesh": mesh,
        "micro_batches": micro,
        **_memory(step.size, place),
        "estimated_step_seconds": _seconds(step),
        "estimated_parts": {
            **_rounded(step.products),
            **_rounded(step.memory),
            **_rounded(step.network),
        },
        "mfu": round(_flops(question.config) / step.seconds / _peak(place), 4),
        "tokens_per_second": round(_tokens(question.config) / step.seconds, 1),
        "link_bytes_per_device": int(step.link_bytes),
        "constants": _constants(place, step.layout.links),
    }


def _decode(question: Question, place: Slice) -> dict:
    wish = question.wish()
    found = decoding(question.config.model, place, wish)
    seconds = found.step.seconds
    return {
        "mesh": _copies(found),
        "micro_batches": 1,
        **_memory(found.size, place),
        "estimated_step_seconds": _parts_of(found.step),
        "mfu": round(found.flops / seconds / _peak(place), 4),
        "link_bytes_per_device": int(sums_bytes(question.config.model, found, wish.rows)),
        "constants": _constants(place, _links_of(place, found)),
        "decode": _rates(found, wish),
    }


def _grpo(question: Question, place: Slice) -> dict:
    """Rollouts of the whole batch to their longest, scored once a model, then the updates."""
    config = question.config
    mesh, micro, step = _step(question, place)
    scored = Planner(config, place, question.links, scores=True).step(mesh, micro)
    passes = 1 + (config.rl.objective.kl_weight > 0)
    rollout, episodes = config.rl.rollout, config.data.batch_size
    rows = min(episodes, rollout.slots) if rollout.sampler == "engine" else episodes
    wish = question.wish(rows, max(1, rollout.max_tokens // 2))
    state = step.size["parameters"] + step.size["optimizer"]
    played = decoding(config.model, place, wish, taken=state)
    if not played.fits and 0 < played.rows_that_fit < wish.rows:
        wish = dataclasses.replace(wish, rows=played.rows_that_fit)
        played = decoding(config.model, place, wish, taken=state)
    calls = math.ceil(episodes / wish.rows) * rollout.max_tokens / played.mean_length
    play, score = calls * played.round_seconds, passes * scored.seconds
    step_seconds = config.rl.updates * step.seconds
    parts = [
        {name: value * calls for name, value in _parts_of(played.step).items()},
        {name: value * passes for name, value in _seconds(scored).items()},
        {name: value * config.rl.updates for name, value in _seconds(step).items()},
    ]
    total = play + score + step_seconds
    sums = {name: round(sum(part[name] for part in parts), 3) for name in parts[0]}
    memory = _memory(step.size, place)
    memory["fits"] = memory["fits"] and played.fits
    tokens = episodes * rollout.max_tokens
    return {
        "mesh": mesh,
        "micro_batches": micro,
        **memory,
        "estimated_step_seconds": sums | {"total": round(total, 3)},
        "mfu": round(_flops(config) / total / _peak(place), 4),
        "link_bytes_per_device": int(step.link_bytes + passes * scored.link_bytes),
        "constants": _constants(place, step.layout.links),
        "grpo": {
            "rollout": {
                "seconds": round(play, 2),
                "tokens": tokens,
                "tokens_per_second": round(tokens / play, 1),
                "mesh": _copies(played),
                **{"rows": wish.rows, "context": wish.context, "experts": wish.experts},
                "rows_that_fit": played.rows_that_fit,
            },
            "scoring": {"seconds": round(score, 2), "passes": passes},
            "step": {"seconds": round(step_seconds, 2), "updates": config.rl.updates},
        },
    }


def _step(question: Question, place: Slice) -> tuple[dict[str, int], int, Step]:
    """The step on the mesh that is asked for, or on the best one."""
    if question.mesh is None:
        found = slices.best(question.config, place, question.links)
        return found.mesh, found.micro_batches, found.step
    micro = question.config.training.micro_batches
    planner = Planner(question.config, place, question.links)
    return dict(question.mesh), micro, planner.step(question.mesh, micro)


def _rates(found: Decoding, wish: Wish) -> dict:
    plain = found.step.seconds
    speculative = None
    if wish.speculative:
        speculative = {
            "k": wish.speculative,
            "mean_length": round(found.mean_length, 3),
            "tokens_per_second": round(wish.rows * found.mean_length / found.round_seconds, 1),
        }
    return {
        "rows": wish.rows,
        "context": wish.context,
        "experts": wish.experts,
        "tokens_per_second": round(wish.rows / plain, 1),
        "tokens_per_second_user": round(1 / plain, 1),
        "speculative": speculative,
        "rows_that_fit": found.rows_that_fit,
    }


def _memory(size: Mapping[str, int], place: Slice) -> dict:
    total, available = sum(size.values()), int(place.device.memory)
    fits = total <= HEADROOM * available
    why = f"about {total / GB:.1f} GB a device; a tenth of {available / GB:.0f} is left free"
    return {
        "fits": fits,
        "bytes_per_device": {**size, "total": total, "available": available},
        "why": "" if fits else why,
    }


def _seconds(step: Step) -> dict[str, float]:
    products, memory, network = (
        sum(part.values()) for part in (step.products, step.memory, step.network)
    )
    parts = {"products": products, "memory": memory, "network": network}
    return _rounded({"total": step.seconds, **parts, "network_hidden": 0.0})


def _parts_of(call: object) -> dict[str, float]:
    parts = dataclasses.asdict(call)
    return _rounded({"total": call.seconds, **parts, "network_hidden": 0.0})


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Six significant figures: more would promise what arithmetic cannot keep."""
    return {name: float(f"{value:.6g}") for name, value in values.items()}


def _constants(place: Slice, links: float) -> dict:
    device = place.device
    speed = kernels.kernels_of(place.name)
    return {
        "flops": device.flops,
        "hbm": device.hbm,
        "link": device.link,
        "links": round(links, 2),
        "dense_products": round(1 / speed.dense / device.flops, 2),
        "static_kernels": speed.static,
    }


def _links_of(place: Slice, found: Decoding) -> float:
    mesh = {"data": found.copies, "expert": found.devices}
    return min(layouts(place, mesh), key=lambda one: one.expert).links


def _copies(found: Decoding) -> dict[str, int]:
    return {"copies": found.copies, "devices_of_a_copy": found.devices}


def _tokens(config: RunConfig) -> int:
    return config.data.batch_size * config.data.sequence_length


def _flops(config: RunConfig) -> float:
    """Model FLOPs of a step, rematerialisation left out."""
    length, depths = config.data.sequence_length, config.training.mtp_depths
    each = accounting.training_flops(config.model, length, mtp_depths=depths).total
    return each * _tokens(config)


def _peak(place: Slice) -> float:
    return place.size * place.device.flops
