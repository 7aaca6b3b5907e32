"""Where the recipes, plans, scripts and DeepSpeed files lie that ship with the package."""

from pathlib import Path


def shipped(name: str) -> Path:
    """A file or folder, such as `recipes/digits.yaml`: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).exists() else package.parent / name
