"""A model that devices share is decoded to one device's tokens and log-probabilities."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.answer import Turn
from nemotron_jax.config.convert import to_json
from nemotron_jax.config.run import (
    DataConfig,
    MeshConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)
from nemotron_jax.data.tokenizer import train_tokenizer
from nemotron_jax.decoding.generate import Generated
from nemotron_jax.model.parameters import abstract_model
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.sharding import make_mesh
from nemotron_jax.training.checkpoint import Checkpoints
from nemotron_jax.training.prepared import place_state, prepare_run
from tests.decoding.engines import assert_empty, make, quick_programs, submit  # noqa: F401
from tests.golden_cases import GOLDEN, tokens
from tests.tiny_models import randomised, tiny_config

CASE = "hybrid_moe_latent"  # Mamba, attention of 4 and 2 heads, MoE in a latent, shared expert, MTP
MESHES = {
    "tensor": MeshConfig(tensor=2),
    "experts": MeshConfig(expert=4),
    "crossed": MeshConfig(tensor=2, expert=2, data=2),
    "tensor beyond key heads": MeshConfig(tensor=4),
}
WAYS = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 3}}
TOKENIZER = train_tokenizer(["user assistant system hello there, four and two\n"], 304)
LIMIT = 1e-5  # of log-probabilities: float32 sums made in another order
NEW = 10


@functools.cache
def loaded(name: str) -> nj.Nemotron:
    return nj.load_pretrained(GOLDEN / CASE / "checkpoint", mesh=MESHES.get(name))


@functools.cache
def prompts() -> list[list[int]]:
    rows = np.asarray(tokens(CASE))
    return [rows[n % len(rows)][: 3 + 2 * n].tolist() for n in range(4)]


@functools.cache
def generated(name: str, speculative: int) -> dict[str, Generated]:
    """Four prompts, greedy and sampled."""
    run = functools.partial(nj.generate, loaded(name), prompts(), NEW, speculative=speculative)
    return {way: run(**options) for way, options in WAYS.items()}


def test_a_small_model_on_a_mesh_gives_one_devices_tokens():
    """More devices than key heads, a vocabulary that they share, experts on all of them."""
    config = dataclasses.replace(tiny_config("*E"), vocab_size=56)
    model = randomised(abstract_model(config), 0)
    run = functools.partial(nj.generate, model, [[3, 4, 5]], 6)
    expected = run()
    with jax.set_mesh(make_mesh(MeshConfig(tensor=4), jax.devices())):
        found = run()
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=LIMIT)


@pytest.mark.more
@pytest.mark.parametrize(("name", "speculative"), [("tensor", 0), *((n, 2) for n in MESHES)])
def test_generate_on_a_mesh_gives_one_devices_tokens(name, speculative):
    for way, found in generated(name, speculative).items():
        expected = generated("one device", speculative)[way]
        np.testing.assert_array_equal(found.tokens, expected.tokens, way)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=LIMIT, err_msg=way)


@pytest.mark.more
@pytest.mark.parametrize("name", MESHES)
def test_an_engine_on_a_mesh_gives_one_devices_tokens_and_compiles_nothing_more(name):
    """Drafts, a prefix cache and pages; the mesh is the model's own, and none is set."""
    engine = make(loaded(name), 2, prefix_cache=True)
    made = engine.stats().programs
    asked = [(way, n) for way in WAYS for n in range(4)]
    for _ in range(2):
        wanted = [submit(engine, prompts()[n], max_new_tokens=NEW, **WAYS[way]) for way, n in asked]
        engine.run()
        assert engine.stats().programs == made
        for (way, n), request in zip(asked, wanted, strict=True):
            # Rows of `generate` draw by their number, and a request by its branch, which is 0.
            if way == "greedy" or n == 0:
                expected = generated("one device", 2)[way]
                assert request.tokens == expected.tokens[n].tolist(), (way, n)
                np.testing.assert_allclose(request.logprobs, expected.logprobs[n], atol=LIMIT)
    for _ in range(2):  # the second time from the prefix cache: the prompt fills a page
        submit(engine, prompts()[3], max_new_tokens=2).wait()
    assert engine.stats().prefix_hits
    engine.replace_weights(loaded("one device"), "next")
    found = submit(engine, prompts()[1], max_new_tokens=NEW).wait()
    assert found.tokens == generated("one device", 2)["greedy"].tokens[1].tolist()
    assert engine.stats().programs == made
    assert_empty(engine)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory) -> Path:
    """A run at its first step, of a model with every kind of block, a dense MLP among them, and a
    tokenizer."""
    model = tiny_config("M-*E", mtp="*E")
    experts = dataclasses.replace(model.moe, num_experts=8)
    config = RunConfig(
        model=dataclasses.replace(model, vocab_size=304, moe=experts),
        training=TrainingConfig(steps=1, schedule=ScheduleConfig(1e-3, 1e-3, 0, 0, 1000)),
        data=DataConfig(sequence_length=16, batch_size=1),
    )
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    state = place_state(prepare_run(config), randomised(abstract_model(config.model), 0))
    run.config.write_text(to_json(config))
    TOKENIZER.save(run.path)
    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(state, {}, {"config.json": to_json(config)})
        checkpoints.wait()
    return run.path


@pytest.fixture(scope="module")
def restored_alone(run_directory) -> tuple[Generated, Turn]:
    """What one device gives of the run's model."""
    model = nj.load_pretrained(run_directory)
    return nj.generate(model, prompts(), NEW, speculative=2), turn(model)


def turn(model: nj.Nemotron) -> Turn:
    return nj.chat(model, "hello", max_new_tokens=NEW, speculative=2)


@pytest.mark.more
@pytest.mark.parametrize("name", ["one device", "tensor", "experts", "crossed"])
def test_a_run_restored_onto_a_mesh_decodes_as_on_one_device(name, run_directory, restored_alone):
    """`generate`, `chat` and the engine, which compiles nothing once it is made."""
    expected, said = restored_alone
    model = nj.load_pretrained(run_directory, mesh=MESHES.get(name))
    found = nj.generate(model, prompts(), NEW, speculative=2)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=LIMIT)
    assert turn(model) == said
    engine = make(model, 2, prefix_cache=True)
    made = engine.stats().programs
    for _ in range(2):
        wanted = [submit(engine, prompt, max_new_tokens=NEW) for prompt in prompts()]
        engine.run()
        for row, request in enumerate(wanted):
            assert request.tokens == expected.tokens[row].tolist()
            np.testing.assert_allclose(request.logprobs, expected.logprobs[row], atol=LIMIT)
    again = nj.load_pretrained(run_directory, mesh=MESHES.get(name))
    engine.replace_weights(again, "next")
    found = submit(engine, prompts()[1], max_new_tokens=NEW).wait()
    assert found.tokens == expected.tokens[1].tolist()
    assert engine.stats().programs == made
    assert_empty(engine)
