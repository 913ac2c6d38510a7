"""A loop that gathers and scatters what a layer of Super does on data=2, expert=8 and fsdp=16 of
v5p:8x8x4, compiled: prints what `compiled.overlap` says of it.

    python -m tests.planning.gathers [--plain]      (--plain: without the flags of this project)
"""

import json
import os
import sys

from nemotron_jax import host

EXPERTS, LATENT, HIDDEN, WIDTH, LAYERS = 64, 1024, 2688, 4096, 4
TOKENS = 256 * 8192


def main() -> None:
    """Compile it, and print."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "--plain" not in sys.argv:
        host.overlap_collectives()
    from nemotron_jax import compiled

    print(json.dumps(compiled.overlap(compiled.collectives(program()))))


def program() -> str:
    """The compiled loop's text."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from nemotron_jax.config.run import MeshConfig
    from nemotron_jax.sharding import ROWS, make_mesh
    from pallas_kernels import absent

    mesh = make_mesh(MeshConfig(data=2, fsdp=16, expert=8), absent.tpu_devices("v5p:8x8x4"))
    shares = ("fsdp", "expert")
    gather = lambda part, axes: jax.lax.all_gather(part, axes, axis=0, tiled=True)
    scatter = lambda sums, axes: jax.lax.psum_scatter(
        sums.astype(jnp.float32), axes, scatter_dimension=0, tiled=True
    )

    def layer(x, weights):
        up, down, dense = (one.astype(jnp.bfloat16) for one in weights)
        y = jnp.tanh(x @ gather(dense, shares))
        tokens = gather(y[:, :LATENT], "expert")
        up, down = gather(up, "fsdp"), gather(down, "fsdp")
        hidden = jnp.einsum(
            "rl,elf->rf", tokens, up[:8]
        )  # some of the work: its place is asked for
        sums = scatter(jnp.einsum("rf,efl->rl", hidden, down[:8]), "expert")
        dup = jnp.einsum("rl,rf->lf", tokens, hidden) * up
        ddense = jnp.einsum("rl,rf->lf", x, y)
        x = y.at[:, :LATENT].add(sums.astype(y.dtype))
        return x, (scatter(dup, "fsdp"), scatter(ddense, shares))

    of_experts, of_dense = (PartitionSpec(None, axes) for axes in (("expert", "fsdp"), shares))
    rows = PartitionSpec(ROWS)
    specs = (of_experts, of_experts, of_dense)
    run = jax.shard_map(
        lambda x, weights: jax.lax.scan(layer, x, weights),
        mesh=mesh,
        in_specs=(rows, specs),
        out_specs=(rows, (of_experts, of_dense)),
        check_vma=False,
    )
    like = lambda dtype, spec, *shape: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    weights = (
        like(jnp.float32, of_experts, LAYERS, 8 * EXPERTS, LATENT, HIDDEN),
        like(jnp.float32, of_experts, LAYERS, 8 * EXPERTS, HIDDEN, LATENT),
        like(jnp.float32, of_dense, LAYERS, WIDTH, WIDTH),
    )
    return jax.jit(run).lower(like(jnp.bfloat16, rows, TOKENS, WIDTH), weights).compile().as_text()


if __name__ == "__main__":
    main()
