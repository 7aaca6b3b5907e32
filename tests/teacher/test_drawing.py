"""Drawing from prompts that lie encoded: what the stock pipeline draws from the same captions and the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from torch import Tensor

from ppcl_ds.data.batch import Batch, Prompt, Sample, Size
from ppcl_ds.data.stored import Texts
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.teacher.drawing import Drawing
from ppcl_ds.teacher.encoding import Decoder, Encoder
from ppcl_ds.teacher.noising import Noiser
from ppcl_ds.teacher.pipeline_call import PipelineCall
from tests.calls import answer, packed
from tests.conftest import TEACHERS, make_recipe
from tests.pipelines import OPTIONS, make

SIZE = Size(8, 8)
CAPTIONS = ["a tiny two", "three", "zero"]
STEPS, SEED = 3, 5
TEACHERS_DRAWN = [*TEACHERS, "flux, told its guidance"]
PLAIN: dict[str, dict[str, Any]] = {
    "qwen": {"true_cfg_scale": 1.0},
    "flux": {},
    "flux, told its guidance": {"guidance_scale": 3.5},
    "sd3": {"guidance_scale": 1.0},
}
"""How a stock pipeline is told to draw without guidance; FLUX.1-dev's usual scale is a number that it reads."""
GUIDED: dict[str, dict[str, Any]] = {
    "qwen": {"true_cfg_scale": 4.0},
    "flux": {"true_cfg_scale": 4.0, "negative_prompt": ""},
    "flux, told its guidance": {"guidance_scale": 4.0},
    "sd3": {"guidance_scale": 4.0, "negative_prompt": ""},
}


@dataclass
class Case:
    """A stock pipeline with its weights, and its captions as they were encoded."""

    family: str
    pipe: Any
    folder: Path
    samples: tuple[Sample, ...]
    texts: Texts

    def recipe(self, guidance: float) -> Recipe:
        run = self.folder.parent
        recipe = make_recipe(self.family, run) | {"seed": SEED, "evaluate": {"steps": STEPS, "guidance": guidance}}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return load_recipe(run / "recipe.yaml")

    def drawing(self, chosen: slice, guidance: float = 1.0, texts: Texts | None = None) -> Drawing:
        call = PipelineCall(self.folder, options=OPTIONS[self.family])
        noiser = Noiser(call, texts or self.texts, torch.float32)
        return Drawing(self.recipe(guidance), call, noiser, Batch(self.samples[chosen]), chosen.start or 0)

    def stock(self, numbers: Sequence[int], output_type: str, **how: Any) -> Tensor:
        """What the stock pipeline draws of these captions."""
        rows = [torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(SEED + n)) for n in numbers]
        noise = torch.cat(rows)
        return self.pipe(
            [CAPTIONS[number] for number in numbers],
            height=8,
            width=8,
            num_inference_steps=STEPS,
            latents=noise if self.family == "sd3" else packed(noise),
            output_type=output_type,
            **OPTIONS[self.family],
            **how,
        ).images


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Name -> its case, made on first use."""
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            family, folder = name.split(",")[0], tmp_path_factory.mktemp("drawn") / "teacher"
            pipe = make(family)
            if family != name:
                torch.manual_seed(0)
                transformer = diffusers.FluxTransformer2DModel(**TEACHERS["flux"][1], guidance_embeds=True)
                pipe.register_modules(transformer=transformer)
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module):
                    part.eval()
            pipe.save_pretrained(folder)
            pipe.set_progress_bar_config(disable=True)
            encoder = Encoder(folder, options=OPTIONS[family])
            samples = [
                Sample(str(number), torch.zeros(1, 1, 8, 8), SIZE, encoder.prompt(caption, SIZE), caption)
                for number, caption in enumerate(CAPTIONS)
            ]
            # On disk the empty caption is rounded; here it is as the stock pipeline encodes it.
            texts = replace(Texts.read(encoder.texts(SIZE)), empty=encoder.prompt("", SIZE))
            made[name] = Case(family, pipe, folder, tuple(samples), texts)
        return made[name]

    return case


@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["without guidance", "with guidance"])
@pytest.mark.parametrize("name", TEACHERS_DRAWN)
def test_what_is_drawn_is_what_the_stock_pipeline_draws(
    cases: Callable[[str], Case], name: str, guidance: float
) -> None:
    """One by one, and in a batch of captions of unlike length."""
    case = cases(name)
    how = GUIDED[name] if guidance > 1 else PLAIN[name]
    answers = {"transformer": partial(answer, case.pipe.transformer)}
    latents, images = case.drawing(slice(0, 3), guidance).draw(answers, Decoder(case.folder))
    assert images is not None
    assert images.shape == (3, case.pipe.vae.decode(torch.zeros(1, 1, 8, 8)).sample.shape[1], 8, 8)
    for number in range(3):
        expected = case.stock([number], "latent", **how)
        close(latents[number : number + 1], expected)
        close(images[number : number + 1], case.stock([number], "pt", **how) * 2 - 1)
        alone, undecoded = case.drawing(slice(number, number + 1), guidance).draw(answers)
        close(alone, expected)
        assert undecoded is None
    other = case.stock([0], "latent", **(PLAIN[name] if guidance > 1 else GUIDED[name]))
    assert (latents[:1] - other).abs().max() > 1e-3, "guidance makes a difference"


def close(own: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(own, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen", "flux", "sd3"])
def test_without_guidance_the_empty_caption_is_not_read(cases: Callable[[str], Case], name: str) -> None:
    case = cases(name)
    poison = replace(case.texts, empty=poisoned(case.texts.empty))
    answers = {"transformer": partial(answer, case.pipe.transformer)}
    assert case.drawing(slice(0, 2), 1.0, poison).draw(answers)[0].isfinite().all()
    assert not case.drawing(slice(0, 2), 4.0, poison).draw(answers)[0].isfinite().any()


def poisoned(prompt: Prompt) -> Prompt:
    def nan(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.full_like(value, torch.nan) if value.is_floating_point() else value
        return type(value)(map(nan, value)) if isinstance(value, (list, tuple)) else value

    return replace(prompt, text=nan(tuple(prompt.text)))


def test_a_clip_shows_the_frame_in_its_middle(cases: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = cases("qwen").drawing(slice(0, 1))
    frames = torch.linspace(0, 1, 5)[None, :, None, None, None].expand(1, 5, 3, 8, 8)
    monkeypatch.setattr(drawing.call, "draw", lambda *_: (drawing.noise, frames))
    assert torch.equal(drawing.draw({})[1], torch.zeros(1, 3, 8, 8))  # type: ignore[arg-type]


def test_what_cannot_be_drawn_is_refused(cases: Callable[[str], Case]) -> None:
    case = cases("sd3")
    with pytest.raises(UserError, match=r"set evaluate\.guidance: 1"):
        case.drawing(slice(0, 1), 4.0, replace(case.texts, guiding=None))
    with pytest.raises(UserError, match="its transformer is asked, too, and is not there"):
        case.drawing(slice(0, 1)).draw({})
