"""LTX-2: sound is noised beside the clip; connectors stand between the text encoder and the transformer."""

from ppcl_ds.teacher.own import Own

CLASSES = ("LTX2VideoTransformer3DModel",)
_OFF = {"audio_guidance_scale": 1.0, "stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0}
_OPTIONS = {**_OFF, "audio_modality_scale": 1.0}
OWN = Own(real=("connectors",), options=_OPTIONS, noised=("prepare_audio_latents",))
