"""Published pipelines as folders of configurations: their sizes are real, their tokenizers the tests' own, no weights.

Sizes are those of the `config.json` files that the models' authors published on the Hugging Face Hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import FLUX_1, QWEN_IMAGE
from tests.families.pipelines import PIPELINES

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "latent_channels": 16,
}
_VIDEO_VAE = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
_QWEN_SHIFT = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}
_FLUX_SHIFT = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def _decoder(width: int, between: int, layers: int, heads: int, groups: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": between, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": groups}


_QWEN_VL = {
    "text_config": _decoder(3584, 18944, 28, 28, 4)
    | {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}},
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
}
_QWEN = {"transformer": QWEN_IMAGE, "vae": _VIDEO_VAE, "text_encoder": _QWEN_VL, "scheduler": _QWEN_SHIFT}
_WAN = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "rope_max_seq_len": 1024,
}

PUBLISHED: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "qwen_image": ("qwen_image", _QWEN),
    "qwen_image_edit": ("qwen_edit", _QWEN),
    "flux_1_dev": (
        "flux",
        {
            "transformer": FLUX_1,
            "vae": _VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
            "text_encoder": _CLIP_L,
            "text_encoder_2": _T5_XXL,
            "scheduler": _FLUX_SHIFT,
        },
    ),
    "flux_2_dev": (
        "flux2",
        {
            "transformer": {
                "in_channels": 128,
                "num_layers": 8,
                "num_single_layers": 48,
                "attention_head_dim": 128,
                "num_attention_heads": 48,
                "joint_attention_dim": 15360,
                "axes_dims_rope": [32, 32, 32, 32],
                "mlp_ratio": 3.0,
            },
            "vae": _VAE | {"latent_channels": 32},
            "text_encoder": {"text_config": _decoder(5120, 32768, 40, 32, 8) | {"head_dim": 128}},
            "scheduler": _FLUX_SHIFT,
        },
    ),
    "z_image": (
        "z_image",
        {
            "transformer": {
                "in_channels": 16,
                "dim": 3840,
                "n_layers": 30,
                "n_refiner_layers": 2,
                "n_heads": 30,
                "n_kv_heads": 30,
                "cap_feat_dim": 2560,
                "axes_dims": [32, 48, 48],
                "axes_lens": [1536, 512, 512],
            },
            "vae": _VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
            "text_encoder": _decoder(2560, 9728, 36, 32, 8) | {"head_dim": 128},
            "scheduler": {"shift": 6.0},
        },
    ),
    "sd_3_5_large": (
        "sd3",
        {
            "transformer": {
                "sample_size": 128,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 38,
                "attention_head_dim": 64,
                "num_attention_heads": 38,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 2432,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 192,
                "dual_attention_layers": [],
            },
            "vae": _VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
            "text_encoder": _CLIP_L | {"projection_dim": 768},
            "text_encoder_2": _CLIP_G | {"projection_dim": 1280},
            "text_encoder_3": _T5_XXL,
            "scheduler": {"shift": 3.0},
        },
    ),
    "wan_2_2": (
        "wan22",
        {
            "transformer": _WAN,
            "transformer_2": _WAN,
            "vae": _VIDEO_VAE | {"scale_factor_spatial": 8, "scale_factor_temporal": 4},
            "text_encoder": _T5_XXL,
            "scheduler": {"flow_shift": 3.0},
        },
    ),
}
"""Name of the recipe -> a tiny pipeline of the same class, and what differs from it in each part's configuration."""


def write_pipeline(name: str, folder: Path) -> None:
    """A pipeline folder with the published sizes and without weights."""
    tiny, parts = PUBLISHED[name]
    PIPELINES[tiny].make().save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    for part, changes in parts.items():
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.write_text(json.dumps(_changed(json.loads(path.read_text()), changes)))


def _changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration with other sizes, and without lists of an entry a layer, which its class makes by itself."""
    nested = {key: _changed(config.get(key, {}), value) for key, value in changes.items() if isinstance(value, dict)}
    return {key: value for key, value in config.items() if key != "layer_types"} | changes | nested
