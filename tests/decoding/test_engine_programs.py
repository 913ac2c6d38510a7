"""The engine's own programs: compiled once, cut off anywhere, and with too few pages for all."""

import itertools
import random

import jax
import pytest

from nemotron_jax.config.run import MeshConfig
from nemotron_jax.decoding import runner
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.model.parameters import flatten, model_shardings, unflatten
from nemotron_jax.sharding import make_mesh
from tests.decoding import engines
from tests.decoding.engines import (
    NEW,
    PROMPTS,
    WAYS,
    assert_alone,
    assert_empty,
    make,
    programs,
    quick_programs,  # noqa: F401  # for all of this file
    sample,
    submit,
)


@pytest.fixture(scope="module")
def model():
    return engines.old_model()


@pytest.mark.parametrize("speculative, prefix", [(0, False), (2, True)])
def test_nothing_is_compiled_after_the_engine_is_made(model, speculative, prefix):
    """Arrays that are committed to a device, as those of a checkpoint are, and others, in turn."""
    other = engines.new_model()
    committed = jax.device_put(model, jax.devices()[0])
    assert jax.tree.leaves(committed)[0].committed and not jax.tree.leaves(model)[0].committed
    for weights in ((committed, other), (model, committed), (model, other)):
        engine = make(weights[0], speculative, prefix_cache=prefix)
        made = programs()
        for one in weights:
            engine.replace_weights(one, "next")
            for n in range(3):
                options = {"n": 1 + n, "prompt_logprobs": n % 2 == 0, **WAYS[n % len(WAYS)]}
                submit(engine, PROMPTS[n], max_new_tokens=7, **options)
            engine.step()
            engine._in_doubt = True  # as after an exception: the store is made anew
            engine.run()
            assert programs() == made


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_nothing_is_compiled_after_it_on_a_mesh(model, fsdp):
    """One that is set when the engine is made, or is the model's own, and not when it serves."""
    mesh = make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:fsdp])
    with jax.set_mesh(mesh):
        places = model_shardings(model, mesh)
        table = {name: jax.device_put(a, places[name]) for name, a in flatten(model).items()}
        on_mesh = unflatten(model, table)
        inside = make(model, 2, prefix_cache=True)
    for engine in (inside, make(on_mesh, 2, prefix_cache=True)):
        made = engine.stats().programs
        for weights in (on_mesh, model):
            requests = submit(engine, PROMPTS[3], max_new_tokens=NEW, n=4, **WAYS[1])
            engine.run()
            assert engine.stats().programs == made
            for branch, request in enumerate(requests):
                assert_alone(request, sample(3, 1, 2, branch))
            engine.replace_weights(weights, "old")


@pytest.mark.parametrize("speculative, prefix", [(0, True), (2, False)])
def test_programs_cut_off_anywhere_cost_no_token(model, speculative, prefix):
    """Calls end badly before their program, after it with the store lost, or at their end."""
    engine, asked = make(model, speculative, prefix_cache=prefix), []
    draw, stages, ends = random.Random(0), itertools.cycle(("before", "inside", "after")), []

    def cut_off(real):
        def program(*args, **options):
            stage = next(stages) if draw.random() < 0.12 else None
            if stage == "before":
                raise KeyboardInterrupt
            given = real(*args, **options)
            if stage == "inside":
                raise KeyboardInterrupt
            ends.append(stage)
            return given

        return program

    def method(real):
        def call(*args):
            given = real(*args)
            if ends.pop() == "after":
                raise KeyboardInterrupt
            return given

        return call

    with pytest.MonkeyPatch.context() as patch:
        names = {"prefill": "prefill", "decode": "decode"}
        names |= {"save": "save_snapshot", "load": "load_snapshot"}
        for name, program in names.items():
            patch.setattr(runner.programs, program, cut_off(getattr(runner.programs, program)))
            patch.setattr(engine._runner, name, method(getattr(engine._runner, name)))
        sampled = 4 if speculative else 1
        for n, way, count in 2 * ((0, 0, 3), (3, 1, sampled), (4, 2, 1), (1, 0, 2)):
            found = submit(engine, PROMPTS[n], max_new_tokens=NEW, n=count, **WAYS[way])
            asked += [(n, way, request) for request in (found if count > 1 else [found])]
        interrupts = 0
        while not all(request.done for *_, request in asked):
            try:
                engine.run()
            except KeyboardInterrupt:
                interrupts += 1
            assert interrupts < 100
    assert interrupts > 3
    for n, way, request in asked:
        assert_alone(request, sample(n, way, speculative, request.branch))
    assert engine.stats().new_tokens == NEW * len(asked)
    assert_empty(engine)


def serve(engine: Engine, count: int, seed: int, groups: tuple[int, ...] = (0, 1, 2)) -> None:
    """So many random requests, in groups of the given ways; each ends, and is what `generate`
    gives."""
    draw, living, submitted, steps = random.Random(seed), [], 0, 0
    while submitted < count or living:
        if submitted < count and draw.random() < 0.4 and len(living) < 60:
            n, way = draw.randrange(len(PROMPTS)), draw.randrange(len(WAYS))
            new = draw.randint(1, min(NEW, engine.config.max_length - len(PROMPTS[n])))
            options = {
                "n": draw.randint(1, 4 if way in groups else 1),
                "prompt_logprobs": draw.random() < 0.1,
            }
            found = submit(engine, PROMPTS[n], max_new_tokens=new, **options, **WAYS[way])
            found = found if options["n"] > 1 else [found]
            living += [(n, way, new, request) for request in found]
            submitted += len(found)
        else:
            engine.step()
            steps += 1
            assert steps < 40 * count, "it stands still"
        for n, way, new, request in [one for one in living if one[-1].done]:
            assert len(request.tokens) == new
            assert_alone(request, sample(n, way, engine.config.speculative, request.branch))
        living = [one for one in living if not one[-1].done]
    assert_empty(engine)


# Pages for one of the longest requests, with few snapshots; and for two, of another size.
TIGHT = [
    (0, {"slots": 4, "pages": 5, "snapshots": 4}),
    (2, {"slots": 4, "pages": 11, "snapshots": 4, "prefix_cache": True}),
]


@pytest.mark.parametrize("speculative, sizes", TIGHT, ids=str)
def test_groups_with_too_few_pages_are_served_as_if_alone(model, speculative, sizes):
    groups = (0, 1, 2) if speculative else (0,)  # other references would be compiled for this alone
    serve(make(model, speculative, **sizes), 40, seed=1, groups=groups)


@pytest.mark.slow
@pytest.mark.parametrize("speculative, sizes", TIGHT, ids=str)
def test_a_thousand_requests_with_too_few_pages_are_served(model, speculative, sizes):
    serve(make(model, speculative, **sizes), 1000, seed=2)
