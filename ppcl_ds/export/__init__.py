"""From a checkpoint to model folders, single files and LoRAs that others load."""

SHARD_SIZE = "5GB"
"""Largest weights file unless another is asked for; diffusers' own default is twice that."""
