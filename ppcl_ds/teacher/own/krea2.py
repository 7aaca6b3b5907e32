"""Krea 2: guidance is off at zero."""

from ppcl_ds.teacher.own import Own

CLASSES = ("Krea2Transformer2DModel",)
OWN = Own(options={"guidance_scale": 0.0})
