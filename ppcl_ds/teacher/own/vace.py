"""Wan VACE: hints of the control blocks are added behind the blocks that a key lists."""

from ppcl_ds.teacher.own import Own

CLASSES = ("WanVACETransformer3DModel",)
OWN = Own(behind={"vace_layers": "blocks"})
