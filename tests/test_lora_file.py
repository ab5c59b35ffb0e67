"""LoRA files under the names that trainers give, as patches of a Flux."""

import pytest
import torch
from safetensors.torch import save_file

from comfy_xdit.models import FAMILIES
from comfy_xdit.models.lora_file import read_lora
from comfy_xdit.weights.patches import apply_patches
from comfy_xdit.weights.slices import Shape

HIDDEN, RANK = 8, 2
INFOS = {
    "img_in.weight": Shape((HIDDEN, 16)),
    "vector_in.in_layer.weight": Shape((HIDDEN, 4)),
    "double_blocks.0.img_mod.lin.weight": Shape((6 * HIDDEN, HIDDEN)),
    "double_blocks.0.img_attn.qkv.weight": Shape((3 * HIDDEN, HIDDEN)),
    "single_blocks.0.modulation.lin.weight": Shape((3 * HIDDEN, HIDDEN)),
    "single_blocks.0.linear1.weight": Shape((7 * HIDDEN, HIDDEN)),
}


def write(folder, stem, rows, *, endings=(".lora_up.weight", ".lora_down.weight"), alpha=None):
    up, down = torch.randn(rows, RANK), torch.randn(RANK, HIDDEN)
    tensors = {stem + endings[0]: up, stem + endings[1]: down}
    if alpha is not None:
        tensors[stem + ".alpha"] = torch.tensor(alpha)
    save_file(tensors, folder / "lora.safetensors")
    return str(folder / "lora.safetensors"), up @ down


@pytest.mark.parametrize(
    "stem, endings",
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", (".lora_up.weight", ".lora_down.weight")),
        ("diffusion_model.double_blocks.0.img_attn.qkv", (".lora_B.weight", ".lora_A.weight")),
        ("double_blocks.0.img_attn.qkv", (".lora.up.weight", ".lora.down.weight")),
    ],
)
def test_comfyui_layout(tmp_path, stem, endings):
    path, change = write(tmp_path, stem, 3 * HIDDEN, endings=endings, alpha=1.0)
    (patch,) = read_lora(path, FAMILIES["flux"], INFOS, strength=0.5)
    assert patch.key == "double_blocks.0.img_attn.qkv.weight" and patch.offset is None
    result = apply_patches(torch.zeros(3 * HIDDEN, HIDDEN), [patch])
    torch.testing.assert_close(result, 0.5 * change / RANK)


@pytest.mark.parametrize(
    "stem, key, rows, start",
    [
        ("transformer.transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv.weight", HIDDEN, HIDDEN),
        (
            "transformer.single_transformer_blocks.0.proj_mlp",
            "single_blocks.0.linear1.weight",
            4 * HIDDEN,
            3 * HIDDEN,
        ),
    ],
)
def test_diffusers_layout_lands_in_the_fused_weight(tmp_path, stem, key, rows, start):
    path, change = write(tmp_path, stem, rows, endings=(".lora_B.weight", ".lora_A.weight"))
    (patch,) = read_lora(path, FAMILIES["flux"], INFOS)
    assert patch.key == key
    result = apply_patches(torch.zeros(INFOS[key].shape), [patch])
    torch.testing.assert_close(result[start : start + rows], change)
    assert result.count_nonzero() == change.count_nonzero()


def test_a_lora_of_another_model_is_refused(tmp_path):
    path, _ = write(tmp_path, "lora_unet_input_blocks_1_1_proj_in", HIDDEN)
    with pytest.raises(ValueError, match=r"no LoRA for Flux\.1 \(its first key: lora_unet_input_blocks"):
        read_lora(path, FAMILIES["flux"], INFOS)


def test_half_a_layer_is_refused(tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"
    save_file({name: torch.zeros(3 * HIDDEN, RANK)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"is there but no .*lora_down.weight; the file is incomplete"):
        read_lora(str(tmp_path / "lora.safetensors"), FAMILIES["flux"], INFOS)
