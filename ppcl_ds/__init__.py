"""Shrink a diffusion transformer into a family of smaller ones, on DeepSpeed (PPCL, arXiv 2511.16156)."""
