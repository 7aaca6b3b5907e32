"""The section of a recipe that says which variants to make, and how they are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ppcl_ds.shipped import shipped
from ppcl_ds.strict import Section

Rule = Literal["error", "ppcl", "influence", "uniform", "random", "given"]
"""How spans are chosen from what the probe found."""


Objective = Literal["pictures", "velocity", "branches", "draw"]
"""What is to be small in a plan that is chosen from a run."""


class Plan(Section):
    """Which variants to make."""

    variants: dict[str, Annotated[float, Field(gt=0.0, lt=1.0)]] = Field(default_factory=dict)
    """Name of each variant and the share of the blocks' budget that it gives up."""
    budget: Literal["parameters", "memory", "latency"] = "parameters"
    """What the share is of: parameters; bytes of the weights as they run; or time, which `--from-run` measures block by
    block on the device at hand (until then, parameters stand for it)."""
    rule: Rule = "error"
    """How spans are chosen. `error`: the least total `error(u, v)`. `ppcl`: the paper's spans, those of least error.
    `influence`: blocks whose output is most like their input go first. `uniform`: evenly spread. `random`: what any
    rule has to beat. `given`: the units and variants of the plan file `given`; other variants are chosen from these."""
    candidates: tuple[Rule, ...] = ()
    """Rules whose spans join the library, though no variant plugs them yet: `ppcl plan --from-run` chooses anew among
    all units, once they have been trained a little."""
    given: Path | None = None
    """A plan file for rule `given`. `plans/qwen_image_published.yaml` ships with the package: what the authors of PPCL
    chose for Qwen-Image."""
    max_span: int = Field(default=6, ge=2)
    """Longest span, in blocks, that rule `error` considers."""
    width: tuple[Literal["text", "ffn", "narrow"], ...] = ()
    """Width units that join the library as candidates, for every block that has what they need. `text`: the text stream
    of two neighbours becomes linear; `ffn`: a feed-forward becomes one linear; `narrow`: it keeps its most important
    hidden channels. Needs `ppcl plan --from-run`, which then chooses between them and spans under one budget."""
    objective: Objective = "pictures"
    """What `--from-run` chooses by: errors against the teacher, each measured. `velocity`: of one step, with the
    guidance of `evaluate`. `branches`: of what the velocities with and without the prompt differ by. `draw`: of images
    drawn in `evaluate.few_steps` steps. `pictures`: the mean of the logarithms of `velocity` and `draw`."""
    unit_steps: int | None = Field(default=None, gt=0)
    """What training may cost in all: optimizer steps of units, added up, with those that `--from-run` finds spent. It
    then chooses units and steps together: variants that share units leave more steps to each. Default: `distill.steps`
    for every unit, however many there are."""
    prompts: int = Field(default=32, gt=0)
    """Held-out prompts that `--from-run` draws with each unit and set of units."""
    narrow_keep: float = Field(default=0.25, gt=0, lt=1)
    """Share of hidden channels that `narrow` keeps."""

    @field_validator("given")
    @classmethod
    def _may_be_shipped(cls, given: Path | None) -> Path | None:
        return shipped(str(given)) if given and not given.exists() and shipped(str(given)).exists() else given

    @model_validator(mode="after")
    def _has_what_its_rules_need(self) -> Plan:
        if "given" in (self.rule, *self.candidates) and self.given is None:
            raise ValueError("given is missing: the plan file whose spans rule `given` takes")
        if not self.variants and self.rule != "given":
            raise ValueError("variants is empty; name at least one, with the share that it gives up")
        return self
