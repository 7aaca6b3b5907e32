"""What can be known to be wrong with a run before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence

from ppcl_ds.atomic import require_space
from ppcl_ds.data.index import Index
from ppcl_ds.data.stream import check_data
from ppcl_ds.distill import distill as distill
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.accelerators import ACCELERATORS, accelerator_called
from ppcl_ds.estimate.estimate import size
from ppcl_ds.estimate.inputs import read_inputs
from ppcl_ds.estimate.numbers import Estimate
from ppcl_ds.finetune import finetune as finetune
from ppcl_ds.planning.choose import width_candidates
from ppcl_ds.probing.costs import worthwhile_parts
from ppcl_ds.recipe import Recipe
from ppcl_ds.steps import Step
from ppcl_ds.teacher.noising import DTYPES
from ppcl_ds.teacher.teacher import Teacher, open_teacher
from ppcl_ds.training.checks import checkpoint_bytes
from ppcl_ds.units.plan import Plan, load_plan


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
    return _variants(recipe, _plan(recipe, open_teacher(recipe)))


def check(recipe: Recipe, chosen: Sequence[Step]) -> None:
    """Look at everything that the steps to run need and that is there, or could be, by now.

    Raises:
        UserError: one line that says what is wrong.
    """
    teacher = open_teacher(recipe)
    plan = _plan(recipe, teacher)
    most = len(plan.units) if plan else _most_units(recipe, teacher)
    if recipe.topology.stages > most:
        raise UserError(
            f"topology.stages is {recipe.topology.stages}, but the plan "
            f"{'has only' if plan else 'cannot have more than'} {most} units; use at most one stage a unit"
        )
    names = {step.name for step in chosen}
    if "encode" in names:
        raw = recipe.data.shards / "raw"
        index = Index.read(raw / "index.json", "ppcl-data shard")
        if lost := [entry.name for entry in index.shards if not entry.is_in(raw)]:
            raise UserError(f"{raw / lost[0]} is missing or cut short; run `ppcl-data shard RECIPE`")
    else:
        check_data(recipe.data)
        if recipe.plan_file.exists() and "distill" in names:
            distill.check(recipe)
        elif recipe.finetune and "finetune" in names:
            for variant in recipe.finetune.variants:
                finetune.check(recipe, variant, None)
    if (recipe.cluster.probe_parts or 1) > recipe.probe.batches:
        raise UserError(
            f"cluster.probe_parts is {recipe.cluster.probe_parts}, but probe.batches is {recipe.probe.batches}; "
            "use at most so many parts"
        )
    distilling, *tunings = (
        _sized(recipe, variant, teacher) for variant in (None, *(recipe.finetune.variants if recipe.finetune else ()))
    )
    if name := recipe.cluster.accelerator:
        _need_memory(distilling, "distilling", "ppcl estimate")
        if "probe" in names and not distilling.fits:
            peak, there = (each / 2**30 for each in (distilling.probing_peak, distilling.accelerator.usable_bytes))
            raise UserError(
                f"probing needs {peak:.3g} GiB on an {name}, which has {there:.3g}; set a smaller probe.batch_size "
                "and leave probe.blocks_at_once out"
            )
        for tuning in tunings:
            _need_memory(tuning, f"fine-tuning '{tuning.variant}'", f"ppcl estimate --variant {tuning.variant}")
    variants = len(_variants(recipe, plan)) + len(tunings)
    written = _bytes_to_write(recipe, distilling, tunings, variants)
    require_space(recipe.run, written)
    arrays = [step.array for step in chosen if step.name == "probe" and step.array]
    parts = int(arrays[0].partition("-")[2]) if arrays else 1
    if parts > 1 and distilling.probing:
        # Of an even number of parts each knows one half of the samples alone; the other is a hole in its file.
        taken = parts * distilling.probing.part // (1 if parts % 2 else 2)
        try:
            require_space(recipe.run, written + taken)
        except UserError:
            raise UserError(
                f"the {parts} parts of the probe take {taken / 1e9:.3g} GB on the disk of {recipe.run}, beside "
                f"{written / 1e9:.3g} GB of checkpoints and variants; set cluster.probe_parts: 1, or make room"
            ) from None


def parts_of(recipe: Recipe) -> int:
    """Tasks that share the probe, each with a file of its sums; a single one reports at once, without a file."""
    parts = recipe.cluster.probe_parts
    if parts is None and not (recipe.probe_folder / "report.json").exists():
        numbers = _sized(recipe, None, open_teacher(recipe, weights=False))
        assert numbers.probing, "distilling was estimated"
        parts = worthwhile_parts(recipe, numbers.probing, numbers.probing_seconds)
    return parts or 1


def _sized(recipe: Recipe, variant: str | None, teacher: Teacher) -> Estimate:
    """The estimate of a training on the recipe's cluster."""
    nodes, name = nodes_of(recipe), recipe.cluster.accelerator
    # Sizes do not hang on it where nobody has named it.
    accelerator = accelerator_called(name, "cluster.accelerator") if name else ACCELERATORS["h100"]
    return size(read_inputs(recipe, nodes, recipe.topology.world // nodes, variant, teacher=teacher), accelerator)


def _need_memory(numbers: Estimate, what: str, command: str) -> None:
    if numbers.trains:
        return
    smallest, accelerator = numbers.smallest, numbers.accelerator
    needed, there = (each / 2**30 for each in (numbers.memory.peak, accelerator.usable_bytes))
    advice = "no cluster of this topology does"
    if smallest:
        advice = f"{smallest.world} processes as {smallest.stages} stages x {smallest.replicas} replicas would do"
    raise UserError(
        f"{what} needs {needed:.3g} GiB on an {accelerator.name}, which has {there:.3g}; {advice}, "
        f"`{command}` says more"
    )


def _plan(recipe: Recipe, teacher: Teacher) -> Plan | None:
    if recipe.plan_file.exists():
        return load_plan(recipe.plan_file, teacher)
    given = recipe.plan.given
    if recipe.plan.rule == "given" and given and not recipe.plan.variants and not recipe.plan.candidates:
        return load_plan(given, teacher)
    return None


def _variants(recipe: Recipe, plan: Plan | None) -> list[str]:
    return list(plan.variants if plan else recipe.plan.variants)


def _most_units(recipe: Recipe, teacher: Teacher) -> int:
    """More units than any plan of the recipe can have: spans do not overlap within what a rule gives a variant."""
    section = recipe.plan
    spans = [span for span in teacher.allowed_spans if span[1] - span[0] < section.max_span]
    chosen = len(section.variants) * (1 + len(section.candidates)) * (len(teacher.blocks) // 2)
    given = len(load_plan(section.given, teacher).units) if section.given else 0
    return min(len(spans), chosen) + given + len(width_candidates(section, teacher))


def _bytes_to_write(recipe: Recipe, distilling: Estimate, tunings: Sequence[Estimate], variants: int) -> int:
    """At most, of what is large: checkpoints, with the one being written, and the variants, as large as the teacher.

    Encoded shards are not counted: how large they are, encoding tells.
    """
    kept = (recipe.distill.keep_checkpoints + 1) * checkpoint_bytes(distilling.parameters, average=False)
    if recipe.finetune:
        tuned = checkpoint_bytes(sum(tuning.parameters for tuning in tunings), bool(recipe.finetune.ema))
        kept += (recipe.finetune.keep_checkpoints + 1) * tuned
    return kept + variants * distilling.teacher_parameters * DTYPES[recipe.teacher.precision].itemsize
