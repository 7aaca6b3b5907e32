"""Runs ComfyUI's own loading code on single files: `python comfyui.py COMFYUI_FOLDER JOBS.json`; without ppcl_ds.

A job `{"file", "inputs", "output", "narrow"}` loads and runs a model: `inputs` is a safetensors file of the forward's
arguments, `output` what the model answers, `narrow` what ComfyUI takes for granted of models of the published width. A
job `{"shapes"}`, a JSON file of names and shapes, says what ComfyUI makes of a file of that size: its class, and which
tensors it would miss or not know.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that ComfyUI imports, and no diffusion transformer runs."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        known = ("torchvision", "torchaudio", "torchsde", "av", "kornia", "spandrel", "comfy_aimdo", "sentencepiece")
        if name.partition(".")[0] in known:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = types.ModuleType(spec.name)

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: Any) -> None:
        pass


def seen(shapes: dict[str, list[int]]) -> dict[str, Any]:
    """What ComfyUI detects in a file of these tensors, and how its model's differ; nothing is allocated."""
    import comfy.model_detection
    import comfy.ops

    tensors = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()}
    found = comfy.model_detection.model_config_from_unet(tensors, "")
    if found is None:
        return {"class": None}
    found.set_inference_dtype(torch.bfloat16, None)
    model = found.get_model(dict(tensors), "", device=torch.device("meta"))
    own = {name: list(tensor.shape) for name, tensor in model.diffusion_model.state_dict().items()}
    given = {name: list(tensor.shape) for name, tensor in found.process_unet_state_dict(dict(tensors)).items()}
    return {
        "class": type(found).__name__,
        "config": {key: value for key, value in found.unet_config.items() if isinstance(value, (int, float, str))},
        "missing": sorted(set(own) - set(given)),
        "unknown": sorted(set(given) - set(own)),
        "shapes": sorted(name for name in set(own) & set(given) if own[name] != given[name]),
    }


@torch.no_grad()
def answered(file: str, inputs: str, narrow: dict[str, Any]) -> torch.Tensor:
    """What ComfyUI's model answers, loaded as its "Load Diffusion Model" does."""
    import comfy.model_detection
    import comfy.sd

    detect = comfy.model_detection.detect_unet_config
    comfy.model_detection.detect_unet_config = lambda *args, **kwargs: detect(*args, **kwargs) | narrow
    try:
        model = comfy.sd.load_diffusion_model(file, model_options={"dtype": torch.float32}).model.diffusion_model
    finally:
        comfy.model_detection.detect_unet_config = detect
    arguments = {key: tensor.item() if tensor.dim() == 0 else tensor for key, tensor in load_file(inputs).items()}
    return model.float()(**arguments, transformer_options={})


def main() -> None:
    """Do the jobs; print a JSON list of what was seen or went wrong."""
    folder, jobs = sys.argv[1:]
    sys.meta_path.append(_Absent())  # asked last: what is installed is used
    sys.path.insert(0, folder)
    sys.argv = ["comfyui", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    answers = []
    for job in json.loads(Path(jobs).read_text()):
        try:
            if "shapes" in job:
                answers.append(seen(json.loads(Path(job["shapes"]).read_text())))
            else:
                save_file({"output": answered(job["file"], job["inputs"], job["narrow"]).contiguous()}, job["output"])
                answers.append({})
        except Exception as fault:
            answers.append({"fault": f"{type(fault).__name__}: {fault}"})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
