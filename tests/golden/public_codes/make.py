"""Directories of a small model whose matrices public tools packed, and the floats of their codes.

    python tests/golden/public_codes/make.py

in an environment of its own: torch 2.13, transformers 5.23, nvidia-modelopt 0.47, torchao 0.18,
compressed-tensors 0.20. Model-Optimizer quantises and exports the whole model; the packing
functions of the two others are given its matrices, and what they return is written under the names
of their layouts. `expected.json` holds every 61st float that each tool itself makes of its codes.
Nothing here imports this project.
"""

import copy
import json
import pathlib
import shutil

import torch
from compressed_tensors.compressors import NVFP4PackedCompressor, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import NVFP4A16
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

HERE = pathlib.Path(__file__).parent
SOURCE = HERE.parent / "public" / "dt_limit" / "checkpoint"
STRIDE = 61


def floats():
    """The model's tensors as they are stored beside codes, and its linears in float32."""
    tensors = load_file(SOURCE / "model.safetensors")
    linears = {n: t.float() for n, t in tensors.items() if n.endswith("_proj.weight")}
    rest = {n: t.to(torch.bfloat16) for n, t in tensors.items() if n not in linears}
    return rest, linears


def write(name, tensors, recipe):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    keys = json.loads((SOURCE / "config.json").read_text())
    keys |= {"dtype": "bfloat16", "quantization_config": recipe}
    (folder / "config.json").write_text(json.dumps(keys, indent=2) + "\n")


def sampled(matrices):
    return {n: [float(v) for v in m.float().flatten()[::STRIDE]] for n, m in matrices.items()}


def modelopt():
    """The whole model by Model-Optimizer."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.bfloat16)
    ids = torch.randint(3, 64, (2, 16))
    model = mtq.quantize(model, copy.deepcopy(mtq.NVFP4_DEFAULT_CFG), lambda m: m(ids))
    folder = HERE / "modelopt"
    shutil.rmtree(folder, ignore_errors=True)
    export_hf_checkpoint(model, export_dir=str(folder))
    stored, found = load_file(folder / "model.safetensors"), {}
    for name in (n for n, t in stored.items() if t.dtype == torch.uint8):
        codes = stored[name]
        shape = (codes.shape[0], 2 * codes.shape[1])
        scales = {"scale": stored[f"{name}_scale"], "double_scale": stored[f"{name}_scale_2"]}
        own = NVFP4QTensor(shape, torch.float32, codes)
        found[name] = own.dequantize(torch.float32, block_sizes={-1: 16}, **scales)
    return found


def torchao():
    """Each linear by torchao, in Model-Optimizer's layout."""
    tensors, linears = floats()
    found = {}
    for name, matrix in linears.items():
        scale = per_tensor_amax_to_scale(matrix.abs().max())
        packed = NVFP4Tensor.to_nvfp4(matrix, per_tensor_scale=scale, is_swizzled_scales=False)
        tensors[name] = packed.qdata
        tensors[f"{name}_scale"] = packed.scale.view(matrix.shape[0], -1)
        tensors[f"{name}_scale_2"] = packed.per_tensor_scale.float().reshape(())
        found[name] = packed.dequantize(torch.float32)
    recipe = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "group_size": 16}
    write("torchao", tensors, recipe)
    return found


def compressed_tensors():
    """Each linear by compressed-tensors, in its own layout."""
    tensors, linears = floats()
    scheme = QuantizationScheme(targets=["Linear"], **NVFP4A16)
    found = {}
    for name, matrix in linears.items():
        blocks = matrix.view(matrix.shape[0], -1, 16)
        whole = generate_gparam(matrix.min(), matrix.max())
        scale, _ = calculate_qparams(
            blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=whole
        )
        given = {"weight": matrix, "weight_scale": scale, "weight_global_scale": whole}
        packed = NVFP4PackedCompressor.compress(given, scheme)
        module = name.removesuffix("weight")
        tensors |= {module + part: tensor for part, tensor in packed.items()}
        codes = unpack_fp4_from_uint8(packed["weight_packed"], *matrix.shape, torch.float32)
        scales = {"scale": packed["weight_scale"].float(), "global_scale": whole}
        found[name] = dequantize(codes, args=scheme.weights, dtype=torch.float32, **scales)
    group = {"targets": ["Linear"], "weights": json.loads(scheme.weights.model_dump_json())}
    recipe = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    write("compressed_tensors", tensors, recipe | {"config_groups": {"group_0": group}})
    return found


if __name__ == "__main__":
    expected = {f.__name__: sampled(f()) for f in (modelopt, torchao, compressed_tensors)}
    text = json.dumps({"stride": STRIDE, "values": expected})
    (HERE / "expected.json").write_text(text + "\n")
