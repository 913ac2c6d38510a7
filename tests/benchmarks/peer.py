"""One case in Hugging Face transformers' NemotronH: float32, sdpa, grouped_mm experts.

    python -m tests.benchmarks.peer JSON      (JSON: case, config, threads)

Needs torch and transformers and nothing of this project's dependencies. Prints one line of JSON.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from tests.benchmarks import measure
from tests.benchmarks.cases import Case, case_from_json


def main() -> None:
    """Measure the case of the command line."""
    job = json.loads(sys.argv[1])
    measure.use_threads(job["threads"])
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print(json.dumps(run_case(case_from_json(job["case"]), job["config"], job["threads"])))


def run_case(case: Case, config_file: str, threads: int) -> dict[str, Any]:
    """Times, memory and versions of one case."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with open(config_file, encoding="utf-8") as file:
        fields = json.load(file)
    fields.pop("torch_dtype", None)
    config = transformers.NemotronHConfig(
        **fields, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    model = transformers.NemotronHForCausalLM(config)
    tokens = torch.randint(3, config.vocab_size, (case.batch, case.length))
    idle = measure.resident_mb()
    result: dict[str, Any] = {}
    run = {"train": _train, "prefill": _prefill, "decode": _decode}[case.kind](
        model, tokens, case, result
    )
    return {
        **measure.repeat(case, run),
        **result,
        "idle_mb": idle,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _train(
    model: Any, tokens: Any, case: Case, result: dict[str, Any]
) -> Callable[[], measure.Duration]:
    import torch

    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )

    def step() -> None:
        logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        result["loss"] = loss.item()

    return lambda: measure.timed(step)


def _prefill(
    model: Any, tokens: Any, case: Case, result: dict[str, Any]
) -> Callable[[], measure.Duration]:
    import torch

    model.eval()

    @torch.inference_mode()
    def prompt() -> None:
        output = model(tokens, use_cache=True, logits_to_keep=1)
        output.logits[0, 0, 0].item()
        result["state_bytes"] = _bytes(output.past_key_values)

    return lambda: measure.timed(prompt)


def _decode(
    model: Any, tokens: Any, case: Case, result: dict[str, Any]
) -> Callable[[], measure.Duration]:
    import torch

    model.eval()

    @torch.inference_mode()
    def run() -> measure.Duration:
        output = model(tokens, use_cache=True, logits_to_keep=1)

        def emit() -> None:
            nonlocal output
            for _ in range(case.new_tokens):
                token = output.logits[:, -1].argmax(-1, keepdim=True)
                cache = output.past_key_values
                output = model(token, past_key_values=cache, use_cache=True)
            output.logits[0, 0, 0].item()

        duration = measure.timed(emit)
        result["state_bytes"] = _bytes(output.past_key_values)
        return duration

    return run


def _bytes(cache: Any) -> int:
    """Bytes of every tensor that a transformers cache holds, found by walking its attributes."""
    import torch

    found: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for part in value.values():
                walk(part)
        elif isinstance(value, list | tuple):
            for part in value:
                walk(part)
        elif type(value).__module__.startswith("transformers.cache_utils"):
            walk(vars(value))

    walk(cache)
    return sum(found.values())


if __name__ == "__main__":
    main()
