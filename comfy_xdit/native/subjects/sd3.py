"""SD3 and SD3.5."""

from __future__ import annotations

from comfy_xdit.native.subject import Call, Config, Subject, rand, times


def calls(config: Config) -> dict[str, Call]:
    def base(batch: int) -> Call:
        call = {"x": rand(batch, 16, 11, 13), "timestep": 1000 * times(0.7, 0.3)[:batch]}
        return {**call, "context": rand(batch, 9, 48), "y": rand(batch, config["adm_in_channels"])}

    return {"text": base(1), "batch 2": base(2)}


EMBEDDER = {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 320}}
CONFIG: Config = {"in_channels": 16, "patch_size": 2, "depth": 5, "input_size": None, "adm_in_channels": 32}
CONFIG |= {"context_embedder_config": EMBEDDER, "pos_embed_max_size": 32, "num_patches": 1024}
CONFIG |= {"pos_embed_scaling_factor": None, "qk_norm": None, "x_block_self_attn_layers": []}
SMALL = ("depth", "context_embedder_config", "pos_embed_max_size", "num_patches", "x_block_self_attn_layers")


def subject(**config: object) -> Subject:
    return Subject(kind="SD3", config={**CONFIG, **config}, small=SMALL, calls=calls)


SUBJECTS = (subject(), subject(qk_norm="rms", x_block_self_attn_layers=[0, 1]))
