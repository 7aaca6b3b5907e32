"""Ideogram 4: a schedule of guidance stands in the way of its scale."""

from ppcl_ds.teacher.own import Own

CLASSES = ("Ideogram4Transformer2DModel",)
OWN = Own(options={"guidance_schedule": None})
