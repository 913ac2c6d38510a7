"""`nemotron-jax COMMAND` is what its module is, and a wheel of it runs in an empty environment."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import venv
import zipfile

import pytest

from nemotron_jax import command_line, commands

ROOT = pathlib.Path(__file__).parents[1]
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


def test_every_command_is_a_module_that_can_be_run() -> None:
    for module in commands.COMMANDS.values():
        spec = importlib.util.find_spec(module)
        if spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
        assert '__name__ == "__main__"' in pathlib.Path(spec.origin).read_text("utf-8")


def test_a_command_gets_the_arguments_after_its_name(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["nemotron-jax", "config", "mesh.data"])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 0 and "| `data` | int | `1` |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["nemotron-jax", "trian"])
    assert commands.main() == 2
    assert "'trian' is no command; choose one of train," in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["nemotron-jax"])
    assert commands.main() == 0
    assert all(f"\n  {name} " in f"\n{capsys.readouterr().out}" for name in ["train"])


def test_a_bare_name_is_a_config_of_this_project_and_a_path_wins(tmp_path, monkeypatch) -> None:
    own = ROOT / "configs" / "pretrain_tiny.py"
    assert command_line.config_file("pretrain_tiny") == str(own)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain_tiny").write_text("")
    assert command_line.config_file("pretrain_tiny") == "pretrain_tiny"
    with pytest.raises(ValueError, match="no config of this project: continue_tiny, grpo_multi"):
        command_line.config_file("pretrain_tyny")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel, built by pip from a copy: setuptools leaves its build/ beside the source."""
    copy = tmp_path_factory.mktemp("source") / "project"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", str(folder), str(copy)]
    subprocess.run(command, check=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.slow  # pip fetches setuptools
def test_the_wheel_holds_code_configs_and_data_and_nothing_else(wheel) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
        "nemotron_jax",
        "pallas_kernels",
    }
    tracked = [f for p in ("nemotron_jax", "pallas_kernels") for f in (ROOT / p).rglob("*")]
    wanted = {str(f.relative_to(ROOT)) for f in tracked if f.is_file() and f.suffix != ".pyc"}
    wanted |= {f"nemotron_jax/configs/{f.name}" for f in (ROOT / "configs").glob("*.py")}
    assert not wanted - names


@pytest.mark.slow  # pip fetches jax and what else is needed, half a gigabyte
def test_the_wheel_runs_the_main_job_in_an_empty_environment(wheel, tmp_path) -> None:
    venv.create(tmp_path / "empty", with_pip=True)
    folder = tmp_path / "empty" / "bin"
    latest = "latest" if sys.version_info >= (3, 12) else "py311"
    constraint = ["--constraint", str(ROOT / f"constraints-{latest}.txt")]
    subprocess.run([folder / "python", *PIP, "install", *constraint, wheel], check=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}

    def run(*words: str) -> str:
        done = subprocess.run(
            [folder / "nemotron-jax", *words],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    steps = ["--config.training.steps=3", "--config.logging.evaluate_every=3"]
    out = run("train", "--config=pretrain_tiny", "--workdir=run", *steps)
    assert "held-out loss" in out
    run("eval", "--checkpoint=run", "--suites=perplexity:rows=4", "--output=report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())
    assert "grpo" in run("config", "stage")
    assert "arithmetic" in run("environments", "--list")
    wrong = subprocess.run(
        [folder / "nemotron-jax", "train", "--config=pretrain_tiny", "--workdir=/proc/run"],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1, wrong.stderr
