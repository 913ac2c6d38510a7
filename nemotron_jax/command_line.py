"""What train.py and eval.py share: a wrong flag or value is one line and an exit status."""

import ast
import errno
import importlib
import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from nemotron_jax import distributed
from nemotron_jax.config.checks import local_path
from nemotron_jax.config.convert import optional_parts, to_config_dict
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.precision import preset
from nemotron_jax.config.run import RunConfig

_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT at which process 0 listens.")
_PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "Of the processes of one run.")
_PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "This process's; 0 writes and speaks.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    None,
    ["auto"],
    "auto: let JAX find the other processes, as on a Cloud TPU slice.",
)
_PACKAGE = Path(__file__).parent
_ROOT = _PACKAGE.parent
# Where a bare name after --config= is looked for: in a wheel, and in a checkout.
_CONFIG_FOLDERS = (_PACKAGE / "configs", _ROOT / "configs")
_BARE_CONFIG = re.compile(r"--?config=(\w+)")
_PRECISION = re.compile(r"--?config\.(?:execution\.)?precision=([A-Za-z]\w*)")
_LORA = re.compile(r"--?config\.lora\.(\w+)=(.*)", re.DOTALL)
_NO_PART = re.compile(r"--?config\.([\w.]+)=None")
# A disk that is full is nobody's wrong value: the same command goes on when there is room.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run(program: str, main: Callable[[], int]) -> None:
    """Parse the flags and exit with main's status: 1 where it failed, 2 where asked for wrongly.

    Errors that this project raises are sentences for its user, as are those of files and of memory;
    all others keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # A reason may quote what a model wrote, and a terminal may know ASCII alone.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.set_verbosity(logging.ERROR)  # what config_flags warns of is refused as a sentence
    _show_in_help(main.__module__)
    app.run(
        lambda _: _exit_status(program, main),
        flags_parser=lambda arguments: _parse(program, arguments),
    )


def _show_in_help(module: str) -> None:
    """Let --help say what a module says of itself and of its flags, whoever started it."""
    sys.modules["__main__"].__doc__ = sys.modules[module].__doc__
    for flag in flags.FLAGS.flags_by_module_dict().get(module, ()):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def config_file(name: str) -> str:
    """The file of configs/ that a bare name such as `pretrain_tiny` stands for.

    A name that is a file stays itself. Raises ValueError with the names that there are.
    """
    folder = next((folder for folder in _CONFIG_FOLDERS if folder.is_dir()), None)
    if Path(name).exists() or folder is None:
        return name
    there = sorted(file.stem for file in folder.glob("*.py") if file.stem != "models")
    if name not in there:
        raise ValueError(
            f"--config={name}: names no file, and no config of this project: {', '.join(there)}"
        )
    if folder.parent == _PACKAGE:  # of a wheel: its files import each other as configs.NAME
        sys.modules.setdefault("configs", importlib.import_module("nemotron_jax.configs"))
    return str(folder / f"{name}.py")


def overrides() -> dict[str, object]:
    """The values that `--config.a.b=value` flags gave, by dotted name."""
    return dict(config_flags.get_override_values(flags.FLAGS["config"]))


def writable(flag: str, path: str | Path) -> Path:
    """The path of a directory to be written into; raises ValueError where it cannot be."""
    if not str(path):
        raise ValueError(f"--{flag}=: is empty; name a directory")
    path = path_of(flag, path)
    try:
        there = next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is {'a file' if there.exists() else 'a dead link'}")
        if "\0" in str(path):  # which lexists takes for a path that is not there yet
            raise ValueError("a zero byte in the name")
        with tempfile.TemporaryFile(dir=there):
            return path
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--{flag}={path}: cannot be written ({error}); name a directory that can"
        ) from None


def join_processes(
    started_with: Mapping[str, Any], *, whole: Callable[[], str] = lambda: ""
) -> None:
    """Join the other processes of a run, where flags say that there are some.

    All must have been `started_with` the same values; `whole` names the newest checkpoint, for the
    last words of a run that loses a process. Raises ValueError for flags that do not go together.
    """
    place = {"coordinator": _COORDINATOR, "process_count": _PROCESS_COUNT}
    place["process_index"] = _PROCESS_INDEX
    values = {name: flag.value for name, flag in place.items()}
    missing = [f"--{name}" for name, value in values.items() if value is None]
    detected = _DISTRIBUTED.value == "auto"
    if detected and len(missing) < len(values):
        raise ValueError(
            "--distributed=auto finds the other processes by itself; leave out --coordinator, "
            "--process_count and --process_index"
        )
    facts = dict(_flat(started_with))
    if detected:
        distributed.join_detected(facts, whole=whole)
    elif missing and len(missing) < len(values):
        raise ValueError(
            f"--coordinator, --process_count and --process_index go together; "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        )
    elif not missing:
        distributed.join(*values.values(), facts, whole=whole)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every value of nested dictionaries as text, under its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def devices_here(devices: int, of: str) -> int:
    """How many of a mesh's devices a CPU shows in this process. Raises ValueError where the
    processes cannot share them; `of` names the mesh."""
    count = distributed.process_count()
    if devices % count:
        raise ValueError(
            f"--process_count={count}: {devices} devices of {of} cannot be shared evenly; start a "
            "number of processes that divides them, or change the mesh"
        )
    return devices // count


def path_of(flag: str, path: str | Path) -> Path:
    """The path that a flag names; no shell puts the home directory in place of its ~.

    Raises ValueError for a URL, which would become a folder of that name.
    """
    local_path("", flag, path)
    try:
        return Path(path).expanduser()
    except RuntimeError:  # of a user whom the system does not know
        return Path(path)


def _parse(program: str, arguments: list[str]) -> list[str]:
    """The program's name, once every flag is parsed; exits where one cannot be."""
    arguments = _with_config_file(program, arguments)
    presets = [match[1] for argument in arguments if (match := _PRECISION.fullmatch(argument))]
    parts = optional_parts(RunConfig)
    absent = [m[1] for a in arguments if (m := _NO_PART.fullmatch(a)) and m[1] in parts]
    named = [*(f"precision={name}" for name in presets), *(f"{part}=None" for part in absent)]
    # A part that the file leaves out has no fields that config_flags could set.
    lora = {match[1]: match[2] for a in arguments if (match := _LORA.fullmatch(a))}
    rest = [a for a in arguments if not (a.startswith("-") and a.endswith(tuple(named)))]
    rest = [a for a in rest if not _LORA.fullmatch(a)]
    whole, sys.argv = sys.argv, rest  # config_flags looks for overrides there
    try:
        if unknown := flags.FLAGS(rest)[1:]:
            raise flags.Error(f"unknown arguments {unknown}; use --flag=value")
        if (config := flags.FLAGS["config"].value) is not None:
            if not hasattr(config, "items"):  # a file that was not found says so at this look
                kind = type(config).__name__
                raise flags.Error(
                    f"{_config_flag(rest)}its get_config() gave {kind}, no ConfigDict"
                )
            _apply(config, presets, absent)
            _apply_lora(config, lora)
        elif named or lora:
            what = named[0] if named else f"config.lora.{min(lora)}"
            raise flags.Error(f"{what} needs a --config to change")
    except OSError as error:
        _refuse(program, f"{_config_flag(rest)}{error.__cause__ or error}")
    except (AttributeError, KeyError) as error:  # config_flags' own for an unknown key
        known = _is_of_the_file(error)
        reason = _unquoted(error)
        _refuse(
            program, f"{_config_flag(rest)}{reason}" if known else f"unknown config key {reason}"
        )
    except flags.Error as error:
        text = str(error)
        if "Traceback" in text:  # config_flags quotes that of the user's file
            text = f"{_config_flag(rest)}{text.strip().splitlines()[-1]}"
        elif _config_flag(rest) and "flag --config=None" in text:
            text = f"{_config_flag(rest)}its get_config() gave None, no ConfigDict"
        _refuse(program, text)
    except Exception as error:  # whatever the user's file raised when it was read
        _refuse(program, f"{_config_flag(rest)}{type(error).__name__}: {error}")
    finally:
        sys.argv = whole
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells forty lines of each checkpoint
        # What it fails at is raised here too, as one sentence; it writes a traceback beside.
        logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
    return arguments[:1]


def _with_config_file(program: str, arguments: list[str]) -> list[str]:
    """The arguments with the file of a config that was named alone.

    Exits where there is none of that name, and where help is asked for, with status 0: absl's own
    help ends with 1.
    """
    if {"--help", "-help", "-h"} & set(arguments):
        app.usage(shorthelp=True, writeto_stdout=True)
        sys.exit(0)
    try:
        return [
            f"--config={config_file(bare[1])}" if (bare := _BARE_CONFIG.fullmatch(a)) else a
            for a in arguments
        ]
    except ValueError as error:
        _refuse(program, str(error))


def _apply(config: ConfigDict, presets: Sequence[str], absent: Sequence[str]) -> None:
    """What the flags ask for that config_flags cannot say: presets by name, and parts left out."""
    for name in presets:
        recipe = to_config_dict(preset(name, len(config.model.pattern)))
        given = config_flags.get_override_values(flags.FLAGS["config"])
        config.execution.precision.update(recipe)
        for path, value in given.items():  # single fields of the recipe, on top of it
            if path.startswith("execution.precision."):
                config.execution.precision[path.removeprefix("execution.precision.")] = value
    for part in absent:
        *owners, name = part.split(".")
        owner = config
        for step in owners:
            owner = owner[step]
        with owner.ignore_type():
            owner[name] = None


def _apply_lora(config: ConfigDict, values: Mapping[str, str]) -> None:
    """Fields of adapters, of which a file without any gets the defaults, to be trained alone."""
    if not values:
        return
    if config.lora is None:
        with config.ignore_type():
            config.lora = to_config_dict(LoRAConfig())
        config.training.trains = "lora"
    for name, text in values.items():
        if name not in config.lora:
            raise KeyError(f"config.lora.{name}; its fields are {', '.join(config.lora)}")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        try:
            config.lora[name] = value
        except TypeError:
            kind = type(config.lora[name]).__name__
            raise flags.Error(f"--config.lora.{name}={text}: must be of type {kind}") from None


def _exit_status(program: str, main: Callable[[], int]) -> int:
    """The status of main; a run of several processes that failed ends here."""
    try:
        status = _told_status(program, main)
        distributed.leave(status)
    except Exception:
        # What another one's end breaks here is heard of about as soon as the end itself.
        if distributed.lost(_HEARD_WITHIN_S):
            distributed.end_with_loss()
        if distributed.process_count() > 1:
            traceback.print_exc()
            distributed.leave(1)
        raise
    return status


def _told_status(program: str, main: Callable[[], int]) -> int:
    try:
        return main()
    except KeyboardInterrupt:
        return _told(program, "interrupted", 130)
    except MemoryError:
        return _told(program, f"memory is exhausted; {_LESS}", 1)
    except (ValueError, OSError, FloatingPointError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = any(map(raised_in.is_relative_to, (_PACKAGE, _ROOT / "pallas_kernels"))) or (
            raised_in.is_relative_to(_ROOT) and "site-packages" not in str(raised_in)
        )
        of_a_file = isinstance(error, OSError) and error.errno is not None
        if not (ours or of_a_file):
            raise  # a fault of the program, not a sentence for its user
        is_wrong = isinstance(error, ValueError) or (of_a_file and error.errno not in _DISK)
        return _told(program, str(error), 2 if is_wrong else 1)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _told(program, f"memory is exhausted ({str(error).splitlines()[0]}); {_LESS}", 1)


_HEARD_WITHIN_S = 10.0
_LESS = "lower data.batch_size, raise training.micro_batches, or set execution.remat=full"


def _told(program: str, reason: str, status: int) -> int:
    sys.stdout.flush()  # so that the sentence is the last thing to be read
    print(f"{program}: {' '.join(reason.split())}", file=sys.stderr)
    return status


def _refuse(program: str, reason: str) -> NoReturn:
    sys.exit(_told(program, reason, 2))


def _config_flag(arguments: Sequence[str]) -> str:
    """The flag that named the file, to begin a sentence on it with."""
    return next((f"{a}: " for a in arguments if re.match(r"--?config=", a)), "")


def _is_of_the_file(error: Exception) -> bool:
    """Whether the user's own file raised an error, or has no get_config."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].name in ("get_config", "<module>") or "get_config" in str(error)


def _unquoted(error: Exception) -> str:
    """The message of a KeyError, also of one inside another error, which holds it quoted."""
    try:
        return str(ast.literal_eval(str(error)))
    except (SyntaxError, ValueError):
        return str(error)
