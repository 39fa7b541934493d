"""How a step is shared out changes nothing: neither ranks and rounds, nor who has the pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.config import default_deepspeed
from phi3v.data import Dataset
from phi3v.data.batch import collate, model_inputs
from phi3v.model import Phi3VForCausalLM
from phi3v.prepare import prepare
from tests.commands import run_ranks
from tests.tiny import recipe, turn, write_jsonl

pytestmark = pytest.mark.slow

PACKS = 4
GRADIENT = 1e-6  # relative, of all parameters together; measured: 1.4e-7
LOSS = 1e-6  # relative; measured: 1.7e-7


def shares(kind: str, path: Path, out: Path, ranks: int) -> Any:
    """What tests/distributed/shares.py found."""
    script = Path(__file__).with_name("shares.py")
    run_ranks(ranks, script, kind, path, out)
    return torch.load(out, weights_only=False)


def config(folder: Path, batch: int, **changes: Any) -> Path:
    """The CPU's JSON for so many packs, without clipping."""
    path = default_deepspeed(has_cuda=False)
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {"train_batch_size": batch, "gradient_clipping": 0.0}
    content["zero_optimization"] |= changes
    (folder / "zero3.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "zero3.json"


def make_uneven_shards(catalogue: Path, model: Path, folder: Path) -> Path:
    """Seven samples for four packs: answers of many lengths, five of them about a picture."""
    pictures = sorted((catalogue / "images").iterdir())
    rows = []
    for number in range(7):
        images = [str(pictures[number])] if number < 5 else []
        question = "<|image_1|>\nWhat is it?" if images else "What is it?"
        rows.append(turn(question, "a boat " * (2 + 3 * number), images=images))
    source = {"path": str(write_jsonl(folder / "rows.jsonl", rows)), "format": "messages"}
    source["image_root"] = str(catalogue)
    prepare(recipe(model, folder / "shards", source))
    return folder / "shards"


def far(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all gradients, as a share of their norm."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[n] - theirs[n]).square().sum()) for n in ours)
    return (difference / sum(float(g.square().sum()) for g in theirs.values())) ** 0.5


def test_ranks_and_rounds_give_the_gradient_of_the_mean_over_the_steps_tokens(
    catalogue: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """4 x 1, 2 x 2 and 1 x 4, and all samples of the four packs in one, by torch alone."""
    shards = make_uneven_shards(catalogue, tiny_model, tmp_path)
    values = {
        "run": {"out": str(tmp_path / "run")},
        "model": {"path": str(tiny_model)},
        "data": {"shards": str(shards), "max_tokens": 160},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": 10},
        "eval": {"rows": 0},
        "deepspeed": str(config(tmp_path, PACKS)),
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    found = [shares("gradients", path, tmp_path / f"{n}.pt", n) for n in (1, 2, 4)]

    dataset, packs = Dataset(shards, "train"), found[0]["samples"]
    assert len({int(dataset.label_tokens[pack].sum()) for pack in packs}) == PACKS
    assert len({int(dataset.views[pack].sum()) for pack in packs}) > 1
    samples = [dataset[i] for pack in packs for i in pack]
    model = Phi3VForCausalLM.from_pretrained(tiny_model).train()
    batch = collate(samples)
    inputs = model_inputs(batch, dataset.view_settings, torch.device("cpu"))
    loss = model(**inputs) / batch.label_tokens
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    for of_ranks in found:
        assert of_ranks["samples"] == found[0]["samples"]
        assert of_ranks["loss"] == pytest.approx(float(loss.detach()), rel=LOSS)
        assert far(of_ranks["gradients"], expected) < GRADIENT


def test_no_rank_waits_whoever_has_pictures(tmp_path: Path) -> None:
    """Every parameter is gathered (threshold 0); a rank that skipped the tower would hang here.

    The ways of recomputing give the same losses, and a frozen tower others from the second step on.
    """
    path = config(tmp_path, 2, stage3_param_persistence_threshold=0)
    ways = shares("kinds", path, tmp_path / "kinds.pt", 2)
    *ways, only_layers = ways
    trained, frozen = ways[0], ways[1]
    assert len(trained) == 9 and trained[0] == frozen[0] == only_layers[0]
    assert len({losses[8] for losses in (trained, frozen, only_layers)}) == 3
    for number, losses in enumerate(ways):
        assert losses == pytest.approx((trained, frozen)[number % 2], rel=LOSS)
