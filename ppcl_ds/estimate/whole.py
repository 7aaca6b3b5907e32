"""What a whole distillation costs, from noise to trained units, and what it would without each lever."""

from __future__ import annotations

from collections.abc import Iterator

from ppcl_ds.distill.phases import Distilling
from ppcl_ds.estimate.accelerators import Accelerator
from ppcl_ds.estimate.inputs import Inputs
from ppcl_ds.estimate.numbers import WholeRun
from ppcl_ds.sampling import Replay, Trajectories
from ppcl_ds.sections import Distill
from ppcl_ds.training.meta_forward import MetaForward
from ppcl_ds.units.kinds import taps_of

IMAGES = 100_000
"""Images that the authors of PPCL had the teacher draw before they trained; a shorter run draws one for each sample."""

_REPLAY = Replay(uses=4)


def whole_runs(
    account: Distilling, inputs: Inputs, forward: MetaForward, accelerator: Accelerator, utilisation: float
) -> Iterator[WholeRun]:
    """The run as the recipe says, then with one lever moved each, then with its images drawn first.

    Args:
        utilisation: share of the accelerator's peak that is reached.
    """
    settings, recipe = account.settings, inputs.recipe
    samples = settings.steps * account.samples(inputs.cluster)
    last = taps_of(inputs.plan, inputs.teacher.anatomy).last
    to_its_end, to_units_end = (forward.flops_until[block] / settings.micro_batch for block in (-1, last))
    guided = recipe.evaluate.guidance > 1 and not inputs.teacher.call.embeds_guidance

    def run(name: str, own: Distill, images: int = 0) -> WholeRun:
        each = own.trajectories.forwards if own.trajectories else 1
        read = -(-own.steps // own.replay.uses) / own.steps * samples * each
        drawn = images * recipe.evaluate.steps * (1 + guided)
        once = to_its_end if own.trajectories else to_units_end
        flops = read * once + drawn * to_its_end + samples * account.training_flops(account.layers)
        hours = flops / (accelerator.tflops * 1e12 * utilisation) / 3600
        return WholeRun(name=name, forwards=read + drawn, flops=flops, hours=hours)

    plain = settings.model_copy(update={"trajectories": None, "replay": Replay()})
    yield run("as the recipe says", settings)
    if settings.replay.uses > 1:
        yield run("without replay", settings.model_copy(update={"replay": Replay()}))
    else:
        name = f"with replay: {{uses: {_REPLAY.uses}}}"
        yield run(name, settings.model_copy(update={"replay": _REPLAY}))
    if settings.trajectories:
        yield run("on noisy images that are there", settings.model_copy(update={"trajectories": None}))
    else:
        scale = max(1.0, recipe.evaluate.guidance) if guided else 1.0
        name = "on trajectories, from captions alone"
        yield run(name, settings.model_copy(update={"trajectories": Trajectories(guidance=(scale, scale))}))
    images = min(IMAGES, samples)
    yield run(f"{images} images drawn first, no lever", plain, images)
