"""An OpenAI-compatible server: python -m nemotron_jax.serve --checkpoint=DIR.

The checkpoint is a run's directory or a model's in the hub's layout. It says by itself what ends a
turn and how to sample; no other flag is needed. SIGTERM lets running requests end.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from nemotron_jax import host
from nemotron_jax.config.cache import CacheConfig
from nemotron_jax.config.checks import check_value, is_finite, local_path
from nemotron_jax.config.dtypes import dtype_name
from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.config.mesh_text import mesh_from_text
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.config.untrusted import read_bytes, read_object
from nemotron_jax.data.chat.hub_template import warn_of_other_template
from nemotron_jax.data.chat.render import END
from nemotron_jax.data.tokenizer import Tokenizer, check_vocabulary
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.decoding.generate import default_stop_tokens
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.pretrained import load_rounded, load_tokenizer
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.serving.driver import Driver
from nemotron_jax.serving.grammars import prepare
from nemotron_jax.serving.served import Served
from nemotron_jax.sharding import make_mesh

# Tokens of a prompt and its answer together, where nobody says: at 32 slots Super's keys and values
# then take 2 GB.
MAX_LENGTH = 8192
# Rounds of decoding between two looks at the queue: text comes in pieces of about as many tokens.
ROUNDS = 4
# Seconds for which a thread keeps the interpreter while the event loop waits for it: what the
# engine does between two calls of the device takes several times as long.
SWITCH_S = 0.001
_SIZE = re.compile(r"(\d{1,12})(B|KB|MB|GB|)", re.IGNORECASE)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_MOST_KEYS_BYTES = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve as the arguments say; the exit status."""
    flags = _Parser().parse_args(arguments)
    try:
        plan = _checked(flags)
        try:
            server = importlib.import_module("nemotron_jax.serving.server")
        except ImportError as error:
            raise ValueError(
                f"{error.name} is not installed; install the extra: pip install -e '.[serve]'"
            ) from None
        listener = server.bound(flags.host, flags.port)
    except (ValueError, OSError) as error:
        return _told(str(error), 2)
    host.share_one_heap()
    sys.setswitchinterval(SWITCH_S)
    driver = Driver(lambda: _made(plan), most=plan.engine.slots + flags.max_waiting)
    server.run(driver, listener, plan.name, max_body=plan.max_body, keys=plan.keys)
    status = 0 if driver.error is None else _failed(driver.error)
    if driver.busy:  # it loads or compiles still, and nothing else can end that
        sys.stdout.flush()
        os._exit(status)
    return status


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the flags ask for, checked before anything is loaded."""

    checkpoint: str
    name: str
    dtype: str
    tokenizer: Tokenizer
    engine: EngineConfig
    experts: str
    mesh: MeshConfig | None
    max_body: int
    keys: tuple[str, ...]


def _checked(flags: argparse.Namespace) -> _Plan:
    local_path("", "checkpoint", flags.checkpoint)
    rule = "must be a run's or a hub model's directory; `make sft` makes one, runs/sft"
    ok = Path(flags.checkpoint).is_dir()
    check_value("serve", "checkpoint", flags.checkpoint, ok, rule)
    ok = 0 <= flags.port < 2**16
    check_value("serve", "port", flags.port, ok, "must be from 0 to 65535; 0 picks a free one")
    ok = flags.max_waiting >= 1
    check_value("serve", "max_waiting", flags.max_waiting, ok, "must be at least 1")
    drafts = flags.speculative
    if drafts != "auto":
        drafts = _count("speculative", drafts)
    engine = EngineConfig(
        slots=flags.slots,
        max_length=flags.max_length,
        pages=flags.pages,
        speculative=drafts,
        rounds=ROUNDS,
        prefix_cache=True,
        snapshots=flags.slots,
        cache=_cache(Path(flags.checkpoint), flags.dtype),
    )
    rule = "must be dense or nvfp4"
    check_value("serve", "experts", flags.experts, flags.experts in ("dense", "nvfp4"), rule)
    mesh = mesh_from_text(flags.mesh)
    if mesh is not None:
        host.show_cpu_devices(mesh.size)
    checkpoint = Path(flags.checkpoint)
    return _Plan(
        checkpoint=flags.checkpoint,
        name=flags.served_name or checkpoint.resolve().name or "model",
        dtype=dtype_name("serve", flags.dtype),
        tokenizer=load_tokenizer(flags.checkpoint),
        engine=engine,
        experts=flags.experts,
        mesh=mesh,
        max_body=_size(flags.max_body),
        keys=_keys(flags.api_key_file),
    )


def _made(plan: _Plan) -> tuple[Engine, Served]:
    """The engine, in the thread that owns it, and what it serves."""
    host.keep_compiled_programs()
    mesh = None if plan.mesh is None else make_mesh(plan.mesh, jax.devices())
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        model = load_rounded(plan.checkpoint, plan.dtype, mesh=mesh, experts=plan.experts)
        warn_of_other_template(plan.checkpoint)
        check_vocabulary(plan.tokenizer, model.config.vocab_size)
        engine = Engine(model, plan.engine, tokenizer=plan.tokenizer)
    served = _served(plan, model, engine.config)
    prepare(plan.tokenizer)
    # All that is there stays, a million objects of jax's for the most part. To look through them
    # takes a third of a second, in which no other thread runs: no collection does it any more.
    gc.collect()
    gc.freeze()
    host.give_back_freed_memory()
    return engine, served


def _quantization(checkpoint: Path) -> dict[str, Any]:
    """What a quantised directory says of its formats; nothing where it is none."""
    file = checkpoint / "hf_quant_config.json"
    found = read_object(file, "take the directory as it was made") if file.exists() else {}
    kept = found.get("quantization")
    return kept if isinstance(kept, dict) else {}


def _cache(checkpoint: Path, dtype: str) -> CacheConfig:
    """The formats of what is kept, as the checkpoint was made for: FP8 keys and values where it
    says so and nobody asks for float32."""
    fp8 = _quantization(checkpoint).get("kv_cache_quant_algo") == "FP8" and dtype == "bfloat16"
    return CacheConfig(kv="float8_e4m3fn" if fp8 else "auto")


def _served(plan: _Plan, model: Nemotron, config: EngineConfig) -> Served:
    tokenizer = plan.tokenizer
    stops = tuple(dict.fromkeys((tokenizer.eos, *default_stop_tokens(model))))
    # A request takes pages for its drafts too.
    pages = config.num_pages * config.page_tokens - (config.most_drafts + 1 if config.pages else 0)
    return Served(
        name=plan.name,
        tokenizer=tokenizer,
        vocabulary=model.config.vocab_size,
        context=max(1, min(config.max_length, pages)),
        stop_tokens=stops,
        turn_stops=(tokenizer.token_id(END), *stops),
        **_sampling(Path(plan.checkpoint)),
    )


def _sampling(checkpoint: Path) -> dict[str, float]:
    """The sampling that a checkpoint's generation_config.json recommends, as far as it is one."""
    run = RunDirectory.of(checkpoint)
    file = (checkpoint if run is None else run.companions) / "generation_config.json"
    if not file.exists():
        return {}
    found = read_object(file, "take the file away, or mend it")
    fits = {"temperature": lambda t: 0 <= t <= 100, "top_p": lambda p: 0 < p <= 1}
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool) and is_finite(v)
    named = {name: found[name] for name in fits if number(found.get(name))}
    return {name: float(value) for name, value in named.items() if fits[name](value)}


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"--{name}={text}: must be auto or a number of drafts, such as 3")
    return int(text[:9])


def _size(text: str) -> int:
    found = _SIZE.fullmatch(text)
    if found is None or not int(found[1]):
        raise ValueError(f"--max_body={text}: must be a number of bytes, such as 8MB")
    return int(found[1]) * _UNITS[found[2].upper()]


def _keys(file: str | None) -> tuple[str, ...]:
    """One key a line; empty lines and those that begin with # are none."""
    if file is None:
        return ()
    try:
        lines = read_bytes(Path(file), _MOST_KEYS_BYTES).decode().splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--api_key_file={file}: cannot be read ({reason})") from None
    keys = tuple(k for line in lines if (k := line.strip()) and not k.startswith("#"))
    if not keys:
        raise ValueError(f"--api_key_file={file}: holds no key; write one a line")
    return keys


def _failed(error: BaseException) -> int:
    """What to say where the model could not be loaded; the exit status."""
    if isinstance(error, ValueError | OSError):
        return _told(str(error), 2)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return _told("memory is exhausted; lower --slots, --max_length or --pages", 1)
    traceback.print_exception(error)
    return 1


def _told(reason: str, status: int) -> int:
    sys.stdout.flush()
    print(f"serve: {' '.join(reason.split())}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """The flags; a wrong one is one line."""

    def __init__(self) -> None:
        super().__init__(prog="python -m nemotron_jax.serve", description=__doc__)
        add = self.add_argument
        add("--checkpoint", required=True, help="a run's or a hub model's directory")
        add("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0: every one")
        add("--port", type=int, default=8000, help="0 picks a free one")
        add("--mesh", default="", help="axes of the mesh, as in data=1,fsdp=2; empty: one device")
        add("--dtype", default="bfloat16", help="of the model's matrices: bfloat16 or float32")
        add("--experts", default="dense", help="dense, or nvfp4: routed experts as 4-bit codes")
        add("--slots", type=int, default=32, help="requests that run at a time")
        add("--max_length", type=int, default=MAX_LENGTH, help="tokens of prompt and answer")
        add("--pages", type=int, default=None, help="pages of 64 tokens; all slots' by default")
        add("--speculative", default="auto", help="drafts a round by the MTP block, or auto")
        add("--api_key_file", default=None, help="a file of keys, one a line; none: no key needed")
        add("--max_waiting", type=int, default=256, help="requests that wait; more are sent 429")
        add("--max_body", default="8MB", help="of a request")
        add("--served_name", default="", help="the model's name; its directory's by default")

    def error(self, message: str) -> NoReturn:
        """One line, status 2."""
        sys.exit(_told(f"{message}; --help lists the flags", 2))


if __name__ == "__main__":
    sys.exit(main())
