"""The DeepSpeed JSON is refused where DeepSpeed would ignore it or another file owns the value."""

import json
from pathlib import Path
from typing import Any

import pytest

from phi3v.config import deepspeed_overrides, default_deepspeed, load_deepspeed
from phi3v.config.keys import SECTIONS, STAGE_KEYS
from phi3v.errors import ConfigError

SHIPPED = sorted(default_deepspeed(has_cuda=True).parent.glob("*.json"))


BF16: dict[str, Any] = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}


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


def test_shipped_files_in_bf16_add_up_in_float32() -> None:
    for path in SHIPPED:
        ds = load_deepspeed(path, 8)
        if ds.bf16:
            kept = (ds.json["data_types"]["grad_accum_dtype"], ds.json["communication_data_type"])
            assert kept == ("fp32", "fp32"), path.name


def test_the_docs_explain_every_file_and_key() -> None:
    docs = (SHIPPED[0].parents[1] / "docs" / "deepspeed.md").read_text(encoding="utf-8")
    for path in SHIPPED:
        assert f"| `{path.name}` |" in docs
        content = json.loads(path.read_text(encoding="utf-8"))
        keys = {*content, *content["zero_optimization"]} - {"zero_optimization"}
        for key in keys | content["optimizer"]["params"].keys():
            assert f"`{key}`" in docs, f"{key} of {path.name}"


def test_the_default_is_bf16_on_cuda_and_float32_elsewhere() -> None:
    cuda, cpu = (load_deepspeed(default_deepspeed(has_cuda), 2) for has_cuda in (True, False))
    assert (cuda.path.name, cuda.bf16) == ("zero3.json", True)
    assert (cpu.path.name, cpu.bf16) == ("zero3_cpu.json", False)


def test_the_properties_say_what_the_file_says() -> None:
    Path("zero3.json").write_text(json.dumps(content(gradient_clipping=1, **BF16)))
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
    assert refusal("[1]") == "zero3.json is a list, not an object of JSON"


def test_an_unknown_key_is_refused_with_the_nearest_name() -> None:
    assert change_refusal(zero_optimisation={"stage": 3}) == (
        "unknown key 'zero_optimisation' in zero3.json; did you mean 'zero_optimization'?"
    )


def test_an_unknown_key_like_no_other_is_refused_with_the_known_ones() -> None:
    message = change_refusal(q=1)
    assert message.startswith("unknown key 'q' in zero3.json; known are train_batch_size, ")


@pytest.mark.parametrize("section", [name for name in SECTIONS if name])
def test_a_mistyped_key_of_every_section_is_refused(section: str) -> None:
    """DeepSpeed would pass it over, or fail on it after the weights were loaded."""
    tree = content()
    inner = tree
    for name in section.split("."):
        inner = inner.setdefault(name, {})
    known = list(SECTIONS[section])[0]
    inner[f"{known}_"] = 1
    message = refusal(json.dumps(tree))
    assert message == (
        f"unknown key '{section}.{known}_' in zero3.json; did you mean '{section}.{known}'?"
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_key_that_a_stage_does_not_read_is_refused(stage: int) -> None:
    for stages, names in STAGE_KEYS.items():
        for name in names:
            kind = SECTIONS["zero_optimization"][name]
            if name != "zero_quantized_gradients":
                Path("a.json").write_text(
                    json.dumps(content(zero_optimization={"stage": stage, name: kind()}))
                )
                if stage in stages:
                    load_deepspeed(Path("a.json"), 1)
                    continue
                with pytest.raises(ConfigError) as caught:
                    load_deepspeed(Path("a.json"), 1)
                assert str(caught.value) == (
                    f"a.json: zero_optimization.{name} means nothing to ZeRO stage {stage}; "
                    "remove it"
                )


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            {"type": "AdamW", "params": {"adam_w_mode": False}},
            "optimizer.params.adam_w_mode means nothing to DeepSpeed's AdamW",
        ),
        (
            {"type": "AdamW", "params": {"fused": True}},
            "optimizer.params.fused means nothing to DeepSpeed's AdamW",
        ),
        (
            {"type": "AdamW", "params": {"torch_adam": True, "bias_correction": True}},
            "optimizer.params.bias_correction means nothing to torch's AdamW",
        ),
        (
            {"type": "Lion", "params": {"eps": 1e-8}},
            "optimizer.params.eps means nothing to DeepSpeed's Lion",
        ),
    ],
)
def test_a_key_that_an_optimizer_does_not_take_is_refused(
    optimizer: dict[str, Any], message: str
) -> None:
    assert change_refusal(optimizer=optimizer) == f"zero3.json: {message}; remove it"


@pytest.mark.parametrize("key", ["data_types", "communication_data_type"])
def test_bf16_must_say_in_what_gradients_are_added_up(key: str) -> None:
    full = "data_types.grad_accum_dtype" if key == "data_types" else key
    assert change_refusal(**BF16 | {key: None}) == (
        f"missing key '{full}' in zero3.json; state it there"
    )


def test_ranks_must_be_a_multiple_of_the_second_partition() -> None:
    zero = {"stage": 3, "zero_hpz_partition_size": 8}
    text = json.dumps(content(train_batch_size=48, zero_optimization=zero))
    assert refusal(text, 12) == (
        "zero3.json: 12 ranks are no multiple of zero_optimization.zero_hpz_partition_size 8; set "
        "it to the GPUs of one node"
    )
    for ranks in (2, 8, 16):
        load_deepspeed(Path("zero3.json"), ranks)


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
        ("compile", {"deepcompile": True}, {"compile": {"deepcompile": True}}),
        (
            "zero_optimization.leaf_module",
            {},
            {"zero_optimization": {"stage": 3, "leaf_module": {}}},
        ),
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
            "zero_optimization.stage must be 1, 2 or 3, got 4",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            "zero_optimization.zero_quantized_gradients must be false, got true; DeepSpeed 0.19.8 "
            "reads every gradient as float16, whatever it is",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}},
            "zero_optimization.offload_optimizer.ratio must be 1.0, got 0.5; DeepSpeed 0.19.8 "
            "steps the rest by an optimizer that is in no checkpoint and has no learning rate of "
            "ours",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}},
            "zero_optimization.offload_optimizer.super_offload must be false, got true; DeepSpeed "
            "0.19.8 keeps the moments in a process of their own, and no checkpoint has them",
        ),
        (
            {"bf16": {"check_grad_overflow": False}},
            "bf16.check_grad_overflow must be true, got false; the stages 1 and 2 would put a "
            "gradient that is not a number into the weights; stage 3 checks always",
        ),
        (
            {"communication_data_type": "float32"},
            'communication_data_type must be "fp32" or "bf16", got "float32"',
        ),
        (
            {"optimizer": {"type": "AdamWW"}},
            "optimizer.type must be one of adamw, adam, adagrad, lion, got 'AdamWW'",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 5e8}},
            "zero_optimization.stage3_prefetch_bucket_size must be int, got 500000000.0",
        ),
        ({"zero_optimization": 3}, "zero_optimization must be dict, got 3"),
        (
            {"fp16": {"enabled": True}},
            "fp16.enabled must be false, got true; float16 needs loss scaling, which skips steps; "
            "use bf16.enabled, or neither for float32",
        ),
    ],
)
def test_a_wrong_value_is_refused(changes: dict[str, Any], message: str) -> None:
    assert change_refusal(**changes) == f"zero3.json: {message}"


# --- overrides ---


def test_the_command_line_sets_any_key_of_the_json() -> None:
    given = ["optim.lr=1", "deepspeed.train_batch_size=8", "deepspeed=a.json", "deepspeed.cpu=b"]
    given += ["deepspeed.optimizer.params.eps=1e-6", "deepspeed.zero_optimization.stage=2"]
    own, of_json = deepspeed_overrides(given)
    assert own == ["optim.lr=1", "deepspeed=a.json", "deepspeed.cpu=b"]
    Path("a.json").write_text(json.dumps(content(**BF16)))
    ds = load_deepspeed(Path("a.json"), 2, of_json)
    assert (ds.train_batch_size, ds.zero_stage) == (8, 2)
    assert ds.for_engine()["optimizer"]["params"]["eps"] == 1e-6


def test_a_null_takes_a_key_of_the_json_away() -> None:
    Path("a.json").write_text(json.dumps(content(gradient_clipping=2.0)))
    assert load_deepspeed(Path("a.json"), 1, {"gradient_clipping": None}).gradient_clipping == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train_batch": 8}, "unknown key 'train_batch' in a.json with deepspeed.train_batch=8; "),
        ({"train_batch_size": "8x"}, "train_batch_size must be int, got '8x'"),
        ({"train_batch_size": 9}, "a.json with deepspeed.train_batch_size=9: train_batch_size 9 "),
        ({"train_batch_size.x": 9}, "sets a key of 'train_batch_size', which is 64"),
        ({"optimizer.params.lr": 1.0}, "the recipe's optim.lr owns it, per module"),
    ],
)
def test_an_override_is_held_to_the_same_rules_and_named(
    overrides: dict[str, object], message: str
) -> None:
    Path("a.json").write_text(json.dumps(content()))
    with pytest.raises(ConfigError) as refusal:
        load_deepspeed(Path("a.json"), 2, overrides)
    assert message in str(refusal.value)


def test_a_shipped_file_is_found_from_any_folder_and_gives_way_to_ones_own() -> None:
    given = Path("ds_configs/zero2.json")
    assert load_deepspeed(given, 1).path == default_deepspeed(has_cuda=True).with_name("zero2.json")
    given.parent.mkdir()
    given.write_text(json.dumps(content()))
    assert load_deepspeed(given, 1).path == given
    with pytest.raises(ConfigError, match="DeepSpeed config other/zero2.json does not exist"):
        load_deepspeed(Path("other/zero2.json"), 1)
