"""The kernels compile for a TPU that is not here, and what is told of them is right."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bench, bundles, prove
from pallas_kernels.grouped_matmul import proofs, visits
from pallas_kernels.report import report_file

# A loop over a grid with a condition of 120 bundles and a loop of 6 in it. Bundle 0x10 begins the
# outer loop, 0x20 jumps over what follows to 0x9d, 0xa0 begins the inner loop.
LISTING = [(place, "{ nop }") for place in range(0x110)]
MARKS = {
    0x10: "{ nop } /* Start region 5 */",
    0x20: "{ 34 = sbr.rel (%p1) target = $region7 }",
    0x9D: "{ nop } /* Start/End empty region 7 :: Start region 8 */",
    0xA0: "{ nop } /* Start region 9 */",
    0xA3: "{ 35 = sbr.rel (!%p2) target = $region9 }",
    0x100: "{ 36 = sbr.rel (!%p3) target = $region5 }",
}


def listing() -> str:
    return "\n".join(f" 0x{place:x}   : > {MARKS.get(place, text)}" for place, text in LISTING)


def test_parts_of_a_listing_are_its_loops_and_long_conditions() -> None:
    kernel, outer, condition, inner = bundles.parts(listing())
    assert (outer.kind, outer.depth, outer.first, outer.last) == ("loop", 1, 0x10, 0x105)
    assert (condition.kind, condition.depth, condition.bundles) == ("condition", 2, 0x9D - 0x25)
    assert (inner.kind, inner.depth, inner.bundles) == ("loop", 2, 8)
    assert kernel.bundles + outer.bundles + condition.bundles + inner.bundles == 0x110


def test_cycles_are_bundles_times_trips() -> None:
    found = bundles.parts(listing())
    kernel, outer, condition, inner = (part.bundles for part in found)
    assert bundles.cycles(found, 50) == kernel + 50 * (outer + condition + inner)
    counted = bundles.cycles(found, 50, ((4,), (50, 2.5)))
    assert counted == kernel + 50 * outer + 4 * condition + 125 * inner
    alone = bundles.cycles(found, 50, ((1, 50, 2.5),))
    assert alone == kernel + 50 * outer + 50 * condition + 125 * inner
    with pytest.raises(ValueError, match="3 branches for a kernel of 2; its parts are >loop 117"):
        bundles.cycles(found, 50, ((4,), (50, 2.5), (1,)))


def test_counted_visits_are_those_of_the_kernel() -> None:
    rows, height = 150, 32
    tables = jax.jit(visits.by_tile, static_argnums=(1, 2))
    for sizes in ((0, 100, 0, 37, 5), (1, 1, 1, 0, 0), (64, 64, 0, 8, 0), (0, 0, 3, 200, 9)):
        made = tables(jnp.asarray(sizes, jnp.int32), rows, height)
        kernel = [np.asarray(table) for table in (made.tile, made.low, made.high)]
        expected = sorted((t, a, b) for t, a, b in zip(*kernel) if b > a)
        assert sorted(proofs._visits(np.asarray(sizes), rows, height)) == expected


def test_a_row_without_a_program_says_why() -> None:
    def refuses(x: jax.Array) -> jax.Array:
        raise ValueError("two\nlines")

    program, why = prove._compiled(
        refuses, [jax.ShapeDtypeStruct((2,), jnp.float32)], jax.devices()[0]
    )
    assert program is None and why == "two lines"


def test_an_unknown_target_is_one_sentence(capsys: pytest.CaptureFixture) -> None:
    assert prove.main(["--target=v9"]) == 2
    assert "must be one of v5e, v5p, v6e, tpu7x" in capsys.readouterr().err


def named(proof: Any) -> str:
    return f"{proof.kernel} {proof.direction} {proof.shape}"


@pytest.mark.prove_tpu
@pytest.mark.parametrize("proof", list(prove.all_proofs()), ids=named)
def test_a_kernel_compiles_for_v5p(proof: Any) -> None:
    from pallas_kernels import absent

    device = absent.tpu_devices("v5p:2x2x1")[0]
    row = prove.row_of(proof, "v5p", device, None)  # cycles take listings, which take half the time
    assert row["compiled"], row["why"]
    # The compiler does not tell it of a kernel that sets no limit: JAX's own attention.
    assert row["vmem_bytes"] is None or 0 < row["vmem_bytes"] < 128 * 2**20


@pytest.mark.parametrize("name", ["absent/x.json", "folder", "file/x.json", "\0"])
def test_a_report_that_cannot_be_written_is_found_before_the_work(tmp_path, capsys, name) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for main, flags in ((prove.main, ["--target=v5p"]), (bench.main, [])):
        with pytest.raises(SystemExit) as end:
            main([*flags, f"--json={tmp_path / name}"])
        assert end.value.code == 2
        assert capsys.readouterr().err.endswith("is no file in a folder that there is\n")
    assert report_file(str(tmp_path / "x.json")) and not report_file("")
