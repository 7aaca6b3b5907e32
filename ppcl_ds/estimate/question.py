"""What an estimate is asked about: a recipe's teacher, plan and samples, on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from ppcl_ds.errors import UserError
from ppcl_ds.estimate.assumed import assume_plan
from ppcl_ds.estimate.layout import Layout, layout_on
from ppcl_ds.estimate.settings import Settings, settings_of
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import Training
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.meta_forward import latent_channels
from ppcl_ds.units.plan import Plan, load_plan

_TEXT_TOKENS = 32
"""Tokens of a prompt where the recipe does not say: captions of a sentence or two."""


@dataclass(frozen=True)
class Question:
    """A recipe on a cluster.

    Attributes:
        teacher: without weights.
        words: where the plan comes from.
        latents: (C, H, W) of a sample.
        tokens: of its prompt.
    """

    layout: Layout
    teacher: Teacher
    plan: Plan
    words: str
    latents: tuple[int, int, int]
    tokens: int
    sharing: Settings


def ask(
    recipe: Recipe,
    training: Training,
    nodes: int,
    gpus_per_node: int,
    latent_size: tuple[int, int] | None,
    text_tokens: int | None,
    variant: str | None = None,
) -> Question:
    """Read everything that an estimate needs; no weights.

    Args:
        training: the section of the recipe that is estimated.
        latent_size: H and W of a sample; the recipe's by default.
        text_tokens: tokens of its prompt; the recipe's by default.
        variant: that is asked about; the whole library by default.

    Raises:
        UserError: recipe, plan, teacher and cluster do not go together; the message says which.
    """
    layout = layout_on(recipe.topology, nodes, gpus_per_node)
    teacher = Teacher(recipe.teacher.path, weights=False)
    if recipe.plan_file.exists():
        plan, words = load_plan(recipe.plan_file, teacher), str(recipe.plan_file)
    elif recipe.plan.rule == "given" and recipe.plan.given:
        plan, words = load_plan(recipe.plan.given, teacher), str(recipe.plan.given)
    else:
        shares = {name: share for name, share in recipe.plan.variants.items() if variant in (None, name)}
        if not shares:
            raise UserError(f"variant '{variant}' is not in plan.variants: {', '.join(recipe.plan.variants)}")
        plan, words = assume_plan(shares, teacher), f"assumed, as there is no {recipe.plan_file}"
    side = recipe.data.images.latent_size
    sharing = settings_of(recipe, training, gpus_per_node)
    if layout.world % sharing.ranks_per_copy:
        raise UserError(
            f"teacher.ranks_per_copy is {sharing.ranks_per_copy}, which does not divide the {layout.world} processes"
        )
    return Question(
        layout,
        teacher,
        plan,
        words,
        latents=(latent_channels(teacher.empty), *(latent_size or (side, side))),
        tokens=text_tokens or recipe.data.captions.max_tokens or _TEXT_TOKENS,
        sharing=sharing,
    )
