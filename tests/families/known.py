"""What no program finds out of diffusers' transformer classes: what people call them, and why some are not tried.

A class that is missing here is called after itself, and is tried if it has a tiny model.
"""

from __future__ import annotations

import re

FAMILIES: dict[str, str] = {
    "AceStepTransformer1DModel": "ACE-Step",
    "AnyFlowFARTransformer3DModel": "AnyFlow FAR",
    "AnyFlowTransformer3DModel": "AnyFlow",
    "AuraFlowTransformer2DModel": "AuraFlow",
    "BriaFibo2Transformer2DModel": "Bria FIBO 2",
    "BriaFiboTransformer2DModel": "Bria FIBO",
    "BriaTransformer2DModel": "Bria 3.2",
    "ChronoEditTransformer3DModel": "ChronoEdit",
    "CogVideoXTransformer3DModel": "CogVideoX",
    "CogView3PlusTransformer2DModel": "CogView3+",
    "CogView4Transformer2DModel": "CogView4",
    "ConsisIDTransformer3DModel": "ConsisID",
    "Cosmos3OmniTransformer": "Cosmos 3",
    "CosmosTransformer3DModel": "Cosmos 1 to 2.5",
    "DiTTransformer2DModel": "DiT",
    "DreamLiteTransformer2DModel": "DreamLite",
    "EasyAnimateTransformer3DModel": "EasyAnimate",
    "ErnieImageTransformer2DModel": "ERNIE-Image",
    "Flux2Transformer2DModel": "FLUX.2",
    "Flux3Transformer2DModel": "FLUX.3",
    "FluxControlNetModel": "FLUX.1",
    "FluxMultiControlNetModel": "FLUX.1",
    "FluxTransformer2DModel": "FLUX.1",
    "GlmImageTransformer2DModel": "GLM-Image",
    "HiDreamImageTransformer2DModel": "HiDream",
    "HunyuanDiT2DControlNetModel": "HunyuanDiT",
    "HunyuanDiT2DModel": "HunyuanDiT",
    "HunyuanDiT2DMultiControlNetModel": "HunyuanDiT",
    "HunyuanImageTransformer2DModel": "HunyuanImage 2.1",
    "HunyuanVideo15Transformer3DModel": "HunyuanVideo 1.5",
    "HunyuanVideoFramepackTransformer3DModel": "FramePack",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "Ideogram4Transformer2DModel": "Ideogram 4",
    "JoyImageEditPlusTransformer3DModel": "JoyImage Edit Plus",
    "JoyImageEditTransformer3DModel": "JoyImage Edit",
    "Kandinsky5Transformer3DModel": "Kandinsky 5",
    "Kandinsky6SRTransformer3DModel": "Kandinsky 6 SR",
    "Kandinsky6Transformer3DModel": "Kandinsky 6",
    "Krea2Transformer2DModel": "Krea 2",
    "LTX2VideoTransformer3DModel": "LTX-2",
    "LTXVideoTransformer3DModel": "LTX",
    "LongCatAudioDiTTransformer": "LongCat-Audio",
    "LongCatImageTransformer2DModel": "LongCat-Image",
    "Lumina2Transformer2DModel": "Lumina 2",
    "LuminaNextDiT2DModel": "Lumina-Next",
    "MiniMaxH3Transformer3DModel": "MiniMax H3",
    "MiniMaxMusic3RVQDepthDecoder": "MiniMax Music 3",
    "MiniMaxMusic3Transformer1DModel": "MiniMax Music 3",
    "MotifVideoTransformer3DModel": "Motif",
    "NucleusMoEImageTransformer2DModel": "Nucleus-Image",
    "OmniGenTransformer2DModel": "OmniGen",
    "OvisImageTransformer2DModel": "Ovis-Image",
    "PRXTransformer2DModel": "PRX",
    "PixArtTransformer2DModel": "PixArt",
    "PriorTransformer": "unCLIP prior",
    "QwenImage21Transformer2DModel": "Qwen-Image 2.1",
    "QwenImageControlNetModel": "Qwen-Image",
    "QwenImageMultiControlNetModel": "Qwen-Image",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "RFD4ProteinaTransformer": "RFD4 Proteina",
    "SanaVideoTransformer3DModel": "Sana Video",
    "SanaWMLTX2RefinerTransformer3DModel": "Sana WM refiner",
    "SanaWMTransformer3DModel": "Sana WM",
    "SkyReelsV2Transformer3DModel": "SkyReels-V2",
    "StableAudio3DiTModel": "Stable Audio 3",
    "StableAudioDiTModel": "Stable Audio 1",
    "T5FilmDecoder": "Spectrogram Diffusion",
    "Transformer2DModel": "U-Nets",
    "TransformerTemporalModel": "U-Nets",
    "WanAnimate2Transformer3DModel": "Wan Animate 2",
    "WanAnimateTransformer3DModel": "Wan Animate",
    "WanTransformer3DModel": "Wan",
    "WanVACETransformer3DModel": "Wan VACE",
    "ZImageControlNetModel": "Z-Image",
    "ZImageTransformer2DModel": "Z-Image",
}

_IN_A_U_NET = "no diffusion transformer by itself: a part of U-Nets, one or a few blocks at each of their levels"

UNTRIED: dict[str, str] = {
    "DreamLiteTransformer2DModel": _IN_A_U_NET,
    "MiniMaxMusic3RVQDepthDecoder": "no diffusion transformer: it makes tokens one after another",
    "RFD4ProteinaTransformer": "nobody has tried it: it makes proteins",
    "T5FilmDecoder": "nobody has tried it: it makes spectrograms of notes, in a pipeline that diffusers has given up",
    "Transformer2DModel": _IN_A_U_NET,
    "TransformerTemporalModel": _IN_A_U_NET,
    "WanAnimate2Transformer3DModel": "nobody has tried it: its code names block 9, and calls hand on keys and values",
}


def family_of(class_name: str) -> str:
    """What people call a class."""
    own = re.sub(r"(Multi)?ControlNetModel$|(Transformer|DiT)?([123]D)?(Model)?$", "", class_name)
    return FAMILIES.get(class_name, own)


def untried(class_name: str) -> str:
    """Why a class without a tiny model has none."""
    if class_name.endswith("ControlNetModel"):
        return "no teacher by itself: it answers another transformer"
    return UNTRIED.get(class_name, "nobody has tried it")
