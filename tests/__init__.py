from tests.vision import make_importable

make_importable()
