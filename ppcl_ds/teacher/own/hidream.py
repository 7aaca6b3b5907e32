"""HiDream: a layer of the text encoder is joined to the text before each block."""

from ppcl_ds.teacher.own import Own

CLASSES = ("HiDreamImageTransformer2DModel",)
_WHY = "what a layer of the text encoder says is joined to the tokens before each block, and cut off behind it"
OWN = Own(refused=_WHY)
