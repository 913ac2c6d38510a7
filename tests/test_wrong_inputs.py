"""A wrong value, file or directory is one line and status 2, before anything is compiled."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

import nemotron_jax as nj
from nemotron_jax import command_line, terminal
from nemotron_jax.config.convert import from_json
from nemotron_jax.config.precision import PrecisionConfig, nemotron3_nvfp4
from tests.front_doors import SHOW
from tests.golden_cases import GOLDEN
from tests.training.runs import write_texts

ROOT = pathlib.Path(__file__).parents[1]
HUB = GOLDEN / "hybrid_moe_latent" / "checkpoint"

PLACE = ("--coordinator=localhost:8476",)
# Each: flags beside --config and --workdir, and words of the sentence. {d} is the folder of wrong
# files and directories that `wrong_files` makes.
TRAIN = [
    (["--workdir="], "--workdir=: is empty"),
    (["--workdir={d}/file"], "is a file"),
    (["--workdir={d}/file/below"], "is a file"),
    (["--workdir={d}/dead_link"], "is a dead link"),
    (["--workdir=gs://bucket/run"], "--workdir=gs://bucket/run: is a URL"),
    (["--config.init_from=s3://bucket/run"], "RunConfig.init_from='s3://bucket/run': is a URL"),
    (["--config.data.sources=('hf:gs://b/x',)"], "DataConfig.sources='gs://b/x': is a URL"),
    (["--config.data.tokenizer=https://host/t"], "DataConfig.tokenizer='https://host/t': is a"),
    (["--workdir=/proc/1/below"], "--workdir=/proc/1/below: cannot be written"),
    (["--config={d}/absent.py"], "absent.py"),
    (["--config={d}"], "--config="),
    (["--config={d}/syntax.py"], "syntax.py: SyntaxError"),
    (["--config={d}/empty.py"], "empty.py"),
    (["--config={d}/raises.py"], "raises.py: ZeroDivisionError"),
    (["--config={d}/imports.py"], "imports.py"),
    (["--config={d}/attribute.py"], "attribute.py"),
    (["--config={d}/number.py"], "number.py"),
    (["--config={d}/none.py"], "its get_config() gave None, no ConfigDict"),
    (["--config={d}/arguments.py"], "arguments.py: TypeError: get_config() missing 2"),
    (["--config={d}/data.json"], "data.json"),
    (["--config="], "config"),
    (["--config.seed=-1"], "RunConfig.seed=-1"),
    (["--config.seed=100000000000000000000"], "seed=100000000000000000000"),
    (["--config.seed=abc"], "seed"),
    (["--config.seed=1.5"], "seed"),
    (["--config.nonsense=1"], "nonsense"),
    (["--config.model.nonsense=1"], "nonsense"),
    (["--nonsense=1"], "nonsense"),
    (["stray"], "stray"),
    (["--process_count=2"], "go together; --coordinator and --process_index are missing"),
    ([*PLACE, "--process_count=2", "--process_index=2"], "--process_index=2: must lie in 0..1"),
    ([*PLACE, "--process_count=0", "--process_index=0"], "--process_count=0: must be at least 1"),
    ([*PLACE, "--process_count=x", "--process_index=0"], "--process_count=x"),
    (
        ["--coordinator=host", "--process_count=2", "--process_index=0"],
        "--coordinator=host: must be HOST:PORT",
    ),
    (["--distributed=always"], "--distributed=always"),
    (["--distributed=auto", "--process_index=0"], "leave out --coordinator, --process_count"),
    (["--distributed=auto"], "--distributed=auto: JAX finds no cluster around this process"),
    (["--config.model.vocab_size=0"], "vocab_size=0"),
    (["--config.model.vocab_size=100"], "vocab_size=100"),
    (["--config.model.width=0"], "width=0"),
    (["--config.model.width=wide"], "width"),
    (["--config.model.pattern=MEX"], "pattern='MEX'"),
    (["--config.model.pattern="], "pattern=''"),
    (["--config.model.pattern=-"], "mlp"),
    (["--config.model.init_std=0"], "init_std=0"),
    (["--config.model.init_std=-0.1"], "init_std=-0.1"),
    (["--config.model.init_std=nan"], "init_std=nan"),
    (["--config.model.norm_epsilon=-1e-5"], "norm_epsilon=-1e-05"),
    (["--config.model.eos_token=512"], "eos_token=512"),
    (["--config.model.bos_token=9999"], "bos_token=9999"),
    (["--config.model.pad_token=-1"], "pad_token=-1"),
    (["--config.model.eos_token=7"], "ends a document with id 2"),
    (["--config.model.mtp=None"], "training.mtp_depths=2: needs a model with mtp"),
    (["--config.model.moe=None"], "moe must be configured"),
    (["--config.model.mamba.num_groups=3"], "num_groups=3"),
    (["--config.model.moe.experts_per_token=5"], "experts_per_token=5"),
    (["--config.lora.rank=0"], "LoRAConfig.rank=0"),
    (["--config.lora.rank=4", "--config.lora.targets=('mlp',)"], "must name a matrix of the model"),
    (["--config.lora.rank=four"], "--config.lora.rank=four: must be of type int"),
    (["--config.lora.ranks=4"], "config.lora.ranks; its fields are alpha, base_dtype"),
    (["--config.training.steps=0"], "steps=0"),
    (["--config.training.steps=-5"], "steps=-5: must be at least 1"),
    (["--config.training.steps=2.5"], "steps"),
    (["--config.training.steps=2147483648"], "steps=2147483648: must be below"),
    (["--config.training.mtp_depths=65"], "reaches past a whole row"),
    (["--config.training.micro_batches=3"], "batch_size=4"),
    (["--config.training.loss_chunk=0"], "loss_chunk=0"),
    (["--config.training.trains=nothing"], "trains='nothing'"),
    (["--config.training.trains=lora"], "lora=None"),
    (["--config.training.mtp_depths=-1"], "mtp_depths=-1"),
    (["--config.training.schedule.peak_learning_rate=inf"], "peak_learning_rate=inf"),
    (["--config.training.schedule.peak_learning_rate=nan"], "peak_learning_rate=nan"),
    (["--config.training.schedule.peak_learning_rate=-1"], "peak_learning_rate=-1"),
    (["--config.training.schedule.final_learning_rate=1"], "final_learning_rate=1"),
    (["--config.training.schedule.warmup_tokens=99999999"], "total_tokens"),
    (["--config.training.optimizer.beta1=1"], "beta1=1"),
    (["--config.training.optimizer.clip_norm=0"], "clip_norm=0"),
    (["--config.training.optimizer.weight_decay=nan"], "weight_decay=nan"),
    (["--config.data.batch_size=0"], "batch_size=0"),
    (["--config.data.batch_size=1000000000"], "batch_size=1000000000: a step"),
    (["--config.data.sequence_length=1000000000"], "sequence_length"),
    (["--config.model.width=1000000"], "its weights, moments and gradient take"),
    (["--config.data.sources=('nowhere',)"], "'nowhere' is unknown"),
    (["--config.data.sources=('hf:',)"], "'hf:' names no file or folder"),
    (["--config.data.sources=('hf:{d}/absent',)"], "there is no file or folder"),
    (["--config.data.sources=('shards:',)"], "'shards:' names no directory"),
    (["--config.data.sources=('shards:{d}/absent',)"], "absent/index.json is missing"),
    (["--config.data.sources=('shards:gs://b/x',)"], "DataConfig.sources='gs://b/x': is a URL"),
    (["--config.data.sources=('hf:{d}/no_text',)"], "a.json is of a kind that is not read"),
    (["--config.data.sources=('hf:{d}/other.csv',)"], "other.csv has none of the endings"),
    (
        ["--config.data.sources=('hf:{d}/fields.jsonl',)"],
        "has no field 'text'; its fields are 'body'",
    ),
    (["--config.data.sources=('hf:{d}/null.jsonl',)"], "row 1 has NoneType in field 'text'"),
    (["--config.data.sources=('hf:{d}/deep.jsonl',)"], "row 1 is not JSON"),
    (["--config.data.sources=('hf:{d}/digits.jsonl',)"], "row 1 is not JSON"),
    (["--config.data.sources=('hf:{d}/latin.txt',)"], "is not UTF-8"),
    (["--config.data.sources=()"], "sources"),
    (["--config.data.sources=7"], "sources"),
    (["--config.data.source_weights=(0.0,)"], "source_weights=(0.0,)"),
    (["--config.data.source_weights=(1.0,2.0)"], "source_weights"),
    (["--config.data.held_out_fraction=0"], "held_out_fraction=0"),
    (["--config.data.held_out_fraction=1"], "held_out_fraction=1"),
    (["--config.data.tokenizer={d}/absent"], "does not exist"),
    (["--config.data.tokenizer={d}/data.json"], "cannot be used"),
    (["--config.execution.kernels=pallas_gpu"], "attention=pallas_gpu needs a GPU"),
    (["--config.execution.kernels=pallas_tpu"], "attention=pallas_tpu needs a TPU"),
    (["--config.execution.kernels=ssd_scan=pallas_tpu"], "ssd_scan=pallas_tpu needs a TPU"),
    (["--config.execution.kernels=grouped_matmul=cpu"], "implementation='cpu' does not exist"),
    (["--config.execution.kernels=cuda"], "kernels='cuda'"),
    (["--config.execution.precision=fp4"], "Execution.precision='fp4': must be one of high, nvfp4"),
    (["--config.execution.precision.nvfp4_roles=('x',)"], "is not a weight matmul"),
    (["--config.execution.compute_dtype=fp8"], "compute_dtype='fp8'"),
    (["--config.execution.remat=some"], "remat='some'"),
    (["--config.mesh.data=0"], "data=0"),
    (["--config.mesh.data=64"], "batch_size=4"),
    (["--config.mesh.tensor=2"], "tensor=2"),
    (["--config.logging.evaluate_every=0"], "evaluate_every=0"),
    (["--config.logging.keep_checkpoints=0"], "keep_checkpoints=0"),
    (["--config.logging.merge_window=9"], "merge_window=9"),
    (["--config.stage=rl"], "stage='rl'"),
    (["--config.stage=sft"], "data.sources"),
    (["--config.init_from={d}/absent"], "absent': is not a directory"),
    (["--config.init_from={d}/no_text"], "holds no tokenizer.json"),
    (["--workdir={d}/checkpoints_is_a_file"], "checkpoints is a file and must be a folder"),
    (["--workdir={d}/metrics_is_a_folder"], "metrics.jsonl is a folder and must be a file"),
    (["--workdir={d}/manifest_of_nothing"], "corpus/manifest.json cannot be read"),
    (["--workdir={d}/manifest_without_keys"], "corpus/manifest.json cannot be read"),
    (["--workdir={d}/manifest_is_a_list"], "corpus/manifest.json cannot be read"),
    (["--workdir={d}/tokenizer_damaged"], "tokenizer.json cannot be used"),
]
EVAL = [
    (["--checkpoint="], "--checkpoint=: is empty"),
    (["--checkpoint=gs:/bucket/run"], "--checkpoint=gs:/bucket/run: is a URL"),
    (["--output=gs://bucket/report"], "--output=gs://bucket/report: is a URL"),
    (["--checkpoint={d}/absent"], "holds no config.json"),
    (["--checkpoint={d}/file"], "holds no config.json"),
    (["--checkpoint={d}/no_text"], "holds no config.json"),
    (["--checkpoint={d}/config_broken"], "config.json cannot be read"),
    (["--checkpoint={d}/config_null"], "config.json cannot be read"),
    (["--checkpoint={d}/config_list"], "config.json"),
    (["--checkpoint={d}/config_of_the_future"], "format_version=99"),
    (["--checkpoint={d}/config_of_nothing"], "RunConfig"),
    (["--checkpoint={d}/quantised"], "is quantised (NVFP4), and its files store no matrix"),
    (["--checkpoint={d}/cut"], "not a whole safetensors file"),
    (["--checkpoint={d}/no_weights"], "files are missing: model.safetensors"),
    (["--checkpoint={d}/dtype"], "dtype='int4'"),
    (["--checkpoint={d}/llama"], "model_type='llama'"),
    (["--suites="], "names none"),
    (["--suites=sped"], "the nearest is 'speed'"),
    (["--suites=speed,speed"], "named twice"),
    (["--suites=perplexity"], "pass --config"),
    (["--output="], "--output=: is empty"),
    (["--output={d}/file"], "is a file"),
    (["--output={d}/dead_link"], "is a dead link"),
    (["--output={d}/file/below"], "is a file"),
    (["--dtype=flot32"], "dtype='flot32': must be one of float32, bfloat16, float16"),
    (["--dtype=fp8"], "dtype='fp8'"),
    (["--dtype="], "dtype=''"),
    (["--seed=-1"], "seed=-1"),
    (["--seed=100000000000000000000"], "seed=100000000000000000000"),
    (["--seed=abc"], "seed"),
    (["--mtp=no"], "mtp"),
    (["--config={d}/syntax.py"], "syntax.py: SyntaxError"),
]


# Flags that config_flags alone does not understand.
SHOWN = [
    ["--config.execution.precision=nvfp4"],
    ["--config.precision=nvfp4", "--config.execution.precision.switch_step=100"],
    ["--config.execution.precision=high"],
    ["--config.model.mtp=None", "--config.training.mtp_depths=0"],
    ["--config.training.steps=3"],
    ["--config.training.schedule.total_tokens=9999", "--config.training.steps=3"],
]


def hub_with(folder: pathlib.Path, **values: object) -> pathlib.Path:
    shutil.copytree(HUB, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory) -> pathlib.Path:
    """Everything that a user should not have given."""
    d = tmp_path_factory.mktemp("wrong")
    texts = {
        "file": "",
        "syntax.py": "def get_config(:\n",
        "empty.py": "",
        "raises.py": "def get_config():\n    return 1 / 0\n",
        "imports.py": "import no_such_module_anywhere\n",
        "attribute.py": "import json\ndef get_config():\n    return json.nothing\n",
        "number.py": "def get_config():\n    return 7\n",
        "none.py": "def get_config():\n    pass\n",
        "arguments.py": "def get_config(a, b):\n    return a\n",
        "data.json": "{}",
        "other.csv": "a,b",
        "no_text/a.json": "{}",
        "fields.jsonl": '{"body": "words", "id": 3}\n',
        "null.jsonl": '{"text": null}\n',
        "deep.jsonl": "[" * 100_000 + "\n",
        "digits.jsonl": '{"text": ' + "9" * 5000 + "}\n",
        "checkpoints_is_a_file/checkpoints": "",
        "metrics_is_a_folder/metrics.jsonl/x": "",
        "manifest_of_nothing/corpus/manifest.json": "",
        "manifest_without_keys/corpus/manifest.json": '{"format_version": 1, "manifest": {}}',
        "manifest_is_a_list/corpus/manifest.json": "[]",
        "tokenizer_damaged/tokenizer.json": "{",
        "config_broken/config.json": "{",
        "config_null/config.json": "null",
        "config_list/config.json": "[1]",
        "config_of_the_future/config.json": '{"format_version": 99}',
        "config_of_nothing/config.json": '{"format_version": 1, "execution": 7}',
        "llama/config.json": '{"model_type": "llama"}',
    }
    for name, text in texts.items():
        (d / name).parent.mkdir(parents=True, exist_ok=True)
        (d / name).write_text(text)
    (d / "latin.txt").write_bytes(b"caf\xe9\n")
    (d / "dead_link").symlink_to(d / "nowhere")
    hub_with(d / "quantised", quantization_config={"quant_algo": "NVFP4"})
    hub_with(d / "dtype", dtype="int4")
    (hub_with(d / "no_weights") / "model.safetensors").unlink()
    whole = (hub_with(d / "cut") / "model.safetensors").read_bytes()
    (d / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    write_texts(d / "texts", 8)
    config = ROOT / "tests" / "door_config.py"
    (d / "config.py").write_text(config.read_text().replace("TEXTS", str(d / "texts")))
    return d


def outcomes(module: str, usual: list[str], cases: list, d: pathlib.Path) -> list[dict]:
    """What each case does, its own flags in place of the usual ones of the same name."""
    lines = []
    for flags, _ in cases:
        flags = [flag.replace("{d}", str(d)) for flag in flags]
        own = {flag.split("=")[0] for flag in flags}
        line = [flag for flag in usual if flag.split("=")[0] not in own] + flags
        lines.append([SHOW, *line[:-1]] if line[-1] == SHOW else line)
    (d / f"{module}.json").write_text(json.dumps(lines))
    done = subprocess.run(
        [sys.executable, "-m", "tests.front_doors", module, str(d / f"{module}.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_told(outcome: dict, words: str, program: str) -> None:
    assert outcome["status"] == 2, outcome
    [line] = outcome["err"].splitlines()
    assert line.startswith(f"{program}: ") and words in line, line
    assert "Traceback" not in outcome["err"] + outcome["out"]


@pytest.fixture(scope="module")
def trained(wrong_files) -> list[dict]:
    usual = [f"--config={wrong_files}/config.py", f"--workdir={wrong_files}/run"]
    shown = [([*flags, SHOW], "") for flags in SHOWN]
    return outcomes("nemotron_jax.commands.train", usual, TRAIN + shown, wrong_files)


@pytest.fixture(scope="module")
def evaluated(wrong_files) -> list[dict]:
    usual = [f"--checkpoint={HUB}", "--suites=speed", f"--output={wrong_files}/report"]
    return outcomes("nemotron_jax.commands.eval", usual, EVAL, wrong_files)


@pytest.mark.parametrize("number", range(len(TRAIN)), ids=lambda n: " ".join(TRAIN[n][0]))
def test_train_says_one_line(trained, number: int) -> None:
    assert_told(trained[number], TRAIN[number][1], "train.py")


def test_parts_and_recipes_are_chosen_by_name(trained) -> None:
    assert [outcome["status"] for outcome in trained[len(TRAIN) :]] == [0] * len(SHOWN)
    shown = [from_json(outcome["out"]) for outcome in trained[len(TRAIN) :]]
    recipe, switched, high, no_mtp, short, own = shown
    expected = nemotron3_nvfp4(0)  # of 4 layers none stays high
    assert recipe.execution.precision == expected
    assert switched.execution.precision == dataclasses.replace(expected, switch_step=100)
    assert high.execution.precision == PrecisionConfig()
    assert no_mtp.model.mtp is None and high.model.mtp is not None
    total = high.training.schedule.total_tokens
    assert short.training.schedule.total_tokens == total * 3 // high.training.steps
    assert own.training.schedule.total_tokens == 9999


@pytest.mark.parametrize("number", range(len(EVAL)), ids=lambda n: " ".join(EVAL[n][0]))
def test_eval_says_one_line(evaluated, wrong_files, number: int) -> None:
    assert_told(evaluated[number], EVAL[number][1], "eval.py")
    assert not (wrong_files / "report" / "report.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"), [case for case in EVAL if case[0][0].startswith("--checkpoint={d}")]
)
def test_the_facade_says_one_sentence(wrong_files, flags: list[str], words: str) -> None:
    path = flags[0].removeprefix("--checkpoint=").replace("{d}", str(wrong_files))
    with pytest.raises(ValueError, match=".+") as error:
        nj.load_pretrained(path)
    assert str(path) in str(error.value) or words in str(error.value)


def test_the_facade_refuses_a_url() -> None:
    for load in (nj.load_pretrained, nj.load_tokenizer):
        with pytest.raises(ValueError, match="path='hf://owner/model': is a URL"):
            load("hf://owner/model")


@pytest.mark.parametrize("name", ["absent", "file", "data.json", "no_text"])
def test_no_tokenizer_is_named(wrong_files, name: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer .*{name}"):
        nj.load_tokenizer(wrong_files / name)


def test_the_home_directory_stands_for_its_sign(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command_line.writable("workdir", "~/runs") == tmp_path / "runs"
    assert command_line.path_of("workdir", "~no_such_user/runs") == pathlib.Path(
        "~no_such_user/runs"
    )


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--max_tokens=0", "chat.max_tokens=0: must be from 1"),
        ("--seed=-1", "chat.seed=-1: must be from 0"),
        ("--budget=-1", "chat.budget=-1: must be from 0"),
        ("--temperature=nan", "temperature"),
        ("--top_p=0", "top_p"),
        ("--checkpoint={d}/file", "tokenizer"),
    ],
)
def test_the_chat_says_one_line(wrong_files, capsys, flag: str, words: str) -> None:
    assert terminal.main([f"--checkpoint={HUB}", flag.replace("{d}", str(wrong_files))]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("chat: ") and words in line
