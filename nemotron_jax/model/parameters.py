"""A model's parameters as a flat table of dotted names, and back."""

from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from nemotron_jax.config.model import BLOCK_KINDS, ModelConfig
from nemotron_jax.layers.latent_moe import LatentMoE
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.sharding import MESH_AXES, current_mesh, parameter_sharding
from nemotron_jax.types import Axes


def abstract_model(config: ModelConfig, dtype: str = "float32") -> Nemotron:
    """The model with shapes in place of arrays; costs no memory at any size."""
    return jax.eval_shape(lambda: Nemotron(config, rngs=nnx.Rngs(0), dtype=dtype))


def flatten(model: Nemotron) -> dict[str, jax.Array]:
    """Every parameter under its dotted name, such as `mamba.mixer.x.weight`, in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {_dotted(path): leaf for path, leaf in leaves}


def stacks(model: Nemotron) -> dict[str, tuple[tuple[int, ...], list[jax.Array]]]:
    """Every parameter under the name that it has in a model of stacks, with its shape there: its
    one array, or where layers stand alone those of all layers in order."""
    found: dict[str, tuple[tuple[int, ...], list[jax.Array]]] = {}
    for name, leaf in flatten(model).items():
        kind, number, rest = [*name.split(".", 2), "", ""][:3]
        if kind in BLOCK_KINDS.values() and number.isdigit():
            layers = [*found.get(f"{kind}.{rest}", ((), []))[1], leaf]
            found[f"{kind}.{rest}"] = (len(layers), *leaf.shape), layers
        else:
            found[name] = leaf.shape, [leaf]
    return found


def unflatten(like: Nemotron, parameters: Mapping[str, jax.Array]) -> Nemotron:
    """`like` with its parameters replaced by name; raises ValueError unless the names are the
    same."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [_dotted(path) for path, _ in leaves]
    if set(names) != set(parameters):
        missing, extra = set(names) - set(parameters), set(parameters) - set(names)
        raise ValueError(
            f"unflatten: parameters do not fit the model: missing {sorted(missing)[:5]}, "
            f"unknown {sorted(extra)[:5]}; the configs differ"
        )
    return jax.tree_util.tree_unflatten(structure, [parameters[name] for name in names])


def variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Every parameter as the variable that holds it, whose type and axes say what it is."""
    is_variable = lambda node: isinstance(node, nnx.Variable)
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_variable)[0]
    return {_dotted(path): variable for path, variable in leaves}


def model_axes(model: Nemotron) -> dict[str, Axes]:
    """The logical axes of every parameter by dotted name; stacked layers have one more in front."""
    return {name: variable.axes for name, variable in variables(model).items()}


def load_by_bias(
    model: Nemotron, load: Float[Array, "layers E"], *, mtp: bool = False
) -> dict[str, Array]:
    """`Output.router_load` of the trunk, or of the MTP block, under the dotted name of the
    selection bias that balances it: one of all layers of the trunk, one of each of the block's."""
    blocks = model.mtp_block.blocks if mtp else [model.moe] if model.moe is not None else []
    routers = [block.mixer.router for block in blocks if isinstance(block.mixer, LatentMoE)]
    names = {id(variable): name for name, variable in variables(model).items()}
    parts = load if mtp else [load] * len(routers)
    return {names[id(r.selection_bias)]: part for r, part in zip(routers, parts, strict=True)}


def model_shardings(model: Nemotron, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where every parameter lies on a mesh, by dotted name."""
    shapes = {name: leaf.shape for name, leaf in flatten(model).items()}
    return {
        name: parameter_sharding(mesh, axes, shapes[name])
        for name, axes in model_axes(model).items()
    }


def abstract_on(model: Nemotron, mesh: Mesh) -> Nemotron:
    """The model's shapes with where each lies on a mesh."""
    places = model_shardings(model, mesh)
    placed = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
        for name, leaf in flatten(model).items()
    }
    return unflatten(model, placed)


def mesh_of(model: Nemotron) -> Mesh | None:
    """The mesh that is set, or else the one that the model is spread over, if it is of our axes."""
    return own_mesh(model) if current_mesh() is None else current_mesh()


def own_mesh(model: Nemotron) -> Mesh | None:
    """The mesh that the model is spread over, if it is of our axes."""
    place = getattr(model.embedding[...], "sharding", None)
    ours = isinstance(place, NamedSharding) and place.mesh.axis_names == MESH_AXES
    return place.mesh if ours else None


def laid_out(model: Nemotron) -> Nemotron:
    """The model with every parameter where its axes say on its mesh; as it is without one."""
    is_traced = isinstance(model.embedding[...], jax.core.Tracer)
    mesh = None if is_traced else mesh_of(model)
    if mesh is None:
        return model
    places = model_shardings(model, mesh)
    leaves = flatten(model)
    return unflatten(model, {n: jax.device_put(leaf, places[n]) for n, leaf in leaves.items()})


def _dotted(path: tuple) -> str:
    keys = [str(getattr(k, "name", getattr(k, "idx", getattr(k, "key", k)))) for k in path]
    return ".".join(keys[:-1] if keys[-1] == "value" else keys)
