"""Bria FIBO: a layer of the text encoder is put into the text before each block."""

from ppcl_ds.teacher.own import Own

CLASSES = ("BriaFiboTransformer2DModel",)
_WHY = "each block reads a layer of the text encoder, and the pipeline counts these layers from the last block"
OWN = Own(refused=_WHY)
