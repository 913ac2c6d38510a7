"""One door to environments by name, those of one's own among them, in this process and others."""

import json
import sys
import types

import pytest

from nemotron_jax.data.messages import oracle_source, slip_source
from nemotron_jax.environments import catalogue, registry
from nemotron_jax.environments.catalogue import Registry, find, task_source
from nemotron_jax.environments.families.lookup import Lookup

MODULE = """
from nemotron_jax.environments.families.lookup import Lookup
class Own(Lookup):
    name = "NAME"
WHOLE = Own()
NUMBER = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    """A module of the current folder, which is not on Python's path, with an environment."""
    name = f"own_module_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE.replace("NAME", name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))
    return name


def test_a_name_a_class_of_ones_own_and_a_file_of_rows_are_named_alike(own, tmp_path) -> None:
    where = "field='x'"
    assert task_source("lookup/2", where) == (registry["lookup"], 2)
    assert task_source("lookup", where) == (registry["lookup"], None)
    environment, level = task_source(f"{own}:Own/1", where)
    assert (environment.name, level) == (own, 1) and registry[own] is environment
    assert task_source(f"{own}:Own", where) == (environment, None)
    assert oracle_source(f"oracle:{own}:Own/0") == (environment, 0)
    assert slip_source(f"slips:{own}:Own/0:other") == (environment, 0, "other")
    row = {"responses_create_params": {"input": "1+1?"}, "expected_answer": "2"}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f"rows_{own}.jsonl").write_text(json.dumps(row) + "\n")
    rows, level = task_source(f"rows:folder/rows_{own}.jsonl", where)
    assert len(rows) == 1 and level is None
    assert find(f"rows:./folder/rows_{own}.jsonl") is rows  # one file, one environment


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lokup/1", "no environment is called 'lokup'; the nearest name is 'lookup'"),
        ("", "no environment is called ''"),
        ("lookup/9", "the level must be 0 to"),
        ("lookup/", "the level must be 0 to"),
        ("no_such_module:X", "No module named 'no_such_module'"),
        ("{own}:Missing", "'Missing' of {own} is not an environment"),
        ("{own}:NUMBER", "'NUMBER' of {own} is not an environment"),
        ("{own}:WHOLE", "another environment is called '{own}'"),  # beside Own
        ("rows:nothing.jsonl", "No such file"),
        ("rows:s3://bucket/rows.jsonl", "is a URL"),
        ("gs://bucket/rows.jsonl", "is a URL"),
        ("rows:file:///rows.jsonl", "is a URL"),
        ("rows:", ""),
    ],
)
def test_what_names_no_environment_is_refused_under_its_field(own, name, words) -> None:
    task_source(f"{own}:Own", "")
    name = name.format(own=own)
    with pytest.raises(ValueError) as caught:
        task_source(name, f"rl.rollout.environments={name!r}")
    said = str(caught.value)
    assert said.startswith(f"rl.rollout.environments={name!r}: ") and words.format(own=own) in said


def test_another_process_is_given_what_it_cannot_know(own) -> None:
    task_source(f"{own}:Own", "")
    assert registry.packed({"lookup"}) is None
    other = Registry({})
    other.unpack(registry.packed({"lookup", own}))
    assert list(other) == [own]
    assert other[own].split(0, "train", 3) == registry[own].split(0, "train", 3)


def test_what_no_other_process_can_import_is_refused_before_a_run(own, monkeypatch) -> None:
    """A class of a config file, which is run under a name that only this process knows."""
    module = types.ModuleType("config_of_one_process")
    exec(MODULE.replace("NAME", "inline"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    registry.register(module.Own())
    held = type("Held", (Lookup,), {"name": "held", "__module__": own})()
    held.handle = open  # noqa: SIM115
    for name in ("inline", registry.register(held).name):
        with pytest.raises(ValueError, match=f"'{name}' cannot be sent to workers .*MODULE:CLASS"):
            registry.packed({name})


def test_a_folder_is_searched_after_all_others(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    catalogue.search_folder(str(tmp_path))
    catalogue.search_folder(str(tmp_path))
    assert sys.path[-1] == str(tmp_path) and sys.path.count(str(tmp_path)) == 1
