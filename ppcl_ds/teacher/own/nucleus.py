"""Nucleus-Image: how many tokens an expert takes is listed block by block."""

from ppcl_ds.teacher.own import Own

CLASSES = ("NucleusMoEImageTransformer2DModel",)
OWN = Own(entries={"capacity_factors": ("transformer_blocks",)})
