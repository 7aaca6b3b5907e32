"""Stable Audio: seconds are embedded outside the transformer."""

from ppcl_ds.teacher.own import Own

CLASSES = ("StableAudioDiTModel", "StableAudio3DiTModel")
OWN = Own(real=("projection_model", "duration_embedder"))
