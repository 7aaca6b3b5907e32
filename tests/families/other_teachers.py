"""Tiny teachers whose stock pipeline is modular, needs packages that tests do without, or draws no picture."""

from __future__ import annotations

import torch

from tests.families.tiny import CLIP, LATENTS, MASK, SHARES, STEPS, TEXT, TIMES, TinyTeacher, noise, ones
from tests.families.video_teachers import COGVIDEOX, WAN_CONFIG

TEACHERS: dict[str, TinyTeacher] = {
    "skyreels_v2": TinyTeacher("SkyReelsV2Transformer3DModel", WAN_CONFIG, CLIP | dict(timestep=STEPS)),
    "prx": TinyTeacher(
        "PRXTransformer2DModel",
        dict(in_channels=4, context_in_dim=16, hidden_size=32, num_heads=2, depth=5, axes_dim=[8, 8]),
        LATENTS | dict(timestep=SHARES, attention_mask=MASK),
    ),
    "consisid": TinyTeacher(
        "ConsisIDTransformer3DModel",
        COGVIDEOX
        | dict(
            num_layers=6,
            is_train_face=True,
            cross_attn_interval=3,
            cross_attn_dim_head=8,
            cross_attn_num_heads=2,
            LFE_id_dim=8,
            LFE_vit_dim=8,
            LFE_depth=5,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=1,
            LFE_num_querie=1,
            LFE_output_dim=21,
            LFE_ff_mult=1,
            LFE_num_scale=1,
        ),
        dict(
            hidden_states=noise(2, 3, 4, 4, 4),
            encoder_hidden_states=TEXT,
            timestep=STEPS,
            id_cond=noise(2, 8),
            id_vit_hidden=[noise(2, 8, 8)],
        ),
    ),
    "unclip_prior": TinyTeacher(
        "PriorTransformer",
        dict(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=5,
            embedding_dim=16,
            num_embeddings=5,
            additional_embeddings=4,
        ),
        dict(
            hidden_states=noise(2, 16),
            timestep=STEPS,
            proj_embedding=noise(2, 16, seed=1),
            encoder_hidden_states=TEXT,
            attention_mask=MASK.bool(),
        ),
    ),
    "minimax_h3": TinyTeacher(
        "MiniMaxH3Transformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=32,
            num_layers=5,
            ffn_dim=48,
            in_channels=2,
            audio_in_channels=4,
            text_dim=16,
            freq_dim=16,
            time_embed_hidden_dim=16,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        dict(
            hidden_states=noise(1, 4, 8),
            audio_hidden_states=noise(1, 3, 4),
            encoder_hidden_states=noise(1, 5, 16),
            timestep=SHARES[:1],
            timestep_indices=torch.zeros(12).long(),
            token_tags=torch.tensor([1] * 5 + [0] * 4 + [2] * 3),
            position_ids=torch.arange(12)[:, None].expand(12, 3),
            text_indices=torch.arange(5),
            video_indices=torch.arange(5, 9),
            audio_indices=torch.arange(9, 12),
        ),
    ),
    "sana_wm_refiner": TinyTeacher(
        "SanaWMLTX2RefinerTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=5,
            caption_channels=16,
        ),
        dict(
            hidden_states=noise(2, 8, 4),
            encoder_hidden_states=TEXT,
            timestep=TIMES[:, None].expand(2, 8),
            video_rotary_emb=(noise(2, 8, 32), noise(2, 8, 32, seed=1)),
            encoder_attention_mask=MASK,
        ),
    ),
    "sana_wm": TinyTeacher(
        "SanaWMTransformer3DModel",
        dict(
            in_channels=4,
            num_layers=9,
            hidden_size=32,
            num_attention_heads=2,
            linear_head_dim=16,
            chunk_plucker_post_attn_blocks=2,
            caption_channels=16,
        ),
        dict(
            hidden_states=noise(2, 4, 3, 4, 4),
            timestep=STEPS[:, None, None].expand(2, 1, 3),
            encoder_hidden_states=TEXT[:, None],
            encoder_attention_mask=ones(2, 5),
        ),
    ),
}
