"""The anatomy of a model by itself, without a teacher's folder."""

from __future__ import annotations

from torch import nn

from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.flows import Run, learn_flows
from tests.calls import call_once


def anatomy_of(model: nn.Module, run: Run = call_once) -> Anatomy:
    """Its flows are learned from one call of it."""
    return Anatomy(model, learn_flows(model, run))
