"""The DeepSpeed JSON is refused where DeepSpeed would ignore it or another file owns the value."""

import json
from pathlib import Path
from typing import Any

import pytest

from phi3v.config import default_deepspeed, load_deepspeed
from phi3v.errors import ConfigError

SHIPPED = sorted(default_deepspeed(has_cuda=True).parent.glob("*.json"))


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def content(**changes: Any) -> dict[str, Any]:
    """A small valid JSON with some top-level keys changed; None removes a key."""
    valid = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}},
        "zero_optimization": {"stage": 3},
    }
    return {key: value for key, value in {**valid, **changes}.items() if value is not None}


def refusal(text: str | bytes, world_size: int = 1) -> str:
    Path("zero3.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_deepspeed(Path("zero3.json"), world_size)
    return str(caught.value)


def change_refusal(**changes: Any) -> str:
    return refusal(json.dumps(content(**changes)))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_shipped_json_is_accepted_on_1_2_4_and_8_ranks(path: Path, world_size: int) -> None:
    ds = load_deepspeed(path, world_size)
    assert ds.micro_batch * ds.accumulation * world_size == ds.train_batch_size
    assert ds.decouples_decay


def test_the_default_is_bf16_on_cuda_and_float32_elsewhere() -> None:
    cuda, cpu = (load_deepspeed(default_deepspeed(has_cuda), 2) for has_cuda in (True, False))
    assert (cuda.path.name, cuda.bf16) == ("zero3.json", True)
    assert (cpu.path.name, cpu.bf16) == ("zero3_cpu.json", False)


def test_the_properties_say_what_the_file_says() -> None:
    Path("zero3.json").write_text(json.dumps(content(gradient_clipping=1, bf16={"enabled": True})))
    ds = load_deepspeed(Path("zero3.json"), 4)
    assert (ds.train_batch_size, ds.micro_batch, ds.accumulation) == (64, 1, 16)
    assert (ds.zero_stage, ds.bf16, ds.gradient_clipping, ds.optimizer_type) == (
        3,
        True,
        1.0,
        "AdamW",
    )


def test_what_the_engine_edits_does_not_reach_the_config() -> None:
    ds = load_deepspeed(default_deepspeed(has_cuda=False), 2)
    ds.for_engine()["zero_optimization"]["stage"] = 0
    assert ds.zero_stage == 3 and ds.for_engine() == ds.json


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"type": "AdamW"}, True),
        ({"type": "Adam"}, True),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, False),
        ({"type": "Adagrad"}, False),
    ],
)
def test_adam_decouples_weight_decay_unless_told_not_to(optimizer: dict, expected: bool) -> None:
    Path("a.json").write_text(json.dumps(content(optimizer=optimizer)))
    assert load_deepspeed(Path("a.json"), 1).decouples_decay is expected


@pytest.mark.parametrize(
    ("batch", "world_size", "advice"),
    [
        (64, 24, "use 72 or 96, or 16 ranks"),
        (8, 24, "use 24 or 48, or 8 ranks"),
        (7, 2, "use 8 or 10, or 1 rank"),
    ],
)
def test_a_batch_that_ranks_cannot_share_is_refused(
    batch: int, world_size: int, advice: str
) -> None:
    assert refusal(json.dumps(content(train_batch_size=batch)), world_size) == (
        f"zero3.json: train_batch_size {batch} is not divisible by 1 pack x {world_size} ranks; "
        f"{advice}"
    )


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^DeepSpeed config no\.json does not exist; name"):
        load_deepspeed(Path("no.json"), 1)


def test_broken_json_is_refused_with_its_line() -> None:
    assert refusal('{\n  "bf16": {,\n}').startswith("zero3.json is not valid JSON at line 2: ")


def test_a_key_written_twice_is_refused() -> None:
    assert refusal('{"bf16": {}, "bf16": {}}') == (
        "zero3.json is not valid JSON: key 'bf16' is there twice"
    )


def test_a_file_that_is_no_text_is_refused() -> None:
    assert refusal(b'{"a": "\xff"}').startswith("zero3.json is not valid JSON: ")


def test_a_file_that_is_not_an_object_is_refused() -> None:
    assert refusal("[1]") == "zero3.json must hold a JSON object, got [1]"


def test_an_unknown_key_is_refused_with_the_nearest_name() -> None:
    assert change_refusal(zero_optimisation={"stage": 3}) == (
        "unknown key 'zero_optimisation' in zero3.json; did you mean 'zero_optimization'?"
    )


def test_an_unknown_key_like_no_other_is_refused_with_the_known_ones() -> None:
    message = change_refusal(q=1)
    assert message.startswith("unknown key 'q' in zero3.json; known are train_batch_size, ")


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("train_batch_size", {"train_batch_size": None}),
        ("train_micro_batch_size_per_gpu", {"train_micro_batch_size_per_gpu": None}),
        ("optimizer.type", {"optimizer": {"params": {}}}),
        ("zero_optimization.stage", {"zero_optimization": {}}),
    ],
)
def test_a_missing_key_is_refused(key: str, changes: dict[str, Any]) -> None:
    assert change_refusal(**changes) == f"missing key {key!r} in zero3.json; state it there"


@pytest.mark.parametrize(
    ("key", "value", "changes"),
    [
        ("gradient_accumulation_steps", 4, {"gradient_accumulation_steps": 4}),
        ("scheduler", {"type": "WarmupLR"}, {"scheduler": {"type": "WarmupLR"}}),
        ("optimizer.params.lr", 0.1, {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}),
        (
            "optimizer.params.weight_decay",
            0,
            {"optimizer": {"type": "Adam", "params": {"weight_decay": 0}}},
        ),
        (
            "optimizer.params.max_grad_norm",
            1,
            {"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}},
        ),
        ("activation_checkpointing", {}, {"activation_checkpointing": {}}),
        ("wandb", {"enabled": True}, {"wandb": {"enabled": True}}),
    ],
)
def test_a_value_owned_elsewhere_is_refused(
    key: str, value: object, changes: dict[str, Any]
) -> None:
    message = change_refusal(**changes)
    assert message.startswith(f"zero3.json: {key} must not be written, got {value!r}; ")


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("train_batch_size", {"train_batch_size": "auto"}),
        ("bf16.enabled", {"bf16": {"enabled": "auto"}}),
        ("data_types.kept[1]", {"data_types": {"kept": ["norm", "auto"]}}),
    ],
)
def test_auto_is_refused_wherever_it_stands(key: str, changes: dict[str, Any]) -> None:
    assert change_refusal(**changes) == (
        f"zero3.json: {key} is 'auto', which has no meaning here; write it out"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": "64"}, "train_batch_size must be int, got '64'"),
        ({"train_batch_size": True}, "train_batch_size must be int, got True"),
        ({"train_batch_size": 0}, "train_batch_size must be at least 1, got 0"),
        (
            {"train_micro_batch_size_per_gpu": 2},
            "train_micro_batch_size_per_gpu must be 1, got 2; one pack is one micro-batch, and "
            "data.max_tokens sets its size",
        ),
        ({"bf16": {"enabled": 1}}, "bf16.enabled must be bool, got 1"),
        ({"gradient_clipping": "1"}, "gradient_clipping must be float, got '1'"),
        ({"gradient_clipping": -1}, "gradient_clipping must be at least 0, got -1.0"),
        (
            {"zero_optimization": {"stage": 4}},
            "zero_optimization.stage must be 0, 1, 2 or 3, got 4",
        ),
        (
            {"fp16": {"enabled": True}},
            "fp16.enabled must be false, got true; float16 needs loss scaling, which skips steps; "
            "use bf16.enabled, or neither for float32",
        ),
    ],
)
def test_a_wrong_value_is_refused(changes: dict[str, Any], message: str) -> None:
    assert change_refusal(**changes) == f"zero3.json: {message}"
