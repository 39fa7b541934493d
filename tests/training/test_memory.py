"""The arithmetic of memory gives what is counted in models, layers and engines of small size."""

import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phi3v.config import DeepSpeedConfig, load_deepspeed
from phi3v.config.schema import Checkpointing
from phi3v.data import loader
from phi3v.model import Phi3VConfig, Phi3VForCausalLM, loss
from phi3v.model.layers import DecoderLayer, TowerLayer
from phi3v.training import memory
from phi3v.training.memory import PUBLISHED, Pack, Sizes, gpu_memory, host_memory
from phi3v.training.optimizer import _decays, module_of
from tests.commands import ROOT, run
from tests.model.test_checkpointing import make_case, make_config, measure
from tests.model.test_configuration import PUBLISHED as PUBLISHED_CONFIG
from tests.model.tiny import make_model
from tests.training.bare import BARE

PACK = Pack(tokens=8192, views=52)


def deepspeed(name: str, ranks: int = 8, **changes: int) -> DeepSpeedConfig:
    """A shipped JSON for a number of ranks, whose packs per step are at least as many."""
    ds = load_deepspeed(ROOT / f"ds_configs/{name}.json", 1)
    content = ds.for_engine()
    content["train_batch_size"] = max(ranks, ds.train_batch_size)
    content["zero_optimization"] |= changes
    return replace(ds, world_size=ranks, json=content)


def counted(model: torch.nn.Module) -> list[memory.Tensor]:
    return [
        memory.Tensor(module_of(n), _decays(n, p), p.numel(), p.requires_grad)
        for n, p in model.named_parameters()
    ]


def test_every_parameter_of_the_published_model_is_in_its_place() -> None:
    config = Phi3VConfig.from_dict(PUBLISHED_CONFIG)
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    assert Sizes.of(config) == PUBLISHED
    assert list(PUBLISHED.tensors()) == counted(model)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2, "vocab_size": 500}])
def test_every_parameter_of_another_model_is_in_its_place(changes: dict[str, int]) -> None:
    model = make_model(**changes)
    sizes = Sizes.of(model.config)
    assert list(sizes.tensors()) == counted(model)
    language = sum(t.elements for t in counted(model) if t.module == "language")
    assert sizes.trained(["language"]) == sizes.trained() - language


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_layers_keep_what_is_counted(how: Checkpointing) -> None:
    """In float32, whose norms keep float32 as CUDA's do in bf16; the tower's SDPA is flash."""
    config = make_config()
    sizes = Sizes.of(config)
    decoder = memory.layer_bytes(sizes, how, number=4, sdpa=True)
    assert measure(make_case(DecoderLayer), how)[0] == pytest.approx(decoder, abs=0.1)
    tower = memory.tower_layer_bytes(sizes, how, number=4)
    assert measure(make_case(TowerLayer), how)[0] == pytest.approx(tower, abs=0.1)


def test_layers_of_the_published_model_keep_what_was_counted_on_fake_cuda_tensors() -> None:
    """Bytes per token in bf16 by none, selective, full; 39.4, 23.8, 5.1 GB at the peak."""
    ways: tuple[Checkpointing, ...] = ("none", "selective", "full")
    assert [memory.layer_bytes(PUBLISHED, how) for how in ways] == [82056, 69760, 6144]
    assert [memory.tower_layer_bytes(PUBLISHED, how) for how in ways] == [24656, 20544, 2048]
    peaks = (("none", "none", 39.4), ("none", "full", 23.8), ("full", "full", 5.1))
    for decoder, tower, gigabytes in peaks:
        pack = replace(PACK, checkpointing=decoder, tower_checkpointing=tower)
        use = gpu_memory(PUBLISHED, deepspeed("zero3"), pack)
        found = (use.layers + use.edges + use.head + use.working) / 1e9
        assert found == pytest.approx(gigabytes, rel=0.03)


class Peak(TorchDispatchMode):
    """The most bytes that the results of operations took together, beside what was there."""

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.known or storage.nbytes() == 0:
            return
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def forget() -> None:
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, forget)


@pytest.mark.parametrize("vocabulary", [1000, 4000])
def test_the_head_takes_memory_by_its_vocabulary(vocabulary: int) -> None:
    width, labels = 32, 2 * loss.CHUNK + 100
    sizes = replace(PUBLISHED, width=width, vocabulary=vocabulary)
    head = loss.Head(width, vocabulary)
    hidden = torch.randn(labels, width, requires_grad=True)
    targets = torch.zeros(labels, dtype=torch.long)
    with Peak(head.weight, hidden, targets) as peak:
        head(hidden, targets)
    chunk, kept = memory.head_bytes(sizes, Pack(tokens=5000, views=0, labels=labels), number=4)
    assert peak.most == pytest.approx(chunk + kept, rel=0.02)


def test_the_head_of_a_large_vocabulary_does_not_take_what_the_published_takes() -> None:
    large = replace(PUBLISHED, vocabulary=4 * PUBLISHED.vocabulary)
    pack = replace(PACK, labels=0)
    assert sum(memory.head_bytes(large, replace(PACK, labels=1024))) > 3.9 * sum(
        memory.head_bytes(PUBLISHED, replace(PACK, labels=1024))
    )
    assert memory.head_bytes(PUBLISHED, pack)[0] == 0


def test_constants_are_those_of_the_code_they_are_about() -> None:
    from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert memory.CHUNK == loss.CHUNK
    assert memory.READ_AHEAD == loader.AHEAD
    assert memory.JOINED_ELEMENTS == MEMORY_OPT_ALLREDUCE_SIZE
    stock = DeepSpeedZeroConfig()
    for key, value in memory.DEFAULTS.items():
        assert getattr(stock, key.removeprefix("stage3_")) == value


@pytest.mark.slow
def test_engines_hold_what_the_formulas_say(tmp_path: Path) -> None:
    """Every kind of JSON on one rank: buckets, what they are joined to, gradients, optimizer."""
    sizes = Sizes.of(make_model().config)
    for name in ("zero1", "zero2", "zero3", "zero3_offload"):
        content = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
        content |= {"train_batch_size": 1}
        content["optimizer"]["params"]["torch_adam"] = True
        zero = content["zero_optimization"]
        zero["reduce_bucket_size"] = sizes.trained(["projector"])
        if zero["stage"] == 3:
            zero["sub_group_size"] = 10_000
        if "offload_optimizer" in zero:
            zero["offload_optimizer"]["pin_memory"] = False
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    script = Path(__file__).with_name("states.py")
    done = run(sys.executable, script, tmp_path, cwd=ROOT, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found").read_text())
    assert len(found) == 4
    for name, numbers in found.items():
        assert numbers["found"] == numbers["expected"], name


def test_sub_groups_are_cut_after_the_parameter_that_fills_them() -> None:
    whole = memory.optimizer_shares(PUBLISHED, deepspeed("zero3", 8))
    cut = memory.optimizer_shares(PUBLISHED, deepspeed("zero3", 8, sub_group_size=10**8))
    assert len(cut) > len(whole) == 8
    assert sum(cut) == sum(whole) == pytest.approx(PUBLISHED.trained() / 8, rel=1e-6)
    assert max(cut) < 10**8 + 2 * 3072 * 8192 // 8 + 1


def test_staging_is_rounded_and_is_not_needed_where_the_optimizer_is_offloaded() -> None:
    """61.6 GB a node of 8 for 49.6 of state."""
    node = 8 * memory.staging_bytes(PUBLISHED, deepspeed("zero3", 8))
    assert node == pytest.approx(61.6e9, rel=1e-3)
    assert 12 * PUBLISHED.trained() == pytest.approx(49.6e9, rel=1e-3)
    offload = host_memory(PUBLISHED, deepspeed("zero3_offload", 1), PACK)
    assert offload.staging == 0
    assert 82e9 < offload.states + offload.gradients < 89e9
    first = memory.staging_bytes(PUBLISHED, deepspeed("zero2", 8), is_first=True)
    assert first - memory.staging_bytes(PUBLISHED, deepspeed("zero2", 8)) > 2 * PUBLISHED.parameters


def test_a_frozen_tower_takes_neither_gradient_nor_optimizer() -> None:
    ds = deepspeed("zero3", 8)
    tower = PUBLISHED.trained() - PUBLISHED.trained(["vision"])
    saved = memory.state_bytes(PUBLISHED, ds)[0] - memory.state_bytes(PUBLISHED, ds, ["vision"])[0]
    assert saved == pytest.approx(16 * tower / 8)


def test_offloaded_activations_wait_on_the_host() -> None:
    pack = replace(PACK, checkpointing="full", tower_checkpointing="full", offload=True)
    ds = deepspeed("zero3", 8)
    assert gpu_memory(PUBLISHED, ds, pack).layers == 0
    kept = gpu_memory(PUBLISHED, ds, replace(pack, offload=False)).layers
    assert kept <= host_memory(PUBLISHED, ds, pack).activations < 2 * kept


@pytest.mark.parametrize(("size", "taken"), [(1, 1), (4, 4), (5, 8), (2**30 + 1, 2**31)])
def test_pinned_memory_comes_in_powers_of_two(size: int, taken: int) -> None:
    assert memory.pinned(size) == taken


def test_the_arithmetic_needs_no_torch() -> None:
    code = BARE + "import phi3v.training.memory\nassert 'torch' not in sys.modules"
    done = run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
