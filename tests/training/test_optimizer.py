"""The sum of gradients is that of the stock optimizer, to the last bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from ppcl_ds.training.optimizer import UnitOptimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_summed_as_the_stock_optimizer_sums_them(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(7, 5, generator=generator).to(dtype) for _ in range(9)]
    sums = []
    for optimizer in (UnitOptimizer, BF16_Optimizer):
        own: Any = SimpleNamespace(
            fp32_groups_gradients=[[torch.zeros(35)]], fp32_groups_has_gradients=[[False]], autoep_folding_tp_group=None
        )
        parameter = torch.nn.Parameter(torch.zeros(7, 5, dtype=dtype))
        optimizer._update_hp_grad(own, parameter, 0, 0, clear_lp_grads=False)
        assert own.fp32_groups_has_gradients == [[False]], "there is none yet"
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer._update_hp_grad(own, parameter, 0, 0, clear_lp_grads=False)
        assert own.fp32_groups_has_gradients == [[True]]
        sums.append(own.fp32_groups_gradients[0][0])
    assert torch.equal(*sums)
    assert sums[0].dtype == torch.float32
