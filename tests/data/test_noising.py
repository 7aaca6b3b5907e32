"""Noise: the density is the textbooks'; micro-batches are what the stock pipeline reads, whoever joins them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from scipy import special, stats
from torch import Tensor

from ppcl_ds.data.batch import Batch, Sample, Size
from ppcl_ds.data.stored import Texts
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import load_recipe
from ppcl_ds.sections import Noise
from ppcl_ds.teacher.encoding import Encoder
from ppcl_ds.teacher.noising import Noiser, NoisyBatch, NoisyStream, draw_places, place_quantiles
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.pipeline_run import RUNGS
from tests.data.test_encoding import FAMILIES, SIZE, VIDEO, images, options
from tests.families.pipelines import PIPELINES, make_pipeline
from tests.families.pipelines.parts import STATISTICS
from tests.families.test_call import assert_equal

CAPTIONS = ["a tiny red cat", "", "zero one two three red blue cat dog"]
PACKED = ("flux", "qwen_image")
"""Families whose scheduler steps 2 x 2 patches."""


def draws(noise: Noise, count: int = 200_000, seed: int = 0) -> np.ndarray:
    return draw_places(noise, count, torch.Generator().manual_seed(seed)).numpy()


def distance(samples: np.ndarray, theory: object) -> float:
    """Largest gap between the distribution of the samples and the theory, as Kolmogorov and Smirnov measure it."""
    return float(stats.ks_1samp(samples, theory).statistic)


# Places on the ladder


def test_logit_normal_places_have_the_logit_normal_distribution() -> None:
    places = draws(Noise(density="logit_normal"))
    reference = special.expit(np.random.default_rng(0).normal(size=1_000_000))
    assert places.mean() == pytest.approx(reference.mean(), abs=0.003)
    assert places.std() == pytest.approx(reference.std(), abs=0.003)
    assert distance(places, lambda s: stats.norm.cdf(special.logit(s))) < 0.01


def test_uniform_places_are_uniform_and_none_is_beyond_the_ladder() -> None:
    places = draws(Noise(density="uniform"))
    assert places.dtype == np.float32
    assert distance(places, stats.uniform.cdf) < 0.01
    assert 0 <= places.min() < places.max() < 1


def test_the_uniform_share_is_mixed_in() -> None:
    def mixture(s: np.ndarray) -> np.ndarray:
        return 0.7 * stats.norm.cdf(special.logit(s)) + 0.3 * s

    assert distance(draws(Noise(density="logit_normal", uniform_share=0.3)), mixture) < 0.01


def test_quantiles_are_those_of_the_noise_that_is_drawn() -> None:
    """Place 0 is the noisiest rung: a tenth of all noise is below what lies at nine tenths of the way down."""
    shares = np.array([0.1, 0.5, 0.9])
    found = place_quantiles(Noise(density="logit_normal"), shares.tolist()).numpy()
    np.testing.assert_allclose(found, special.expit(stats.norm.ppf(1 - shares)), atol=0.005)
    assert found[0] > found[1] > found[2]


def test_the_same_seed_gives_the_same_draws_and_another_seed_others() -> None:
    noise = Noise(density="logit_normal", uniform_share=0.3)
    assert (draws(noise, 64, seed=3) == draws(noise, 64, seed=3)).all()
    assert (draws(noise, 64, seed=3) != draws(noise, 64, seed=4)).any()


# Micro-batches


class Family:
    """A family's tiny pipeline, samples that were encoded by it, and what noises them."""

    def __init__(self, name: str, folder: Path) -> None:
        make_pipeline(name, folder)
        self.name = name
        self.encoder = Encoder(folder, options=options(name))
        self.call = PipelineCall(folder, options=options(name))
        self.noiser = Noiser(self.call, Texts.read(self.encoder.texts(SIZE)), torch.float32)
        self.stock: Any = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)

    def batch(self, captions: Sequence[str] = CAPTIONS) -> Batch:
        latents = self.encoder.latents([[image] for image in images(len(captions))]).split(1)
        prompts = [self.encoder.prompt(caption, SIZE) for caption in captions]
        rows = zip(captions, latents, prompts, strict=True)
        return Batch(tuple(Sample(caption, own, SIZE, prompt, caption) for caption, own, prompt in rows))

    def stepped(self, latents: Tensor) -> Tensor:
        """Latents as the VAE lays them out, as the scheduler steps them."""
        if self.name not in PACKED:
            return latents
        latents = latents.squeeze(2) if latents.dim() == 5 else latents
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)

    def normalised(self, latents: Tensor) -> Tensor:
        """As every pipeline of the family brings the mean of its VAE to unit variance."""
        if self.name not in VIDEO:
            return (latents - 0.12) * 0.36
        mean, std = (torch.tensor(STATISTICS[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        return (latents - mean) / std


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    root = tmp_path_factory.mktemp("pipelines")
    made: dict[str, Family] = {}

    def make(name: str) -> Family:
        if name not in made:
            made[name] = Family(name, root / name)
        return made[name]

    return make


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sigma(name: str, noisy: NoisyBatch) -> Tensor:
    """The noise level that the transformer is told of, (B,)."""
    times = noisy.arguments["timestep"]
    return times if name in PACKED else times / 1000


@pytest.mark.parametrize("name", FAMILIES)
def test_clean_latents_and_noise_are_as_the_pipeline_steps_them(family: Callable[[str], Family], name: str) -> None:
    own = family(name)
    batch = own.batch()
    clean, noise = own.noiser.noise(batch, generator(5))
    torch.testing.assert_close(clean, own.stepped(own.normalised(batch.latents)), rtol=0, atol=1e-5)
    drawn = torch.randn(batch.latents.shape, generator=generator(5))
    assert torch.equal(noise, own.stepped(drawn)), "drawn as the VAE lays latents out"


@pytest.mark.parametrize("name", FAMILIES)
def test_noise_is_mixed_in_along_the_target(family: Callable[[str], Family], name: str) -> None:
    own = family(name)
    batch, places = own.batch(), torch.tensor([0.0, 0.4, 0.9])
    noisy = own.noiser.noisy(batch, places, generator(5))
    clean, noise = own.noiser.noise(batch, generator(5))
    torch.testing.assert_close(noisy.target, noise - clean)
    level = sigma(name, noisy)
    if name != "wan":  # whose own scheduler has a shift
        torch.testing.assert_close(level, 1 - (places * RUNGS).int() / RUNGS, rtol=0, atol=2e-3)
    assert (level.diff() < 0).all()
    shape = [-1] + [1] * (clean.dim() - 1)
    expected = clean + level.view(shape) * (noise - clean)
    torch.testing.assert_close(noisy.arguments["hidden_states"], expected, rtol=0, atol=5e-3)
    assert noisy.size == SIZE


@pytest.mark.parametrize("name", FAMILIES)
def test_the_transformer_reads_the_captions_as_the_pipeline_gives_them(
    family: Callable[[str], Family], name: str
) -> None:
    own = family(name)
    arguments = own.noiser.noisy(own.batch(), torch.full((3,), 0.5), generator()).arguments
    length = own.call.options.get("max_sequence_length", 512)
    with torch.no_grad():
        if name == "qwen_image":
            embeds, mask = own.stock.encode_prompt(list(CAPTIONS))
            expected = {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}
        elif name == "flux":
            embeds, pooled, ids = own.stock.encode_prompt(list(CAPTIONS), None, max_sequence_length=length)
            expected = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": ids}
        elif name == "sd3":
            given = [list(CAPTIONS)] * 3
            embeds, _, pooled, _ = own.stock.encode_prompt(
                *given, do_classifier_free_guidance=False, max_sequence_length=length
            )
            expected = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        else:
            embeds, _ = own.stock.encode_prompt(
                list(CAPTIONS), do_classifier_free_guidance=False, max_sequence_length=length
            )
            expected = {"encoder_hidden_states": embeds}
    for key, tensor in expected.items():
        torch.testing.assert_close(arguments[key], tensor, rtol=0, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_its_samples_joined(family: Callable[[str], Family], name: str) -> None:
    own = family(name)
    batch, places = own.batch(), torch.tensor([0.1, 0.5, 0.7])
    together = own.noiser.noisy(batch, places, generator(3))
    shared = generator(3)  # 16 numbers at a time, so one sample after the other draws what all draw at once
    for row, sample in enumerate(batch.samples):
        alone = own.noiser.noisy(Batch((sample,)), places[row : row + 1], shared)
        assert torch.equal(together.target[row], alone.target[0])
        for key in ("hidden_states", "timestep"):
            assert torch.equal(together.arguments[key][row], alone.arguments[key][0])
        text = alone.arguments["encoder_hidden_states"][0]
        assert torch.equal(together.arguments["encoder_hidden_states"][row, : len(text)], text)
        assert not together.arguments["encoder_hidden_states"][row, len(text) :].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_micro_batches_are_asked_for_at_once(
    family: Callable[[str], Family], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is known what follows from the rung, one call serves all samples; nothing else changes."""
    own = family(name)
    noiser = Noiser(own.call, own.noiser.texts, torch.float32)
    batch, places = own.batch(), torch.tensor([0.1, 0.5, 0.7])
    expected = noiser.noisy(batch, places, generator(3)).arguments
    asked: list[int] = []
    arguments = own.call.arguments

    def counted(*args: Any) -> Any:
        asked.append(1)
        return arguments(*args)

    monkeypatch.setattr(own.call, "arguments", counted)
    found = noiser.noisy(batch, places, generator(3)).arguments
    assert len(asked) == 1
    assert_equal(found, expected)
    other = noiser.noisy(batch, torch.tensor([0.7, 0.2, 0.1]), generator(4)).arguments
    assert other["timestep"].shape == (3,)
    assert sorted(other["timestep"].tolist()) == [other["timestep"][row] for row in (0, 1, 2)], "0.7 is the least noise"


def test_a_mask_is_there_for_micro_batches_that_need_one(family: Callable[[str], Family]) -> None:
    """Qwen-Image's is None where all captions are as long; whichever comes first, the next is read as it should be."""
    own = family("qwen_image")
    alike, unlike = ["a red cat", "a blue dog"], ["a red cat", "", "one two three four"]
    for captions in (alike, unlike, alike, unlike[::-1], alike[:1], unlike[:2]):
        arguments = own.noiser.noisy(own.batch(captions), torch.full((len(captions),), 0.5), generator()).arguments
        with torch.no_grad():
            embeds, mask = own.stock.encode_prompt(list(captions))
        torch.testing.assert_close(arguments["encoder_hidden_states"], embeds, rtol=0, atol=1e-5)
        found = arguments["encoder_hidden_states_mask"]
        assert (found is None) == (mask is None)
        assert found is None or torch.equal(found.bool(), mask.bool())


def test_captions_that_padding_would_change_are_not_joined(family: Callable[[str], Family]) -> None:
    own = family("qwen_image")
    texts = own.noiser.texts
    noiser = Noiser(own.call, replace(texts, joining=replace(texts.joining, padded=False)), torch.float32)
    with pytest.raises(UserError, match=r"captions of unlike length .* use micro_batch: 1"):
        noiser.noisy(own.batch(), torch.full((3,), 0.5), generator())
    same = noiser.noisy(own.batch(["a red cat", "a blue dog"]), torch.full((2,), 0.5), generator())
    assert len(same.target) == 2


def test_latents_of_another_vae_are_refused(family: Callable[[str], Family]) -> None:
    own, other = family("flux"), family("wan")
    with pytest.raises(UserError, match=r"latents of shape \(4, 1, 4, 8\), but for 16 x 32 pixels .* \(4, 8, 16\)"):
        own.noiser.noisy(other.batch(), torch.full((3,), 0.5), generator())


def test_low_precision_sees_the_same_noise(family: Callable[[str], Family]) -> None:
    own = family("sd3")
    half = Noiser(own.call, own.noiser.texts, torch.bfloat16).noisy(own.batch(), torch.full((3,), 0.5), generator())
    full = own.noiser.noisy(own.batch(), torch.full((3,), 0.5), generator())
    assert torch.equal(half.target, full.target), "what is aimed at stays float32"
    for key in ("hidden_states", "encoder_hidden_states"):
        assert half.arguments[key].dtype == torch.bfloat16
        assert torch.equal(half.arguments[key], full.arguments[key].bfloat16())


def test_draws_leave_the_global_random_state_alone(family: Callable[[str], Family]) -> None:
    own = family("sd3")
    batch, before = own.batch(), torch.get_rng_state()
    draws(Noise(uniform_share=0.3), 64)
    own.noiser.noisy(batch, torch.full((3,), 0.5), generator())
    assert torch.equal(before, torch.get_rng_state())


def test_an_editing_pipeline_sees_the_source_behind_the_latents(tmp_path: Path) -> None:
    """FLUX Kontext: tokens of the source follow those of the latents; the target is of the latents alone."""
    make_pipeline("flux_kontext", tmp_path)
    call = PIPELINES["flux_kontext"].call
    own = {key: call[key] for key in ("max_sequence_length", "guidance_scale", "max_area", "_auto_resize")}
    own["image"] = "source"
    encoder, size = Encoder(tmp_path, options=own), Size(16, 16)
    drawn, source = images(2, size)
    noiser = Noiser(PipelineCall(tmp_path, options=own), Texts.read(encoder.texts(size)), torch.float32)
    prompt = encoder.prompt("a tiny red cat", size, source)
    sample = Sample("k", encoder.latents([[drawn]]), size, prompt, "a cat", encoder.prompt("", size, source))
    noisy = noiser.noisy(Batch((sample,)), torch.tensor([0.5]), generator())

    def packed(image: Image.Image) -> Tensor:
        latents = (encoder.latents([[image]]) - 0.12) * 0.36
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)

    hidden = noisy.arguments["hidden_states"]
    torch.testing.assert_close(hidden[:, 16:], packed(source), rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden[:, :16] - 0.5 * noisy.target, packed(drawn), rtol=0, atol=2e-3)
    assert noiser.empty(sample) is sample.empty
    assert noiser.empty(replace(sample, empty=None)) is noiser.texts.empty


# The stream


def test_a_micro_batch_is_the_same_whoever_reads_it(new_run: Callable[..., Path]) -> None:
    recipe = load_recipe(new_run("qwen"))
    call = PipelineCall(recipe.teacher.path, options=recipe.teacher.options)

    def read(start: int, stride: int, count: int, seed: int = 0) -> dict[int, NoisyBatch]:
        stream = NoisyStream(recipe.model_copy(update={"seed": seed}), call, "train", 2)
        return dict(islice(stream.take(start, stride), count))

    alone = read(0, 1, 6)
    for others in (read(0, 2, 3), read(1, 2, 3), read(4, 1, 2)):
        for number, noisy in others.items():
            assert torch.equal(noisy.target, alone[number].target)
            assert torch.equal(noisy.arguments["hidden_states"], alone[number].arguments["hidden_states"])
            assert torch.equal(noisy.arguments["timestep"], alone[number].arguments["timestep"])
    assert not torch.equal(alone[0].target, alone[1].target)
    assert not torch.equal(alone[0].target, read(0, 1, 1, seed=1)[0].target)


def test_twins_differ_in_their_prompt_alone(new_run: Callable[..., Path]) -> None:
    """By what the transformer reads: the same noisy latents at the same time, and the empty prompt."""
    recipe = load_recipe(new_run("qwen", noise={"caption_dropout": 0.5}))
    call = PipelineCall(recipe.teacher.path, options=recipe.teacher.options)
    plain, paired = (
        [batch for _, batch in islice(NoisyStream(recipe, call, "train", 4, paired=each).take(0, 1), 8)]
        for each in (False, True)
    )
    pairs = 0
    for one, other in zip(plain, paired, strict=True):
        assert one.twins.tolist() == [0, 1, 2, 3]
        texts, masks = (other.arguments[f"encoder_hidden_states{end}"] for end in ("", "_mask"))
        empty = {place for place, twin in enumerate(other.twins.tolist()) if twin != place}
        for place, twin in enumerate(other.twins.tolist()):
            for name in ("hidden_states", "timestep"):
                assert torch.equal(other.arguments[name][place], other.arguments[name][twin])
                assert torch.equal(other.arguments[name][twin], one.arguments[name][twin])
            assert torch.equal(other.target[place], one.target[twin])
            assert other.places[place] == one.places[twin]
            if twin != place:
                pairs += 1
                shared = masks[place] & masks[twin]
                assert masks[place].sum() < masks[twin].sum() or not torch.equal(
                    texts[place][shared], texts[twin][shared]
                )
        for first in empty:  # the empty prompt is one for all
            for second in empty:
                assert torch.equal(texts[first][masks[first]], texts[second][masks[second]])
    assert pairs > 8
