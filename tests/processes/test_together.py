"""Two and four processes do what one does, and go on with what the others have saved."""

import json
import pathlib
import subprocess

import pytest

from nemotron_jax.launch import launch
from tests.processes import together
from tests.training.runs import comparable

pytestmark = pytest.mark.slow  # a run of each kind, by one, two and four processes
PROGRAM = str(pathlib.Path(together.__file__))
ROOT = pathlib.Path(__file__).parents[2]
FSDP, FOUR = {"data": 1, "fsdp": 2}, {"data": 2, "fsdp": 2}


def run_together(count: int, devices: int, folder: pathlib.Path, jobs: list[dict]) -> list[list]:
    """What the jobs gave in each process."""
    path = folder / f"jobs_{count}.json"
    path.write_text(json.dumps({"devices": devices, "jobs": jobs}))
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    started = launch(["-m", "tests.processes.together", str(path)], count, **options)
    for process in started:
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output
    return [json.loads(path.with_suffix(f".{number}.json").read_text()) for number in range(count)]


def records(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_close(found: list[dict], wanted: list[dict], rel: float) -> None:
    names = ("success", "whole_held_out_loss", "merged_held_out_loss")
    both = [
        [a | {n: b[n] for n in names if n in b} for a, b in zip(comparable(some), some)]
        for some in (found, wanted)
    ]
    for one, other in zip(*both, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=rel), f"step {other['step']}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def alone(texts, folder):
    """What one process gives of the same jobs, on as many devices."""
    jobs = [
        {"do": "pretrain", "workdir": f"{folder}/alone", "texts": f"{texts}", "steps": 12},
        {"do": "sft", "workdir": f"{folder}/alone_sft", "steps": 10},
    ]
    return together.do([job | {"mesh": FSDP} for job in jobs])


@pytest.fixture(scope="module")
def two(texts, folder, alone):
    """What two processes gave of each job."""
    run, given = {"workdir": f"{folder}/two"}, {"texts": f"{texts}"}
    jobs = [
        {"do": "rows", "workdir": f"{folder}/rows", **given},
        {"do": "pretrain", **run, **given, "steps": 9, "mesh": FSDP, "sample_tokens": 3},
        {"do": "sums", **run, **given, "mesh": FSDP},
        {"do": "hub", "workdir": f"{folder}/alone", "output": f"{folder}/hub", "mesh": FSDP},
        {"do": "evaluate", "workdir": f"{folder}/alone", "output": f"{folder}/eval"}
        | {"mesh": "fsdp=2"},
        {"do": "sft", "workdir": f"{folder}/two_sft", "steps": 10, "mesh": FSDP},
    ]
    together.do([jobs[0]])  # the corpus, which processes would write at once
    return dict(zip((job["do"] for job in jobs), zip(*run_together(2, 2, folder, jobs))))


@pytest.fixture(scope="module")
def four(texts, folder, two):
    """What four processes gave that went on with the run of two, and came to its end."""
    run = {"workdir": f"{folder}/two", "texts": f"{texts}", "mesh": FOUR}
    jobs = [{"do": "sums", **run}, {"do": "pretrain", **run, "steps": 12}, {"do": "sums", **run}]
    return list(zip(*run_together(4, 4, folder, jobs)))


def test_each_process_feeds_the_rows_that_its_devices_hold(two):
    """Along axes that share rows each has half; along tensor and context both have all."""
    first, second = two["rows"]
    assert first == [[0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert second == [[2, 3], [2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_two_processes_leave_the_records_of_one(two, alone, folder):
    found = records(folder / "two")[:9]
    assert [record["processes"] for record in found] == [2] * 9
    # The ninth record of the run that ends there is evaluated too.
    wanted = records(folder / "alone")[:9]
    assert_close(found[:8], wanted[:8], 1e-6)
    assert found[8]["loss"] == pytest.approx(wanted[8]["loss"], rel=1e-6)


def test_two_processes_fine_tune_as_one(two, alone, folder):
    found, wanted = records(folder / "two_sft"), records(folder / "alone_sft")
    assert_close(found, wanted, 1e-6)
    assert "success" in found[-1] and len(found) == 10


def test_what_two_saved_four_and_one_restore_bit_for_bit(two, four, texts, folder):
    assert len({*two["sums"], *four[0]}) == 1
    one = together.sums(f"{folder}/two", {"data": 1}, f"{texts}")
    assert {one} == set(four[2]) and four[2] != four[0]


def test_four_go_on_with_the_run_of_two_as_one_would(four, alone, folder):
    found = records(folder / "two")
    assert [record["processes"] for record in found] == [2] * 9 + [4] * 3
    # Sums over other groups round otherwise, and nine steps have let that grow.
    assert_close(found[9:], records(folder / "alone")[9:], 1e-5)


def test_one_process_alone_writes_a_run(two, four, folder):
    names = {path.name for path in (folder / "two").iterdir()}
    wanted = {"checkpoints", "config.json", "corpus", "metrics.jsonl", "plots", "samples.txt"}
    assert names == wanted | {"tensorboard", "tokenizer.json", ".lock"}
    assert len(list((folder / "two/tensorboard").iterdir())) == 2  # one of each start
    heads = [line for line in (folder / "two/samples.txt").open() if line.startswith("step")]
    assert heads == ["step 6\n", "step 9\n"]  # the four were asked for none
    assert not list((folder / "two/checkpoints").glob("*.partial"))


def test_a_hub_directory_of_two_processes_is_that_of_one(two, folder):
    import nemotron_jax as nj
    from nemotron_jax.evaluation.facts import parameters_sha256

    wanted = parameters_sha256(nj.load_pretrained(folder / "alone"))
    assert two["hub"] == ([wanted] * 2, [wanted] * 2)
    nj.save_pretrained(nj.load_pretrained(folder / "alone"), folder / "hub_1", dtype="float32")
    files = {path.name for path in (folder / "hub_1").iterdir()}
    assert files == {path.name for path in (folder / "hub").iterdir()}
    for name in files:
        assert (folder / "hub" / name).read_bytes() == (folder / "hub_1" / name).read_bytes()


def test_two_processes_evaluate_as_one(two, folder):
    assert two["evaluate"] == (0, 0)
    together.evaluate(f"{folder}/alone", f"{folder}/eval_1", "")
    found, wanted = (
        json.loads((folder / name / "report.json").read_text()) for name in ("eval", "eval_1")
    )
    means = lambda report: {
        n: v["mean"] for n, v in report["suites"]["perplexity"]["values"].items()
    }
    assert means(found) == pytest.approx(means(wanted), rel=1e-6)
