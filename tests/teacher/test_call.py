"""Calling a teacher: velocities and drawn latents are those of the stock pipelines' own arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, QwenImagePipeline
from torch import Tensor

from ppcl_ds.data.batch import Prompts
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.call import caller_for
from ppcl_ds.teacher.sampling import Sampling, draw
from tests.conftest import TEACHERS

HEIGHT, WIDTH = 8, 4
SIGMAS = torch.tensor([0.25, 0.5, 1.0])
EMPTY_SEED = 99


def teacher_of(family: str, **changes: Any) -> Any:
    class_name, config = TEACHERS[family]
    torch.manual_seed(0)
    return getattr(diffusers, class_name)(**config | changes).eval()


def noise() -> Tensor:
    return torch.randn(3, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def prompts(family: str, batch: int = 3, seed: int = 2) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    embeds, pooled = torch.randn(batch, 5, 16, generator=generator), torch.randn(batch, 8, generator=generator)
    if family != "qwen":
        return Prompts(embeds, pooled=pooled)
    return Prompts(embeds, torch.arange(5) < torch.tensor([[5], [2], [3]])[:batch])


@torch.no_grad()
def stock_velocity(family: str, model: Any, latents: Tensor, given: Prompts, timesteps: Tensor) -> Tensor:
    """One step of the stock pipeline's loop; `timesteps` (B,) are the scheduler's, from 1000 to 0."""
    shape = (len(latents), 1, HEIGHT, WIDTH)
    if family == "qwen":
        output = model(
            hidden_states=QwenImagePipeline._pack_latents(latents, *shape),
            timestep=timesteps / 1000,
            guidance=None,
            encoder_hidden_states_mask=given.mask,
            encoder_hidden_states=given.embeds,
            img_shapes=[[(1, HEIGHT // 2, WIDTH // 2)]] * len(latents),
            return_dict=False,
        )[0]
        return QwenImagePipeline._unpack_latents(output, HEIGHT, WIDTH, 1)[:, :, 0]
    if family == "flux":
        guidance = torch.full([1], 3.5).expand(len(latents)) if model.config.guidance_embeds else None
        output = model(
            hidden_states=FluxPipeline._pack_latents(latents, *shape),
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=given.pooled,
            encoder_hidden_states=given.embeds,
            txt_ids=torch.zeros(given.embeds.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(
                len(latents), HEIGHT // 2, WIDTH // 2, torch.device("cpu"), latents.dtype
            ),
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(output, HEIGHT, WIDTH, 1)
    return model(
        hidden_states=latents,
        timestep=timesteps,
        encoder_hidden_states=given.embeds,
        pooled_projections=given.pooled,
        return_dict=False,
    )[0]


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen", {}), ("flux", {}), ("flux", {"guidance_embeds": True}), ("sd3", {})],
    ids=["qwen", "flux", "flux, guidance-distilled", "sd3"],
)
@torch.no_grad()
def test_the_velocity_is_the_stock_pipelines(family: str, changes: dict[str, Any]) -> None:
    model = teacher_of(family, **changes)
    velocity = caller_for(type(model).__name__)(model, noise(), prompts(family), SIGMAS)
    expected = stock_velocity(family, model, noise(), prompts(family), SIGMAS * 1000)
    assert velocity.shape == noise().shape
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", TEACHERS)
@torch.no_grad()
def test_latents_prompts_and_noise_level_all_matter(family: str) -> None:
    model = teacher_of(family)
    caller = caller_for(type(model).__name__)
    base = caller(model, noise(), prompts(family), SIGMAS)
    assert not torch.allclose(caller(model, noise().flip(-1), prompts(family), SIGMAS), base, atol=1e-5)
    assert not torch.allclose(caller(model, noise(), prompts(family, seed=3), SIGMAS), base, atol=1e-5)
    assert not torch.allclose(caller(model, noise(), prompts(family), SIGMAS.flip(0)), base, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("family", TEACHERS)
def test_drawing_is_a_hand_written_euler_loop(family: str, guidance: float) -> None:
    model = teacher_of(family)
    empty = prompts(family, batch=1, seed=EMPTY_SEED)
    drawn = draw(
        partial(caller_for(type(model).__name__), model),
        noise(),
        prompts(family),
        empty,
        Sampling(steps=4, shift=3.0, guidance=guidance),
    )

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    latents = noise()
    unguided = Prompts.stack([empty] * 3)
    for step, time in enumerate(scheduler.timesteps):
        velocity = stock_velocity(family, model, latents, prompts(family), time.expand(3))
        if guidance > 1:
            plain = stock_velocity(family, model, latents, unguided, time.expand(3))
            velocity = guidance * velocity + (1 - guidance) * plain
        latents = latents + (scheduler.sigmas[step + 1] - scheduler.sigmas[step]) * velocity
    assert len(scheduler.timesteps) == 4
    torch.testing.assert_close(drawn, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", TEACHERS)
def test_without_guidance_the_empty_caption_is_not_read(family: str) -> None:
    model = teacher_of(family)
    poison = prompts(family, batch=1)
    poison.embeds.fill_(torch.nan)
    caller = caller_for(type(model).__name__)
    assert draw(partial(caller, model), noise(), prompts(family), poison, Sampling(steps=2)).isfinite().all()
    assert (
        not draw(partial(caller, model), noise(), prompts(family), poison, Sampling(steps=2, guidance=2.0))
        .isfinite()
        .any()
    )


@torch.no_grad()
def test_padding_behind_the_mask_does_not_change_qwens_velocity() -> None:
    model = teacher_of("qwen")
    caller = caller_for(type(model).__name__)
    short = prompts("qwen")
    assert short.mask is not None
    expected = caller(model, noise(), short, SIGMAS)

    garbage = Prompts(short.embeds.masked_fill(~short.mask[..., None], 50.0), short.mask)
    torch.testing.assert_close(caller(model, noise(), garbage, SIGMAS), expected, rtol=0, atol=1e-5)
    longer = Prompts(torch.cat([short.embeds, torch.full((3, 4, 16), -9.0)], dim=1), torch.zeros(3, 9).bool())
    assert longer.mask is not None
    longer.mask[:, :5] = short.mask
    torch.testing.assert_close(caller(model, noise(), longer, SIGMAS), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_caption_in_a_batch_is_drawn_as_it_is_alone() -> None:
    model = teacher_of("qwen")
    caller = caller_for(type(model).__name__)
    together = caller(model, noise(), prompts("qwen"), SIGMAS)
    for row in range(3):
        alone = caller(model, noise()[row : row + 1], prompts("qwen").row(row), SIGMAS[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"AuraFlowTransformer2DModel.*QwenImageTransformer2DModel"):
        caller_for("AuraFlowTransformer2DModel")
