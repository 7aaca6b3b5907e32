"""From a checkpoint to model folders, single files and LoRAs that others load."""

from pathlib import Path

from ppcl_ds.errors import UserError

SHARD_SIZE = "5GB"
"""Largest weights file unless another is asked for; diffusers' own default is twice that."""


def check_lora(lora: Path) -> None:
    """Refuse what is no safetensors file, nor a folder of some.

    Raises:
        UserError: it is something else, or nothing.
    """
    if lora.is_dir():
        if not any(lora.glob("*.safetensors")):
            raise UserError(f"LoRA folder {lora}: holds no .safetensors file")
    elif not lora.is_file():
        raise UserError(f"LoRA {lora}: there is no such file")
    elif lora.suffix != ".safetensors":
        raise UserError(f"LoRA {lora}: only .safetensors files are read; a pickle file could run anything")
