"""Loading under ZeRO-3 puts each parameter straight into its partition."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from phi3v.model import Phi3VForCausalLM
from phi3v.samples.tiny import TinySizes, tiny_config, train_tokenizer
from tests.commands import run_ranks

pytestmark = pytest.mark.slow

SIZES = TinySizes(width=1024, mlp_width=4096, layers=12, heads=8, vision_width=512, vision_heads=8)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """A folder of 190 million bf16 parameters; its bytes, and those of its largest tensor."""
    folder = tmp_path_factory.mktemp("large")
    config = tiny_config(SIZES, train_tokenizer(["one two"], 20))
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    random = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(p.shape, generator=random).to(torch.bfloat16)
        for name, p in model.named_parameters()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    sizes = [2 * math.prod(p.shape) for p in weights.values()]
    return folder, sum(sizes), max(sizes)


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_holds_more_than_its_share_and_two_tensors(
    large: tuple[Path, int, int], ranks: int, tmp_path: Path
) -> None:
    folder, total, largest = large
    script = Path(__file__).with_name("loading.py")
    run_ranks(ranks, script, folder, tmp_path)
    # Measured: 1.00 x share + 1.1 x largest tensor, with 2 ranks and with 4.
    limit = 1.3 * total / ranks + 2 * largest
    assert limit < 0.9 * total, "too small a model to tell a share from the whole"
    for rank in range(ranks):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["is_right"], f"rank {rank} gathered other values than the file holds"
        assert result["peak"] < limit, f"rank {rank}: {result['peak']:,} of {limit:,.0f} bytes"
