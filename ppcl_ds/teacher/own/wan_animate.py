"""Wan Animate: the class counts blocks to know where the face goes in."""

from ppcl_ds.teacher.own import Own

CLASSES = ("WanAnimateTransformer3DModel",)
OWN = Own(refused="the face is added behind every fifth block, by its number")
