"""Published width-pruned Qwen-Images compute in our classes what they compute in their authors'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import ppcl_ds
from ppcl_ds.errors import UserError
from ppcl_ds.export.published import import_published
from tests.conftest import TEACHERS, command

CONFIG = TEACHERS["qwen"][1] | {"num_layers": 7}
C = 32
CASES = {
    "two groups": {"single_stream_index": [2, 3, 6], "ffn_proj_index": [0, 3, 5], "ehs_proj_index": [3]},
    "jumps inside and at the end": {
        "single_stream_index": [1, 4, 5],
        "ffn_proj_index": [5, 2],
        "ehs_proj_index": [1, 5],
    },
    "feed-forwards alone": {"single_stream_index": [], "ffn_proj_index": [1], "ehs_proj_index": []},
}


class Published(nn.Module):
    """Their model by its description: a stock model around blocks that are written out here."""

    def __init__(self, lists: dict[str, list[int]]) -> None:
        super().__init__()
        self.lists = lists
        self.stock: Any = diffusers.QwenImageTransformer2DModel(**CONFIG).eval()
        self.extra: Any = nn.ModuleDict()
        for block in range(CONFIG["num_layers"]):
            single, linear = block in lists["single_stream_index"], block in lists["ffn_proj_index"]
            names = ["txt_proj"] * single + ["ehs_proj"] * (block in lists["ehs_proj_index"])
            names += ["img_ffn_proj"] * linear + ["txt_ffn_proj"] * (linear and not single)
            self.extra[str(block)] = nn.ModuleDict({name: nn.Linear(C, C) for name in names})

    def checkpoint(self) -> dict[str, Tensor]:
        """The state dict as theirs is stored."""
        tensors = {}
        for key, tensor in self.stock.state_dict().items():
            parts = key.split(".")
            block = int(parts[1]) if parts[0] == "transformer_blocks" else -1
            single, linear = block in self.lists["single_stream_index"], block in self.lists["ffn_proj_index"]
            if (single and parts[2].startswith("txt_")) or (linear and parts[2].endswith("_mlp")):
                continue
            half = linear and parts[2].endswith("_mod")
            tensors[key] = (tensor[: 3 * C] if half else tensor).clone()
        extra = {f"transformer_blocks.{key}": tensor.clone() for key, tensor in self.extra.state_dict().items()}
        return tensors | extra

    def block(self, number: int, image: Tensor, text: Tensor, modulated: Tensor, temb: Tensor, rope: Any) -> Any:
        """One block: image, text and the modulated text that later blocks read."""
        block, extra = self.stock.transformer_blocks[number], self.extra[str(number)]
        single, linear = number in self.lists["single_stream_index"], number in self.lists["ffn_proj_index"]
        (shift, scale, gate), (shift2, scale2, gate2) = (
            (p[:, None] for p in block.img_mod(temb).chunk(6, -1)[a:b]) for a, b in [(0, 3), (3, 6)]
        )
        if single:
            attended = extra["txt_proj"](modulated) + modulated
        else:
            t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = (
                p[:, None] for p in block.txt_mod(temb).chunk(6, -1)
            )
            modulated = attended = F.layer_norm(text, (C,), eps=1e-6) * (1 + t_scale) + t_shift
        seen = F.layer_norm(image, (C,), eps=1e-6) * (1 + scale) + shift
        image_out, text_out = block.attn(
            hidden_states=seen, encoder_hidden_states=attended, encoder_hidden_states_mask=None, image_rotary_emb=rope
        )
        image = image + gate * image_out
        if linear:
            image = image + extra["img_ffn_proj"](image)
        else:
            image = image + gate2 * block.img_mlp(F.layer_norm(image, (C,), eps=1e-6) * (1 + scale2) + shift2)
        if single:
            text = text + extra["ehs_proj"](text) if "ehs_proj" in extra else text
            return image, text, modulated
        text = text + t_gate * text_out
        if linear:
            return image, text + extra["txt_ffn_proj"](text), modulated
        return (
            image,
            text + t_gate2 * block.txt_mlp(F.layer_norm(text, (C,), eps=1e-6) * (1 + t_scale2) + t_shift2),
            modulated,
        )

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, img_shapes: Any
    ) -> Tensor:
        stock = self.stock
        image, text = stock.img_in(hidden_states), stock.txt_in(stock.txt_norm(encoder_hidden_states))
        temb = stock.time_text_embed(timestep, image)
        rope = stock.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=image.device)
        modulated = text
        for number in range(len(stock.transformer_blocks)):
            image, text, modulated = self.block(number, image, text, modulated, temb, rope)
        return stock.proj_out(stock.norm_out(image, temb))


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 16, 4, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
        "timestep": torch.tensor([0.3, 0.8]),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


def save(model: Published, folder: Path) -> None:
    folder.mkdir()
    stored = {"_class_name": "QwenImageTransformer2DModel", **CONFIG, **model.lists}
    (folder / "config.json").write_text(json.dumps(stored))
    save_file(model.checkpoint(), folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_an_imported_checkpoint_computes_what_the_published_model_does(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    model = Published(CASES[case])
    save(model, tmp_path / "theirs")
    import_published(tmp_path / "theirs", tmp_path / "ours", 40_000)
    own = ppcl_ds.load_model(tmp_path / "ours", torch.float32)
    with torch.no_grad():
        mask = torch.ones(2, 5, dtype=torch.bool)
        output = own(**inputs(), encoder_hidden_states_mask=mask, return_dict=False)[0]
    torch.testing.assert_close(output, model(**inputs()), rtol=1e-5, atol=1e-5)
    gone = {
        key
        for key in model.checkpoint()
        if "to_add_out" in key and int(key.split(".")[1]) in CASES[case]["single_stream_index"]
    }
    assert sum(p.numel() for p in own.parameters()) == sum(
        tensor.numel() for key, tensor in model.checkpoint().items() if key not in gone
    )


def test_what_is_no_published_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Published(CASES["two groups"])
    save(model, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    del config["ffn_proj_index"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    printed = command("import", tmp_path / "theirs", "--out", tmp_path / "ours", code=2)
    assert printed.strip().splitlines() == [printed.strip()]
    assert "has no ffn_proj_index" in printed
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | {"ffn_proj_index": [1]}))
    with pytest.raises(UserError, match=r"transformer_blocks\.\d\.img_m"):
        import_published(tmp_path / "theirs", tmp_path / "ours", 10**9)
    assert not (tmp_path / "ours").exists()
