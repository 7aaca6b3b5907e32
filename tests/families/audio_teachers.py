"""Tiny teachers that make audio."""

from __future__ import annotations

from tests.families.tiny import (
    MASK,
    SHARES,
    TEXT,
    TinyTeacher,
    noise,
    ones,
)

TEACHERS: dict[str, TinyTeacher] = {
    "ace_step": TinyTeacher(
        "AceStepTransformer1DModel",
        dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            sliding_window=2,
        ),
        dict(
            hidden_states=noise(2, 16, 8),
            timestep=SHARES,
            timestep_r=SHARES,
            encoder_hidden_states=noise(2, 5, 32),
            context_latents=noise(2, 16, 16),
        ),
    ),
    "stable_audio": TinyTeacher(
        "StableAudioDiTModel",
        dict(
            sample_size=8,
            in_channels=4,
            num_layers=5,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            out_channels=4,
            cross_attention_dim=16,
            time_proj_dim=8,
            global_states_input_dim=8,
            cross_attention_input_dim=16,
        ),
        dict(
            hidden_states=noise(2, 4, 8),
            timestep=SHARES,
            encoder_hidden_states=TEXT,
            global_hidden_states=noise(2, 1, 8),
            rotary_embedding=(noise(9, 8), noise(9, 8, seed=1)),
        ),
    ),
    "longcat_audio": TinyTeacher(
        "LongCatAudioDiTTransformer",
        dict(dit_dim=32, dit_depth=5, dit_heads=2, dit_text_dim=16, latent_dim=4, text_conv=False),
        dict(
            hidden_states=noise(2, 8, 4),
            encoder_hidden_states=TEXT,
            encoder_attention_mask=MASK.bool(),
            attention_mask=ones(2, 8).bool(),
            timestep=SHARES,
        ),
    ),
    "minimax_music3": TinyTeacher(
        "MiniMaxMusic3Transformer1DModel",
        dict(
            in_channels=4,
            condition_dim=16,
            num_layers=5,
            num_attention_heads=2,
            attention_head_dim=16,
            ff_inner_dim=32,
            rotary_dim=8,
            fourier_embedding_dim=8,
        ),
        dict(hidden_states=noise(2, 4, 8), encoder_hidden_states=noise(2, 8, 16), timestep=SHARES),
    ),
}
