"""transformers' models as the tests of this folder run them."""

import math

import numpy as np
import torch
from transformers import NemotronHForCausalLM

NEW = 12  # tokens of a greedy continuation


def load_theirs(directory):
    """Their model with their plainest kernels, its time steps as free in prefill as in decode.

    Their prefill clamps steps from below at time_step_min; their own decode does not, nor do the
    family's other implementations.
    """
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    network = NemotronHForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    mixers = [module for module in network.modules() if hasattr(module, "time_step_limit")]
    assert len(mixers) == network.config.layers_block_type.count("linear_attention")
    for mixer in mixers:
        mixer.time_step_limit = (0.0, math.inf)
    return network.eval()


def their_logits(network, tokens):
    with torch.no_grad():
        return network(torch.tensor(tokens), use_cache=False).logits.numpy()


def our_logits(network, tokens):
    return np.asarray(network.logits(network(tokens).hidden))


def their_greedy(network, prompts):
    with torch.no_grad():
        found = network.generate(
            torch.tensor(prompts), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
    return found[:, prompts.shape[1] :].numpy()


def some_tokens(vocabulary, *shape):
    return np.random.default_rng(0).integers(3, vocabulary, shape)
