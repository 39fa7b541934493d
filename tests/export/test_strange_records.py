"""A run folder whose files are data, but not such as a run writes, is refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.errors import CheckpointError
from phi3v.training.checkpoints.reading import map_weights

MODEL = "zero_pp_rank_0_mp_rank_00_model_states.pt"
OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
SHAPES = {"frozen_param_shapes": None, "param_shapes": [{"a.weight": torch.Size([2, 3])}]}


def masters(values: Any) -> dict[str, Any]:
    return {"optimizer_state_dict": {"fp32_flat_groups": values}}


def test_what_a_run_saves_is_mapped(tmp_path: Path) -> None:
    torch.save(SHAPES, tmp_path / MODEL)
    torch.save(masters([torch.arange(6.0)]), tmp_path / OPTIMIZER)
    assert map_weights(tmp_path)["a.weight"].read().tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        *(([], masters([torch.zeros(6)])), ({}, masters([torch.zeros(6)]))),
        *((torch.zeros(3), masters([])), (None, masters([])), (SHAPES, [])),
        *((SHAPES, masters(None)), (SHAPES, masters([torch.zeros(5)]))),
        ({**SHAPES, "param_shapes": [{"a.weight": [-1, 3]}]}, masters([torch.zeros(6)])),
        ({**SHAPES, "param_shapes": [{0: torch.Size([2, 3])}]}, masters([torch.zeros(6)])),
        ({**SHAPES, "frozen_param_shapes": {"b": torch.Size([1])}}, masters([torch.zeros(6)])),
    ],
)
def test_other_data_is_refused_with_the_checkpoint(
    tmp_path: Path, model: Any, optimizer: Any
) -> None:
    torch.save(model, tmp_path / MODEL)
    torch.save(optimizer, tmp_path / OPTIMIZER)
    with pytest.raises(CheckpointError, match=f"{tmp_path} does not hold what a run saves"):
        map_weights(tmp_path)
