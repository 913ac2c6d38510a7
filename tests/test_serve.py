"""The server's command: wrong flags are one line, and a real checkpoint answers as `generate`."""

import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import sys

import httpx
import pytest

import nemotron_jax as nj
from nemotron_jax import serve
from nemotron_jax.data.chat.tokens import encode_prompt
from nemotron_jax.data.tokenizer import train_tokenizer
from nemotron_jax.model.parameters import abstract_model
from tests.tiny_models import randomised, tiny_config

ROOT = pathlib.Path(__file__).parents[1]
HELLO = [{"role": "user", "content": "hello"}]
TOKENIZER = train_tokenizer(["user assistant system hello there, four and two\n"], 300)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    TOKENIZER.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "flags",
    [
        ["--port=x"],
        ["--port=70000"],
        ["--nothing"],
        ["--slots=0"],
        ["--max_length=0"],
        ["--max_waiting=0"],
        ["--pages=0"],
        ["--dtype=int8"],
        ["--experts=int4"],
        ["--speculative=-1"],
        ["--speculative=some"],
        ["--max_body=many"],
        ["--max_body=0"],
        ["--mesh=data"],
        ["--mesh=rows=2"],
        ["--mesh=data=1,data=2"],
        ["--mesh=data=0"],
        ["--api_key_file=nowhere"],
        ["--api_key_file=/dev/null"],
        ["--host=no.such.host.invalid"],
        ["--checkpoint=gs://bucket/run"],
        ["--checkpoint=nowhere"],
    ],
    ids=str,
)
def test_a_wrong_flag_is_one_line(
    folder: pathlib.Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = serve.main([f"--checkpoint={folder}", *flags])
    except SystemExit as end:
        status = end.code
    shown = capsys.readouterr()
    assert status == 2 and shown.out == ""
    assert shown.err.startswith("serve: ") and shown.err.count("\n") == 1


def test_keys_are_the_lines_of_a_file(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\none\n\n two \n")
    assert serve._keys(str(file)) == ("one", "two")


def test_sampling_is_what_the_checkpoint_recommends(tmp_path: pathlib.Path) -> None:
    assert serve._sampling(tmp_path) == {}
    told = {"temperature": 0.6, "top_p": 0.95, "top_k": 5, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    assert serve._sampling(tmp_path) == {"temperature": 0.6, "top_p": 0.95}
    (tmp_path / "generation_config.json").write_text('{"temperature": true, "top_p": -1}')
    assert serve._sampling(tmp_path) == {}


def test_the_cache_is_as_the_checkpoint_was_made_for(tmp_path: pathlib.Path) -> None:
    assert serve._cache(tmp_path, "bfloat16").kv == "auto"
    told = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(told))
    assert serve._cache(tmp_path, "bfloat16").kv == "float8_e4m3fn"
    assert serve._cache(tmp_path, "float32").kv == "auto"
    for odd in ('{"quantization": 3}', "{}"):
        (tmp_path / "hf_quant_config.json").write_text(odd)
        assert serve._cache(tmp_path, "bfloat16").kv == "auto"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--mesh=fsdp=2"], ["--experts=nvfp4"]], ids=str)
def test_a_checkpoint_is_served_as_it_generates(folder: pathlib.Path, flags: list[str]) -> None:
    config = tiny_config("M*E", "*E")
    moe = dataclasses.replace(config.moe, expert_width=32, latent_width=16)  # whole blocks of codes
    config = dataclasses.replace(config, vocab_size=TOKENIZER.vocab_size, moe=moe)
    model = randomised(abstract_model(config), 0)
    nj.save_pretrained(model, folder, dtype="float32")
    command = [sys.executable, "-m", "nemotron_jax.serve", f"--checkpoint={folder}", "--port=0"]
    command += ["--dtype=float32", "--slots=4", "--max_length=128", "--served_name=tiny", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = re.fullmatch(r"serving tiny on (http://\S+)\n", process.stdout.readline())[1]
            asked = {"messages": HELLO, "temperature": 0, "max_tokens": 24}
            asked |= {"return_token_ids": True}
            with httpx.Client(base_url=address, timeout=60) as client:
                found = client.post("/v1/chat/completions", json=asked).json()
                again = client.post("/v1/chat/completions", json=asked).json()
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    prompt = encode_prompt(TOKENIZER, HELLO)
    stops = (TOKENIZER.token_id("<|im_end|>"), TOKENIZER.eos)
    model = nj.load_pretrained(folder)
    if "--experts=nvfp4" in flags:
        model = nj.for_decoding(model, "float32", experts="nvfp4")
    own = nj.generate(model, [prompt], 24, stop_tokens=stops)
    assert found["choices"][0]["token_ids"] == own.tokens[0, : own.lengths[0]].tolist()
    assert again["choices"][0]["token_ids"] == found["choices"][0]["token_ids"]
    details = again["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == len(prompt) and found["usage"]["total_tokens"] > len(prompt)
