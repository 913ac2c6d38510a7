"""The tiny runs of configs/, as they are, by one, two and four processes."""

import shutil

import pytest

from tests.processes import together
from tests.processes.test_together import records, run_together

pytestmark = pytest.mark.slow  # the step of each run is compiled seven times
STEPS, COUNTS = 10, (1, 2, 4)
MESH = {"data": 2, "fsdp": 2}
NAMES = ("loss", "mtp_loss", "aux_loss", "grad_norm")
LIMIT = 1e-6  # relative: gloo adds up in another order than the devices of one process


@pytest.fixture(scope="module", params=["pretrain_tiny", "sft_tiny"])
def runs(request, tmp_path_factory) -> dict[int, tuple[list[dict], dict[str, str]]]:
    """By how many processes: the records, and a hash of every row by its step and number."""
    folder, found = tmp_path_factory.mktemp(request.param), {}
    first = folder / "1"
    for count in COUNTS:
        workdir = folder / f"{count}"
        if count > 1:  # the corpus and its tokenizer are made once
            workdir.mkdir()
            shutil.copy(first / "tokenizer.json", workdir)
            if (first / "corpus").exists():
                shutil.copytree(first / "corpus", workdir / "corpus")
        job = {"do": "published", "name": request.param, "workdir": f"{workdir}"}
        job |= {"steps": STEPS, "mesh": MESH}
        fed = run_together(count, 4, folder, [job]) if count > 1 else [together.do([job])]
        rows = {key: one for (each,) in fed for key, one in each.items()}
        assert len(rows) == sum(len(set(each)) for (each,) in fed)  # each row by one process
        found[count] = records(workdir), rows
    return found


def furthest(found: list[dict], wanted: list[dict]) -> dict[str, float]:
    """The largest relative distance of each value of a step from the other run's."""
    names = [name for name in NAMES if name in wanted[0]]
    pairs = list(zip(found, wanted, strict=True))
    return {n: max(abs(a[n] - b[n]) / max(abs(b[n]), 1e-30) for a, b in pairs) for n in names}


@pytest.mark.parametrize("count", COUNTS[1:])
def test_several_processes_leave_the_records_of_one(runs, count: int) -> None:
    found, wanted = runs[count][0], runs[1][0]
    assert [record["processes"] for record in found] == [count] * STEPS
    for name in ("step", "tokens", "learning_rate", "skipped"):
        assert [one.get(name) for one in found] == [one.get(name) for one in wanted]
    distances = furthest(found, wanted)
    print({name: f"{one:.1e}" for name, one in distances.items()})
    assert max(distances.values()) <= LIMIT, distances


@pytest.mark.parametrize("count", COUNTS[1:])
def test_several_processes_feed_the_rows_of_one_in_its_order(runs, count: int) -> None:
    assert runs[count][1] == runs[1][1] and len(runs[1][1]) == STEPS * 8


def test_a_hash_tells_rows_apart(runs) -> None:
    assert len(set(runs[1][1].values())) > STEPS * 4
