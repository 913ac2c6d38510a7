"""lm-eval's own Hugging Face backend and our adapter say the same of an exported checkpoint."""

import dataclasses

import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.data.tokenizer import train_tokenizer
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.evaluation.lm_eval.suite import LOCAL, LOCAL_FOLDER, MORE, LmEvalOptions
from nemotron_jax.evaluation.lm_eval.suite import task_manager as index_of
from nemotron_jax.evaluation.own_model import OwnModel
from nemotron_jax.model.parameters import abstract_model
from tests.tiny_models import randomised, tiny_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from nemotron_jax.evaluation.lm_eval.adapter import Harness  # noqa: E402
from tests.hf.theirs import load_theirs  # noqa: E402

pytestmark = pytest.mark.hf
VOCABULARY, LIMIT = 512, 6
LENGTH = 160  # tokens: the longest texts of local_prose take several windows


@pytest.fixture(scope="module")
def tokenizer():
    texts = [path.read_text("utf-8") for path in sorted(LOCAL_FOLDER.glob("*.jsonl"))]
    return train_tokenizer(texts, VOCABULARY)


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(tiny_config("ME*-M"), vocab_size=VOCABULARY)
    return randomised(abstract_model(config), seed=3)


def evaluated(model, cache=None):
    """Results and the answers to every request, by task and row; `cache` is lm-eval's own."""
    found = simple_evaluate(
        model=model,
        tasks=list(LOCAL),
        limit=LIMIT,
        use_cache=cache,
        bootstrap_iters=0,
        task_manager=index_of(LmEvalOptions()),
    )
    rows = {
        (name, sample["doc_id"]): sample["resps"]
        for name, samples in found["samples"].items()
        for sample in samples
    }
    return found["results"], rows


@pytest.fixture(scope="module")
def theirs(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    nj.save_pretrained(model, folder, dtype="float32")
    tokenizer.save(folder)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    their_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), **names
    )
    network = load_theirs(folder)
    backend = HFLM(
        pretrained=network, tokenizer=their_tokenizer, max_length=LENGTH, batch_size=1, device="cpu"
    )
    return evaluated(backend)


def our_harness(model, tokenizer):
    config = EngineConfig(
        slots=4, max_length=LENGTH + MORE, page_tokens=16, prefix_cache=True, snapshots=16
    )
    engine = Engine(model, config, tokenizer=tokenizer)
    answers = OwnModel(model, engine, tokenizer, longest=LENGTH + MORE)
    return Harness(answers.ask, tokenizer, max_length=LENGTH)


def assert_the_same(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) == len(LOCAL) * LIMIT
    for place, own in ours.items():
        if place[0] == "local_sums":
            assert own == theirs[place]
            continue
        flatten = lambda answers: np.array([np.ravel(a)[0] for of in answers for a in of], float)
        # Theirs is summed in float32, which holds a sum of thousands to a part of 2 ** 23.
        close = {"atol": 1e-4, "rtol": 2.0**-23}
        np.testing.assert_allclose(flatten(own), flatten(theirs[place]), **close)
        if place[0] != "local_prose":
            greedy = lambda answers: [bool(answer[1]) for of in answers for answer in of]
            assert greedy(own) == greedy(theirs[place])


def test_both_give_the_same_answers_batched_and_cached(model, tokenizer, theirs, tmp_path):
    cache = str(tmp_path / "answers")
    results, rows = evaluated(our_harness(model, tokenizer), cache)
    assert_the_same(rows, theirs[1])
    for name in LOCAL:
        for measure, value in theirs[0][name].items():
            if isinstance(value, float) and "stderr" not in measure:
                assert results[name][measure] == pytest.approx(value, rel=1e-4, abs=1e-4)
    silent = Harness(lambda asks: pytest.fail("asked again"), tokenizer, max_length=LENGTH)
    _, again = evaluated(silent, cache)
    assert_the_same(again, theirs[1])


def test_another_model_is_told_apart(model, tokenizer, theirs):
    other = randomised(model, seed=4)
    _, rows = evaluated(our_harness(other, tokenizer))
    with pytest.raises(AssertionError):
        assert_the_same(rows, theirs[1])
