"""What can be known to be wrong with a run before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence

from ppcl_ds.cluster.chain import Step
from ppcl_ds.data.index import Index, split_entries
from ppcl_ds.distill import run as distill
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.accelerators import ACCELERATORS, accelerator_called
from ppcl_ds.estimate.sizing import Estimate, size_run
from ppcl_ds.estimate.tuning import Tuning, size_tuning
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.files import ModelFiles
from ppcl_ds.families.reader import DTYPES, open_teacher
from ppcl_ds.planning.choose import width_candidates
from ppcl_ds.planning.plan import Plan, allowed_spans, load_plan
from ppcl_ds.recipe import Recipe
from ppcl_ds.whole import need_space

_TRAINING_BYTES = 12
"""Of a parameter in a checkpoint: a master and two moments in float32."""


def nodes_of(recipe: Recipe) -> int:
    """Nodes for all processes of the topology.

    Raises:
        UserError: they do not fill whole nodes.
    """
    world, each = recipe.topology.world, recipe.cluster.processes_per_node
    if world > each and world % each:
        raise UserError(
            f"topology.stages x topology.replicas is {world}, which does not fill nodes of "
            f"cluster.processes_per_node = {each}; change one of them"
        )
    return max(1, world // each)


def variants_of(recipe: Recipe) -> list[str]:
    """Names of the run's variants: the plan's if there is one, else those that are asked for."""
    plan = _plan(recipe, *open_teacher(recipe))
    return list(plan.variants if plan else recipe.plan.variants)


def check(recipe: Recipe, chosen: Sequence[Step]) -> None:
    """Look at everything that the steps to run need and that is there, or could be, by now.

    Raises:
        UserError: one line that says what is wrong.
    """
    files, anatomy = open_teacher(recipe)
    plan = _plan(recipe, files, anatomy)
    most = len(plan.units) if plan else _most_units(recipe, files, anatomy)
    if recipe.topology.stages > most:
        raise UserError(
            f"topology.stages is {recipe.topology.stages}, but the plan "
            f"{'has only' if plan else 'cannot have more than'} {most} units; use at most one stage a unit"
        )
    if any(step.name == "encode" for step in chosen):
        raw = recipe.data.shards / "raw"
        index = Index.read(raw / "index.json", "ppcl-data shard")
        if lost := [entry.name for entry in index.shards if not entry.is_in(raw)]:
            raise UserError(f"{raw / lost[0]} is missing or cut short; run `ppcl-data shard RECIPE`")
    else:
        for split in ("train", "heldout"):
            split_entries(recipe.data, split)
        if recipe.plan_file.exists() and any(step.name == "distill" for step in chosen):
            distill.check(recipe)
    if recipe.cluster.probe_parts > recipe.probe.batches:
        raise UserError(
            f"cluster.probe_parts is {recipe.cluster.probe_parts}, but probe.batches is {recipe.probe.batches}; "
            "use at most so many parts"
        )
    name = recipe.cluster.accelerator
    accelerator = accelerator_called(name) if name else ACCELERATORS["h100"]  # which does not matter for its sizes
    nodes = nodes_of(recipe)
    numbers = size_run(recipe, nodes, recipe.topology.world // nodes, accelerator)
    if name and not numbers.fits:
        smallest = numbers.smallest
        advice = f"{smallest.nodes} nodes would do" if smallest else "no cluster of this topology does"
        raise UserError(
            f"distilling needs {numbers.fullest.memory.peak / 2**30:.3g} GiB on an {name}, which has "
            f"{accelerator.usable_bytes / 2**30:.3g}; {advice}, `ppcl estimate` says more"
        )
    tunings = [
        size_tuning(recipe, recipe.tuning, variant, nodes, recipe.topology.world // nodes, accelerator)
        for variant in (recipe.finetune.variants if recipe.finetune else ())
    ]
    for tuning in tunings:
        if name and not tuning.fits:
            needed, there = (size / 2**30 for size in (tuning.fullest.memory.peak, accelerator.usable_bytes))
            raise UserError(
                f"fine-tuning '{tuning.variant}' needs {needed:.3g} GiB on an {name}, which has {there:.3g}; "
                f"`ppcl estimate --variant {tuning.variant}` says more"
            )
    need_space(recipe.run, _bytes_to_write(recipe, numbers, tunings))


def _plan(recipe: Recipe, files: ModelFiles, anatomy: Anatomy) -> Plan | None:
    if recipe.plan_file.exists():
        return load_plan(recipe.plan_file, files, anatomy)
    given = recipe.plan.given
    if recipe.plan.rule == "given" and given and not recipe.plan.variants and not recipe.plan.candidates:
        return load_plan(given, files, anatomy)
    return None


def _most_units(recipe: Recipe, files: ModelFiles, anatomy: Anatomy) -> int:
    """More units than any plan of the recipe can have: spans do not overlap within what a rule gives a variant."""
    section = recipe.plan
    spans = [span for span in allowed_spans(files, anatomy) if span[1] - span[0] < section.max_span]
    chosen = len(section.variants) * (1 + len(section.candidates)) * (len(anatomy) // 2)
    given = len(load_plan(section.given, files, anatomy).units) if section.given else 0
    return min(len(spans), chosen) + given + len(width_candidates(section, anatomy))


def _bytes_to_write(recipe: Recipe, numbers: Estimate, tunings: Sequence[Tuning]) -> int:
    """At most, of what is large: checkpoints, with the one being written, and the variants, as large as the teacher."""
    kept = (recipe.distill.keep_checkpoints + 1) * numbers.unit_parameters
    if recipe.finetune:
        kept += (recipe.finetune.keep_checkpoints + 1) * sum(tuning.parameters for tuning in tunings)
    variants = max(1, len(recipe.plan.variants)) + len(tunings)
    return kept * _TRAINING_BYTES + variants * numbers.teacher_parameters * DTYPES[recipe.teacher.precision].itemsize
