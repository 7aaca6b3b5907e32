"""LongCat-Image: the pipeline would write a prompt anew."""

from ppcl_ds.teacher.own import Own

CLASSES = ("LongCatImageTransformer2DModel",)
OWN = Own(options={"enable_prompt_rewrite": False})
