"""Sana, Sana-Sprint, PixArt, HunyuanDiT: text that blocks look up; and DiT, which knows classes instead."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.families.pipelines import family
from tests.families.pipelines.parts import DRAW, WIDTH, deep_vae, gemma2, image_vae, t5, transformer
from tests.families.pipelines.words import bert_tokenizer, gemma_tokenizer, t5_tokenizer

_DRAW = DRAW | {"use_resolution_binning": False, "max_sequence_length": 32}
_SANA = _DRAW | {"height": 32, "width": 32, "complex_human_instruction": None}


@family("sana", _SANA | {"guidance_scale": 1.0})
def sana() -> Any:
    tokenizer = gemma_tokenizer()
    return diffusers.SanaPipeline(
        transformer=transformer("sana"),
        vae=deep_vae(),
        text_encoder=gemma2(tokenizer),
        tokenizer=tokenizer,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


@family("sana_sprint", _SANA | {"guidance_scale": 4.5})
def sana_sprint() -> Any:
    tokenizer = gemma_tokenizer()
    return diffusers.SanaSprintPipeline(
        transformer=transformer("sana_sprint"),
        vae=deep_vae(),
        text_encoder=gemma2(tokenizer),
        tokenizer=tokenizer,
        scheduler=diffusers.SCMScheduler(prediction_type="trigflow"),
    )


@family("pixart", _DRAW | {"guidance_scale": 1.0})
def pixart_sigma() -> Any:
    return diffusers.PixArtSigmaPipeline(**_pixart())


@family("pixart_alpha", _DRAW | {"guidance_scale": 1.0})
def pixart_alpha() -> Any:
    return diffusers.PixArtAlphaPipeline(**_pixart())


def _pixart() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "transformer": transformer("pixart"),
        "vae": image_vae(shift_factor=None),
        "text_encoder": t5(tokenizer),
        "tokenizer": tokenizer,
        "scheduler": diffusers.DPMSolverMultistepScheduler(),
    }


@family("dit", {"class_labels": [1], "guidance_scale": 1.0})
def dit() -> Any:
    return diffusers.DiTPipeline(
        transformer=transformer("dit"), vae=image_vae(shift_factor=None), scheduler=diffusers.DDIMScheduler()
    )


@family("hunyuan_dit", DRAW | {"use_resolution_binning": False, "guidance_scale": 1.0})
def hunyuan_dit() -> Any:
    words, pieces = bert_tokenizer(), t5_tokenizer()
    size: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return diffusers.HunyuanDiTPipeline(
        transformer=transformer("hunyuan_dit", text_len=77, text_len_t5=256),
        vae=image_vae(shift_factor=None),
        text_encoder=transformers.BertModel(transformers.BertConfig(vocab_size=len(words), hidden_size=WIDTH, **size)),
        tokenizer=words,
        text_encoder_2=t5(pieces),
        tokenizer_2=pieces,
        scheduler=diffusers.DDPMScheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
