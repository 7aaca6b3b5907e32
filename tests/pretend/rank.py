"""One rank of a run on the pretended accelerator: `python -m tests.pretend.rank CASE FOLDER`.

The product's own programs run; in their way stand only the weights (shapes), the watchdog (which asks a store), and the
other ranks. What was seen is written to `FOLDER/seen-RANK.json`.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.pretend.cases import Case
from tests.pretend.collectives import Program, join
from tests.pretend.device import Device, Seen, pretend


class Run:
    """A case under way.

    Attributes:
        notes: what will be written.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder, self.seen = case, folder, Seen()
        self.recipe = case.recipe(folder)
        self.device: Device = pretend(self.seen, case.gib)
        self.program: Program = join(case.rank, case.world, min(case.ranks_per_node, case.world))
        _shapes_for_weights()
        from ppcl_ds.teacher.teacher import open_teacher
        from ppcl_ds.units.plan import load_plan

        self.teacher = open_teacher(self.recipe, weights=False)
        self.plan = load_plan(self.recipe.plan_file, self.teacher)
        _ = self.teacher.empty, self.teacher.allowed_spans
        self.notes: dict[str, Any] = {}
        self.calls: list[Any] = []
        self.samples = 0

    def clear(self) -> None:
        gc.collect()
        self.seen.clear()
        self.calls += self.program.calls
        self.program.clear()
        self.device.peak = self.device.now

    def note(self, name: str) -> None:
        """Write down what has happened since `clear`."""
        self.notes[name] = {kind: dict(counter) for kind, counter in vars(self.seen).items()} | {
            "gathered": dict(self.program.gathered),
            "gathers": sum(what == "all_gather" for what, *_ in self.program.calls),
            "now": self.device.now,
            "peak": self.device.peak,
        }

    def watched(self, name: str, act: Callable[[], Any]) -> Any:
        self.clear()
        found = act()
        self.note(name)
        return found

    def write(self) -> None:
        self.calls += self.program.calls
        self.notes |= {"calls": self.calls, "groups": self.program.groups}
        path = self.folder / f"seen-{self.case.rank}.json"
        path.write_text(json.dumps(self.notes))


def train(run: Run) -> None:
    """A few steps of the product's trainer, and what comes after them."""
    from ppcl_ds.training import trainer as module

    module.Watchdog = _NoWatchdog  # type: ignore[misc, assignment]
    _exchange_among_alike(run)
    trainer = _fine_tuner(run) if run.case.what == "finetune" else _distiller(run)
    run.note("built")
    trainer.prepare(0)
    run.note("prepared")
    batches = trainer.batches(0)
    for _ in range(run.case.steps - 1):
        trainer.step(batches)
    MISTAKES[run.case.mistake](trainer)
    run.watched("step", lambda: trainer.step(batches))
    run.watched("measured", trainer.measured)
    run.notes["events kept"] = len(getattr(trainer.engine.timers("train_batch"), "event_timers", ()))
    if "look" in run.case.then:
        _stub_decoder()
        if run.case.what == "finetune":
            _tell_shapes(run, trainer.engine)
        _note_forwards(run, trainer)
        for name, draws in (("figures", False), ("look", True)):
            run.samples = 0
            run.watched(name, partial(trainer.look, draws))
            run.notes[name]["samples"] = run.samples
    if "save" in run.case.then:
        _save_what_is_written(run, trainer)


def _note_forwards(run: Run, trainer: Any) -> None:
    """Count the samples that the whole model is run on."""

    def count(module: Any, given: Any, arguments: Any) -> None:
        run.samples += len(arguments["hidden_states"])

    trainer.sharded.module.register_forward_pre_hook(count, with_kwargs=True)


def _tell_shapes(run: Run, engine: Any) -> None:
    """What the last stage says of the variant's output: it is as what goes into it."""
    stock = engine.output

    def output(arguments: Any, size: Any) -> Tensor:
        run.program.told = arguments["hidden_states"].shape, torch.bfloat16
        return stock(arguments, size)

    engine.output = output


def _distiller(run: Run) -> Any:
    from ppcl_ds.distill.trainer import Trainer

    if run.case.offload and not run.case.heads:
        _nothing_in_cpu_memory()
    return Trainer(run.recipe, run.plan, run.teacher)


def _nothing_in_cpu_memory() -> None:
    """What lies in CPU memory is never written to, so that it takes none, however wide the teacher is."""
    from ppcl_ds.training.offload import Offload

    def send(self: Offload, part: int) -> None:
        self.parameters[part].copy_(self.masters[part], non_blocking=True)

    Offload.send = send  # type: ignore[method-assign]
    torch.optim.AdamW.step = lambda self, closure=None: None  # type: ignore[method-assign]


def _fine_tuner(run: Run) -> Any:
    """The variant `small`, from units that nobody has trained."""
    from deepspeed.runtime.pipe import engine

    from ppcl_ds.finetune.start import Start
    from ppcl_ds.finetune.trainer import FineTuner
    from ppcl_ds.teacher.files import Source
    from ppcl_ds.units.kinds import empty_unit
    from ppcl_ds.units.plan import UnitPlan

    def received(self: Any, stage: int) -> Any:
        """What the stage before says of its message: the streams of the micro-batch that is next here."""
        message = torch.empty(engine.TENSOR_META_SIZE, dtype=torch.int32, device=self.device)
        engine.p2p.recv(message, stage)
        batch = trainer.queue[0]
        arguments = batch.conditioning["arguments"]
        samples, image, _ = arguments["hidden_states"].shape
        tokens = image + arguments["encoder_hidden_states"].shape[1]
        width = run.case.config["num_attention_heads"] * 128
        return self._allocate_or_extend_buffers(0, [samples * tokens * width], torch.bfloat16)

    engine.PipelineEngine._recv_tensor_meta = received

    class Untrained(Start):
        """Units that are shapes alone, as the teacher is."""

        def units(self, unit: UnitPlan) -> dict[str, Source]:
            core = empty_unit(unit, self.teacher, torch.float32).core
            return {
                name: Source(t.shape, t.dtype, partial(torch.empty, t.shape, device="meta"))
                for name, t in core.state_dict().items()
            }

    settings = run.recipe.tuning
    trainer = FineTuner(Untrained(run.recipe, settings, "small", run.plan, run.teacher, None))
    for module in trainer.pipeline.stage.modules():
        for like in getattr(module, "like", ()):  # a block of another stage, which lends the names of its arguments
            run.device.leave_out(like)
    return trainer


def swaps(run: Run) -> None:
    """What `ppcl plan --from-run` measures."""
    from ppcl_ds.planning import measure
    from ppcl_ds.units.kinds import empty_unit

    class Trained:
        """A checkpoint of zeros."""

        def unit(self, name: str) -> dict[str, Tensor]:
            core = empty_unit(run.plan.unit(name), run.teacher, torch.float32).core
            return {key: torch.zeros(tensor.shape) for key, tensor in core.state_dict().items()}

    from ppcl_ds.teacher import files

    on_device = files.ModelFiles.tensor
    files.ModelFiles.tensor = lambda self, key: torch.zeros(  # type: ignore[method-assign]
        self._shapes[key], dtype=torch.bfloat16
    )
    bench = measure.SwapBench(run.recipe, run.teacher, run.plan, Trained(), torch.device("meta"))  # type: ignore[arg-type]
    files.ModelFiles.tensor = on_device  # type: ignore[method-assign]
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # units move there and back
    MISTAKES[run.case.mistake](bench)
    run.watched("products", bench.products)
    names = tuple(unit.name for unit in run.plan.units)
    run.watched("errors", lambda: bench.errors([names[:1], names[1:]]))
    # The other ranks time their blocks as this one does its own.
    count = len(run.teacher.blocks)
    measure.launch = SimpleNamespace(  # type: ignore[assignment]
        all_gather=lambda own: [dict.fromkeys(range(count), next(iter(own.values()))) | own]
    )
    run.watched("seconds", bench.seconds)


def probe(run: Run) -> None:
    """The sums and figures of `ppcl probe`."""
    from ppcl_ds.probing import probe as probing
    from ppcl_ds.probing.measure import measure
    from ppcl_ds.probing.part_files import Part

    reader = probing.open_reader(run.recipe, run.teacher, torch.device("meta"))
    lanes, blocks = reader.lanes, len(run.teacher.blocks)
    passes = 0

    def sums() -> Iterator[Any]:
        nonlocal passes
        for each in reader.sums(Part()):
            passes += 1
            yield each

    run.watched("probed", lambda: measure(lanes, sums(), blocks, 1e-6, lambda block: True))
    run.notes["passes"] = passes


def _shapes_for_weights() -> None:
    """Teachers without files: every tensor is an empty one, on the device."""
    from ppcl_ds.teacher.files import ModelFiles

    def tensor(self: ModelFiles, key: str) -> Tensor:
        return torch.empty(self._shapes[key], dtype=torch.bfloat16, device="meta")

    def flat_range(self: ModelFiles, key: str, start: int, stop: int) -> Tensor:
        return torch.empty(stop - start, dtype=torch.bfloat16, device="meta")

    ModelFiles.tensor, ModelFiles.flat_range = tensor, flat_range  # type: ignore[method-assign]


class _NoWatchdog:
    step = 0

    def __init__(self, timeout: float, folder: Path) -> None: ...

    def on_phase(self, phase: str) -> None: ...

    def alive(self) -> None: ...


def _exchange_among_alike(run: Run) -> None:
    """Stages are told of parcels like the one that this stage keeps for itself.

    Of the newest round, it is written down how many collectives it took, and how many the first micro-batch waited for.
    """
    import torch.distributed as dist

    from ppcl_ds.training.exchange import Exchange, _Layout

    call, gather = Exchange.__call__, dist.all_gather_object
    mine: dict[str, Any] = {}

    def noted(self: Any, batches: Any) -> Any:
        mine.update(stage=self.stage, layout=self._pack(batches, self.units[self.stage])[0])
        program = run.program
        sent, waited = sum(what == "all_to_all" for what, *_ in program.calls), program.waited["all_to_all"]
        arriving = call(self, batches)
        first = next(arriving)
        run.notes["exchange"] = {
            "flights": sum(what == "all_to_all" for what, *_ in program.calls) - sent,
            "first": program.waited["all_to_all"] - waited,
        }
        return chain([first], arriving)

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        gather(object_list, obj, group)
        if isinstance(obj, list) and obj and isinstance(obj[0], _Layout):
            for number in range(len(object_list)):
                if number != mine["stage"]:
                    object_list[number] = [mine["layout"] if i == mine["stage"] else o for i, o in enumerate(obj)]

    Exchange.__call__ = noted  # type: ignore[method-assign]
    dist.all_gather_object = all_gather_object


def _stub_decoder() -> None:
    """Images are the first channels of latents: no VAE is there."""
    from ppcl_ds.training import preview

    preview.Decoder = lambda *_: lambda latents, *args, **kwargs: latents[:, :3]  # type: ignore[assignment, misc]


def _save_what_is_written(run: Run, trainer: Any) -> None:
    from ppcl_ds.training import saver

    written: dict[str, int] = {}

    stock = saver.write_tensors

    def write_tensors(tensors: Any, path: Path, alive: Any) -> None:
        stock(tensors, path, alive)
        written.update({name: path.stat().st_size for name in tensors})

    saver.write_tensors = write_tensors
    # The ranks of a case do not wait for each other here, and the first one clears the folder.
    trainer.saver.folder /= f"rank-{run.case.rank}"
    problem = run.watched("save", lambda: trainer.saver.begin(run.case.steps)) or trainer.saver.end()[1]
    assert not problem, problem
    run.notes["written"] = written


def _argument_on_the_cpu(name: str, trainer: Any) -> None:
    read = trainer.read_teacher

    def mistaken(batch: Any) -> Any:
        value = batch.arguments[name]
        return read(replace(batch, arguments=batch.arguments | {name: torch.ones(value.shape, dtype=value.dtype)}))

    trainer.read_teacher = mistaken


def _exchange_on_the_cpu(trainer: Any) -> None:
    from ppcl_ds.training import exchange

    class Cpu:
        def current_device_name(self) -> str:
            return "cpu"

    exchange.get_accelerator = lambda: Cpu()


def _norms_on_the_cpu(trainer: Any) -> None:
    stock, norms = torch.linalg.vector_norm, iter(trainer.engine.optimizer.names)

    def mistaken(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        first = tensor.dim() == 1 and next(norms) == trainer.engine.optimizer.names[0]
        return torch.ones(()) if first else stock(tensor, *args, **options)

    torch.linalg.vector_norm = mistaken


class _Pageable:
    """A tensor in memory from which every copy is waited for."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def to(self, device: torch.device, non_blocking: bool) -> Tensor:
        return self.tensor.to(device)


def _copies_that_wait(trainer: Any) -> None:
    from ppcl_ds.training import delivery

    delivery.get_accelerator = lambda: SimpleNamespace(pin_memory=_Pageable)


def _order_forgotten(bench: Any) -> None:
    """After each forward, which is what nobody fetches ahead by then."""
    from ppcl_ds.teacher.sharded import forget_order

    stock = bench._velocity

    def velocity(*arguments: Any) -> Tensor:
        found = stock(*arguments)
        forget_order(bench.sharded)
        return found

    bench._velocity = velocity


MISTAKES: dict[str, Callable[[Any], None]] = {
    "": lambda trainer: None,
    "text": partial(_argument_on_the_cpu, "encoder_hidden_states"),
    "exchange": _exchange_on_the_cpu,
    "timestep": partial(_argument_on_the_cpu, "timestep"),
    "norms": _norms_on_the_cpu,
    "pageable": _copies_that_wait,
    "forgetful": _order_forgotten,
}

PROGRAMS: dict[str, Callable[[Run], None]] = {
    "distill": train,
    "finetune": train,
    "swaps": swaps,
    "probe": probe,
}


def main(case: str, folder: str) -> None:
    run = Run(Case.read(case), Path(folder))
    with run.device:
        PROGRAMS[run.case.what](run)
    run.write()


if __name__ == "__main__":
    main(*sys.argv[1:])
