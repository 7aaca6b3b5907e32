"""Z-Image: guidance is off at zero."""

from ppcl_ds.teacher.own import Own

CLASSES = ("ZImageTransformer2DModel",)
OWN = Own(options={"guidance_scale": 0.0})
