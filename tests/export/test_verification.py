"""An export is compared with its checkpoint before it is announced; what differs is found."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phi3v.errors import CheckpointError
from phi3v.export import export, folder
from phi3v.export.verification import by_layers, compare_logits, compare_tensors, is_same
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.training.checkpoints.reading import CheckpointWeights, open_weights
from tests.export.runs import expected, read
from tests.training.saved import flip


@pytest.fixture(scope="module")
def exported(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verified") / "out"
    export(made, out)
    return out


@pytest.fixture
def written(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export that a test may damage."""
    return shutil.copytree(exported, tmp_path / "out")


@pytest.fixture(scope="module")
def weights(made: Path) -> CheckpointWeights:
    return open_weights(made / "checkpoints")


def test_a_tensor_that_came_back_changed_is_named(
    written: Path, weights: CheckpointWeights
) -> None:
    names, kind = list(weights.shapes()), torch.float32
    compare_tensors(written, weights, names, kind)
    flip(written / "model.safetensors", -1)
    with pytest.raises(CheckpointError, match="does not read back as written: lm_head.weight; che"):
        compare_tensors(written, weights, names, kind)
    with pytest.raises(CheckpointError, match="does not hold the tensors it should: lm_head.wei"):
        compare_tensors(written, weights, names[:-1], kind)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"rms_norm_eps": 0.1}),
        ("config.json", {"rope_theta": 100.0}),
        ("config.json", {"vision_config": {"layer_norm_eps": 0.1}}),
    ],
)
def test_equal_weights_in_another_model_are_found_by_their_logits(
    written: Path, weights: CheckpointWeights, tiny_model: Path, file: str, change: dict[str, Any]
) -> None:
    config = Phi3VConfig.from_pretrained(tiny_model)
    compare_logits(written, weights, config, torch.float32)
    content = read(written / file)
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    (written / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="gives other logits than .*step-00000003, by up to"):
        compare_logits(written, weights, config, torch.float32)


def test_the_other_side_computes_with_the_checkpoint_and_holds_no_layer(
    weights: CheckpointWeights, tiny_model: Path
) -> None:
    config = Phi3VConfig.from_pretrained(tiny_model)
    whole = Phi3VForCausalLM(config).eval()
    whole.load_state_dict(expected(tiny_model, 3))
    layered = by_layers(weights, config, torch.float32)
    ids = torch.arange(10, 20)[None]
    with torch.inference_mode():
        logits = [model(ids).logits for model in (whole, layered)]
    assert torch.equal(*logits)
    assert all(p.is_meta for p in layered.model.layers.parameters())


def test_equal_means_every_bit() -> None:
    def tensor(*values: float) -> Tensor:
        return torch.tensor(values)

    assert is_same(tensor(float("nan"), 1.0), tensor(float("nan"), 1.0))
    assert not is_same(tensor(0.0), tensor(-0.0))
    assert not is_same(tensor(1.0), tensor(1.0).bfloat16())
    assert not is_same(tensor(1.0), tensor(1.0, 1.0))


def test_what_fails_its_verification_does_not_get_the_name(
    made: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(partial: Path, *_: Any) -> None:
        flip(partial / "model.safetensors", -1)

    out = shutil.copytree(exported, tmp_path / "out")
    (out / "old").write_text("")
    monkeypatch.setattr(folder, "write_card", lambda run, manifest, partial: spoil(partial))
    with pytest.raises(CheckpointError, match="does not read back"):
        export(made, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out"]
    assert (out / "old").exists()
    monkeypatch.undo()
    export(made, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "old").exists()
