"""What is asked of DeepSpeed and read from it, on engines of one rank in this process."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import z3_leaf_module
from torch import distributed

from phi3v.config import MODULES, load_deepspeed
from phi3v.errors import CheckpointError
from phi3v.model import LAYERS
from phi3v.training import zero
from phi3v.training.checkpoints.convert import convert, load
from phi3v.training.checkpoints.store import SavedFile, write_manifest
from phi3v.training.optimizer import learning_rates, parameter_groups
from tests.commands import ROOT
from tests.distributed.steps import one_step, packs, recipe
from tests.model.tiny import draw, make_model, pack
from tests.training.planted import plant, seal

# Of torch 2.13 about what DeepSpeed calls.
pytestmark = pytest.mark.filterwarnings("ignore:.*_tensor. is deprecated:FutureWarning")

CLIPPING = 1e-3
TEXT = {"a text": [pack([draw(0, 12)])], "another text": [pack([draw(1, 15), draw(2, 4)])]}


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    """A group of this process alone, which leaves nothing for the tests of other files."""
    before = dict(os.environ)
    os.environ["LOCAL_RANK"] = "0"
    operators, deepspeed.ops.__compatible_ops__ = deepspeed.ops.__compatible_ops__, {}
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)
    yield
    distributed.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    deepspeed.ops.__compatible_ops__ = operators
    os.environ.clear()
    os.environ.update(before)


def engine_of(name: str, folder: Path, **of_zero: int) -> Any:
    """The tiny model under a shipped JSON, in float32, clipped to far less than its gradient."""
    content = json.loads((ROOT / "ds_configs" / name).read_text(encoding="utf-8"))
    content = {k: v for k, v in content.items() if not k.endswith(("_type", "_types"))}
    content |= {"train_batch_size": 1, "gradient_clipping": CLIPPING, "bf16": {"enabled": False}}
    content["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    content["zero_optimization"] |= of_zero
    path = folder / name
    path.write_text(json.dumps(content))
    model, cfg = make_model().train(), recipe(1e-3, [])
    engine = zero.build_engine(model, parameter_groups(model, cfg), load_deepspeed(path, 1))
    zero.set_learning_rates(engine, learning_rates(1, 1000, cfg))
    return engine


@pytest.mark.parametrize("name", ["zero1.json", "zero2.json", "zero3.json"])
def test_the_norms_that_are_told_are_those_before_clipping(name: str, tmp_path: Path) -> None:
    """Of plain torch's, rounding apart; they are clipped to less than 1e-4 of them."""
    (batch,) = packs(1, 1)
    plain = make_model().train()
    plain(**batch).backward()
    gradients = [p.grad for p in plain.parameters() if p.grad is not None]
    expected = float(torch.nn.utils.get_total_norm(gradients))
    engine = engine_of(name, tmp_path)
    one_step(engine, [batch])
    total, norms = zero.gradient_norms(engine)
    assert total == pytest.approx(expected, rel=1e-5) and total > 1e4 * CLIPPING
    assert set(norms) == set(MODULES)
    assert math.hypot(*norms.values()) == pytest.approx(total, rel=1e-5)
    engine.destroy()


def test_groups_have_their_share_of_their_modules_learning_rate(tmp_path: Path) -> None:
    """The recipe halves the rate from each layer of the tower to the one before it."""
    engine = engine_of("zero3.json", tmp_path)
    zero.set_learning_rates(engine, dict.fromkeys(MODULES, 1.0) | {"vision": 8.0})
    found = {(group["name"], group["lr"]) for group in engine.optimizer.param_groups}
    assert {rate for name, rate in found if name == "vision"} == {8.0, 4.0, 2.0}
    assert {rate for name, rate in found if name != "vision"} == {1.0}
    engine.destroy()


def gathered(engine: Any) -> list[tuple[bool, list[int]]]:
    """Fills up with what each gathering from all ranks holds: forward or not, and its ids."""
    found: list[tuple[bool, list[int]]] = []
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    name = "_PartitionedParameterCoordinator__all_gather_params"  # the only one that gathers
    gather = getattr(coordinator, name)

    def gather_and_note(params: Any, forward: bool) -> Any:
        found.append((forward, sorted(p.ds_id for p in params)))
        return gather(params, forward)

    setattr(coordinator, name, gather_and_note)
    return found


def test_a_layer_is_gathered_at_once_and_packs_without_pictures_gather_what_others_do(
    tmp_path: Path,
) -> None:
    """Else a rank of a text would wait for ranks that gather the tower, until the timeout."""
    keys = (
        *("stage3_param_persistence_threshold", "stage3_max_live_parameters"),
        *("stage3_max_reuse_distance", "stage3_prefetch_bucket_size"),
    )
    engine = engine_of("zero3.json", tmp_path, **dict.fromkeys(keys, 0))
    modules = list(engine.module.modules())
    leaves = [module for module in modules if z3_leaf_module(module)]
    assert leaves == [module for module in modules if isinstance(module, LAYERS)] != []
    one_step(engine, TEXT["a text"])  # DeepSpeed's first step finds out what the others need
    found, sequences = gathered(engine), {}
    for kind, batches in (TEXT | {"pictures": packs(1, 1)}).items():
        found.clear()
        one_step(engine, batches)
        sequences[kind] = list(found)
    assert sequences["a text"] == sequences["another text"] == sequences["pictures"] != []
    of_layers = {tuple(sorted(p.ds_id for p in leaf.parameters())) for leaf in leaves}
    used = of_layers & {tuple(ids) for is_forward, ids in found if is_forward}
    assert len(used) == len(leaves) - 1  # the tower's last layer is not used
    engine.destroy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint of one rank, as DeepSpeed writes it, and of its universal form."""
    folder = tmp_path_factory.mktemp("saved")
    engine = engine_of("zero3.json", folder)
    one_step(engine, packs(1, 1))
    engine.save_checkpoint(str(folder), tag="step", save_latest=False)
    engine.destroy()
    facts = {"step": 3, "world_size": 1, "zero_stage": 3}
    files = {path.name: SavedFile.of(path) for path in (folder / "step").iterdir()}
    write_manifest(folder / "step", facts, files)
    convert(folder / "step", folder / "universal")
    return folder


FILES = ("step/*model_states.pt", "step/*optim_states.pt")
UNIVERSAL = ("universal/*model_states.pt", "universal/zero/optimizer_state.pt")
UNIVERSAL += ("universal/zero/lm_head.weight/exp_avg.pt",)


@pytest.mark.parametrize("pattern", [*FILES, *UNIVERSAL])
def test_what_is_planted_in_a_checkpoint_does_not_run_where_deepspeed_loads_it(
    pattern: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    (planted,) = (tmp_path / "copy").glob(pattern)
    engine = engine_of("zero3.json", tmp_path)
    load_whole(engine, tmp_path / "copy", pattern)
    plant(planted, tmp_path / "RAN")
    with pytest.raises(CheckpointError, match=f"^{planted} names posix.system, which is code"):
        load_whole(engine, tmp_path / "copy", pattern)
    assert not (tmp_path / "RAN").exists()
    engine.destroy()


def load_whole(engine: Any, folder: Path, pattern: str) -> None:
    if pattern in FILES:
        zero.load_checkpoint(engine, folder, "step")
    else:
        load(engine, folder / "universal")


@pytest.mark.parametrize("pattern", FILES)
def test_nor_where_deepspeed_converts_it(pattern: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "step", tmp_path / "step")
    (planted,) = tmp_path.glob(pattern)
    plant(planted, tmp_path / "RAN")
    seal(tmp_path / "step")
    with pytest.raises(CheckpointError, match=f"^{planted} names posix.system, which is code"):
        convert(tmp_path / "step", tmp_path / "universal")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step"]


def test_a_weight_whose_name_is_a_path_is_refused_before_anything_is_written(
    saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / "step", tmp_path / "step")
    (planted,) = (tmp_path / "step").glob("*model_states.pt")
    state = torch.load(planted, weights_only=False)
    shapes = state["param_shapes"][0]
    shapes[f"{tmp_path}/home"] = shapes.pop(next(iter(shapes)))
    torch.save(state, planted)
    seal(tmp_path / "step")
    with pytest.raises(
        CheckpointError, match=f"{planted} names a weight '{tmp_path}/home', which "
    ):
        convert(tmp_path / "step", tmp_path / "universal")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step"]


def test_values_come_from_every_rank_and_from_the_first_as_json_says_them() -> None:
    value = {"row": [1, None, 0.1, float("inf")], "text": "\ud800 \u2028 \u00e9"}
    assert zero.gather_objects(value) == [value]
    assert zero.from_first_rank(value) == value
    with pytest.raises(TypeError, match="not JSON serializable"):
        zero.from_first_rank(Path("a"))


def test_a_mistake_of_the_first_rank_is_raised_as_what_it_is() -> None:
    def fail() -> None:
        raise CheckpointError("no room")

    with pytest.raises(CheckpointError, match="^no room$"):
        zero.first_rank_does(fail, is_first=True)
