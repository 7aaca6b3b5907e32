"""Every transformer family of diffusers, tiny: its teachers, and its whole pipelines."""
