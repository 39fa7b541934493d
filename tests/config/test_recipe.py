"""A recipe is defaults, then YAML, then overrides; whatever does not fit is named and refused."""

import ast
import dataclasses
import itertools
import os
from pathlib import Path

import pytest
import yaml

from phi3v.config import (
    MODULES,
    DatasetConfig,
    RunConfig,
    differing_keys,
    dump_yaml,
    load_recipe,
    schema,
    to_dict,
)
from phi3v.errors import ConfigError

RUN = """
run: {out: runs/demo}
model: {path: models/tiny}
data: {shards: shards/demo, max_tokens: 512}
optim: {lr: 1.0e-4}
train: {max_steps: 10}
"""

DATASET = """
source: {path: rows.csv, user: "<|image_1|>What?", assistant: "A {title}.", images: [picture]}
model: models/tiny
out: shards/demo
"""


@pytest.fixture(autouse=True)
def _recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put demo.yaml and dataset.yaml into an empty current folder."""
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(RUN)
    Path("dataset.yaml").write_text(DATASET)


def run(*overrides: str) -> RunConfig:
    return load_recipe(RunConfig, Path("demo.yaml"), overrides)


def dataset(*overrides: str) -> DatasetConfig:
    return load_recipe(DatasetConfig, Path("dataset.yaml"), overrides)


def refusal(text: str | bytes) -> str:
    """Write demo.yaml, load it, and give the error's message."""
    Path("demo.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        run()
    return str(caught.value)


def override_refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run(*overrides)
    assert type(caught.value) is ConfigError, "its name begins the line that a user sees"
    return str(caught.value)


def dataset_refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        dataset(*overrides)
    return str(caught.value)


def test_overrides_win_over_yaml_and_yaml_over_defaults() -> None:
    cfg = run("optim.lr=3e-4", "data.max_views=8")
    assert cfg.optim.lr == 3e-4
    assert cfg.data.max_tokens == 512
    assert cfg.data.max_views == 8
    assert cfg.data.window == 1024


def test_the_last_of_two_overrides_of_a_key_wins() -> None:
    assert run("train.max_steps=20", "train.max_steps=30").train.max_steps == 30


def test_a_top_level_key_can_be_overridden_and_cleared() -> None:
    assert run("deepspeed=ds_configs/zero3.json").deepspeed == "ds_configs/zero3.json"
    assert run("deepspeed=a.json", "deepspeed=null").deepspeed is None


def test_an_override_may_contain_an_equals_sign_in_its_value() -> None:
    assert run("wandb.project=a=b").wandb.project == "a=b"


def test_an_empty_section_means_its_defaults() -> None:
    Path("demo.yaml").write_text(RUN + "eval:\n")
    assert run() == load_recipe(RunConfig, Path("demo.yaml"), ["eval={}"])


def test_an_override_does_not_reach_a_section_that_shares_a_yaml_anchor() -> None:
    Path("demo.yaml").write_text(RUN + "eval: &every {every: 7}\ncheckpoint: *every\n")
    cfg = run("eval.every=9")
    assert (cfg.eval.every, cfg.checkpoint.every) == (9, 7)


@pytest.mark.parametrize("text", ["2e-5", "2.0e-5", "0.00002", "'2e-5'"])
def test_floats_are_read_in_every_notation(text: str) -> None:
    assert run(f"optim.lr={text}").optim.lr == 2e-5


def test_an_int_is_accepted_for_a_float_and_becomes_one() -> None:
    assert type(run("optim.lr=1").optim.lr) is float


def test_lists_become_tuples() -> None:
    assert run("model.freeze=[vision, head]").model.freeze == ("vision", "head")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optim.lr=2e-5", "optim.vision_lr=1e-7", "model.freeze=[head]", "deepspeed=a.json"),
        ("train.max_steps=null", "train.epochs=3", "eval.metrics=[]", "debug.deterministic=true"),
        ("run.out='2e-5'", "wandb.project='on'", "eval.pattern='A: {a}, {b:float}'"),
        ("data.shards=[{path: a, weight: 0.25}, {path: b}]", "data.cost.token=2e-5"),
        ("debug.profile_steps=[3, 9]", "model.vision_checkpointing=full"),
    ],
)
def test_a_dumped_run_recipe_loads_as_the_same_recipe(overrides: tuple[str, ...]) -> None:
    cfg = run(*overrides)
    Path("again.yaml").write_text(dump_yaml(cfg))
    assert load_recipe(RunConfig, Path("again.yaml"), []) == cfg
    assert yaml.safe_load(dump_yaml(cfg)) == to_dict(cfg)


@pytest.mark.parametrize("overrides", [(), ("num_crops=4", "split={validation: 0.1, by: title}")])
def test_a_dumped_dataset_recipe_loads_as_the_same_recipe(overrides: tuple[str, ...]) -> None:
    cfg = dataset(*overrides)
    Path("again.yaml").write_text(dump_yaml(cfg))
    assert load_recipe(DatasetConfig, Path("again.yaml"), []) == cfg


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        run().optim.lr = 1.0  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    for section in ast.parse(Path(schema.__file__).read_text()).body:
        if isinstance(section, ast.ClassDef):
            undocumented = [
                ast.unparse(field)
                for field, below in itertools.pairwise([*section.body, ast.Pass()])
                if isinstance(field, ast.AnnAssign) and not isinstance(below, ast.Expr)
            ]
            assert undocumented == [], section.name


def test_differing_keys_are_named_in_full() -> None:
    a, b = to_dict(run()), to_dict(run("optim.lr=1e-5", "model.freeze=[head]", "deepspeed=x.json"))
    assert differing_keys(a, a) == []
    assert differing_keys(a, b) == ["model.freeze", "optim.lr", "deepspeed"]


def test_a_key_that_only_one_recipe_has_differs_unless_it_is_null() -> None:
    assert differing_keys({"a": {"b": 1}}, {"a": {}, "c": None}) == ["a.b"]


def test_each_module_has_its_own_learning_rate_or_the_common_one() -> None:
    optim = run("optim.vision_lr=1e-6", "optim.head_lr=1e-3").optim
    assert [optim.peak_lr(module) for module in MODULES] == [1e-6, 1e-4, 1e-4, 1e-4, 1e-3]


def test_an_unknown_key_is_refused_with_the_nearest_name() -> None:
    assert refusal(RUN.replace("max_tokens", "max_token")) == (
        "unknown key 'data.max_token' in demo.yaml; did you mean 'data.max_tokens'?"
    )


def test_an_unknown_section_is_refused_with_the_nearest_name() -> None:
    assert refusal(RUN + "evla: {}\n") == ("unknown key 'evla' in demo.yaml; did you mean 'eval'?")


def test_a_key_of_another_section_is_refused_with_its_section() -> None:
    assert refusal(RUN + "max_views: 5\n") == (
        "unknown key 'max_views' in demo.yaml; did you mean 'data.max_views'?"
    )


def test_an_unknown_key_like_no_other_is_refused_with_the_keys_of_its_section() -> None:
    assert refusal(RUN + "debug: {42: 1}\n") == (
        "unknown key 'debug.42' in demo.yaml; known are debug.deterministic, debug.profile_steps, "
        "debug.overfit_one_pack"
    )


def test_an_unknown_key_in_an_override_is_blamed_on_the_override() -> None:
    assert override_refusal("data.max_token=5") == (
        "unknown key 'data.max_token' in override 'data.max_token=5'; "
        "did you mean 'data.max_tokens'?"
    )


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^recipe nowhere\.yaml does not exist; name a YAML"):
        load_recipe(RunConfig, Path("nowhere.yaml"), [])


def test_broken_yaml_is_refused_with_its_line() -> None:
    assert refusal("run:\n  out: a: b\n") == (
        "demo.yaml is not valid YAML at line 2: mapping values are not allowed here"
    )


def test_a_file_that_is_no_text_is_refused() -> None:
    assert refusal(b"run: \xff\xfe").startswith("demo.yaml is not valid YAML: ")


@pytest.mark.parametrize(
    "text", ["run: {}\nrun: {out: b}\n", "a: [{run: 1,\n run: 2}]\n", "a:\n  {run: 1, run: 2}\n"]
)
def test_a_key_written_twice_is_refused(text: str) -> None:
    assert refusal(text) == "demo.yaml is not valid YAML at line 2: key 'run' is there twice"


@pytest.mark.parametrize(("text", "shown"), [("- a\n", "['a']"), ("", "nothing"), ("5", "5")])
def test_a_file_that_is_not_a_mapping_is_refused(text: str, shown: str) -> None:
    assert refusal(text) == f"demo.yaml must hold `key: value` lines, got {shown}"


def test_a_missing_required_key_is_refused() -> None:
    assert refusal(RUN.replace("lr: 1.0e-4", "")) == (
        "missing key 'optim.lr' in demo.yaml; write it there or add optim.lr=VALUE"
    )


def test_a_required_key_of_a_missing_section_is_named() -> None:
    assert refusal(RUN.replace("run: {out: runs/demo}", "")).startswith("missing key 'run.out'")


def test_a_wrong_type_in_the_file_is_blamed_on_the_file() -> None:
    assert refusal(RUN.replace("max_steps: 10", "max_steps: ten")) == (
        "train.max_steps must be int, got 'ten' in demo.yaml"
    )


def test_a_pattern_without_quotes_is_told_to_use_them() -> None:
    assert refusal(RUN + "eval: {pattern: {title}}\n").endswith("; put it in quotes")


@pytest.mark.parametrize("override", ["train.max_steps", "=5", "train.=5", "train..max_steps=5"])
def test_an_override_without_key_and_equals_sign_is_refused(override: str) -> None:
    assert override_refusal(override) == (
        f"override {override!r} must have the form section.key=value"
    )


def test_an_override_that_is_not_yaml_is_refused() -> None:
    assert override_refusal("run.out=[a") == (
        "the value of override 'run.out=[a' is not valid YAML: expected ',' or ']', but got "
        "'<stream end>'; if a text is meant, write 'run.out=\"[a\"'"
    )


def test_a_date_that_does_not_exist_is_refused() -> None:
    assert refusal("run: {out: 2024-13-01}\n") == (
        "demo.yaml is not valid YAML: month must be in 1..12"
    )
    Path("demo.yaml").write_text(RUN)
    assert override_refusal("run.out=2024-13-01").endswith(
        "month must be in 1..12; if a text is meant, write 'run.out=\"2024-13-01\"'"
    )


def test_an_override_below_a_value_is_refused() -> None:
    assert override_refusal("deepspeed=a.json", "deepspeed.stage=3") == (
        "override 'deepspeed.stage=3' sets a key of 'deepspeed', which is 'a.json'; to put a "
        "section in its place, write 'deepspeed={stage: 3}'"
    )


def test_a_value_out_of_range_in_the_file_is_blamed_on_the_file() -> None:
    assert refusal(RUN.replace("max_steps: 10", "max_steps: 0")) == (
        "train.max_steps must be at least 1, got 0 (in demo.yaml)"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("source.path=''", "source.path must not be empty, got ''"),
        ("source.images=[a, a]", "source.images holds 'a' twice; keep one"),
        (
            "source.assistant=null",
            "source.assistant is needed to turn columns into messages, got nothing; write its "
            "text with {column} names (source.format is 'auto')",
        ),
        ("split.validation=1", "split.validation must be a share from 0 to below 1, got 1.0"),
        ("split.by=''", "split.by must not be empty, got ''"),
        ("split.seed=-1", "split.seed must be at least 0, got -1"),
        ("out=''", "out must not be empty, got ''"),
        ("num_crops=0", "num_crops must be at least 1, got 0"),
        ("max_tokens=0", "max_tokens must be at least 1, got 0"),
        ("shard_bytes=0", "shard_bytes must be at least 1, got 0"),
        ("max_rejected=1.5", "max_rejected must be a share from 0 to 1, got 1.5"),
    ],
)
def test_a_dataset_value_out_of_range_is_refused(override: str, message: str) -> None:
    assert dataset_refusal(override) == f"{message} (in override {override!r})"


def test_a_value_that_does_not_fit_another_is_blamed_on_both_places() -> None:
    assert dataset_refusal("source.format=messages") == (
        "source.user has no meaning with source.format 'messages', got '<|image_1|>What?'; remove "
        "it, or use format 'columns' (in override 'source.format=messages' and dataset.yaml)"
    )


def test_a_section_given_whole_on_the_command_line_is_blamed_on_it() -> None:
    override = "optim={schedule: linear}"
    assert override_refusal(override) == (
        f"missing key 'optim.lr' in override {override!r}; write it there or add optim.lr=VALUE"
    )
    override = "train={max_steps: 0}"
    assert override_refusal(override) == (
        f"train.max_steps must be at least 1, got 0 (in override {override!r})"
    )


def test_all_that_is_wrong_is_told_at_once_in_one_line() -> None:
    text = RUN.replace("max_tokens", "max_token").replace("max_steps: 10", "max_steps: ten")
    Path("demo.yaml").write_text(text + "evla: {}\ncheckpoint: {every: 0}\n")
    assert override_refusal("optim.lr=fast", "run={seed: 1}") == (
        "6 mistakes: (1) unknown key 'evla' in demo.yaml; did you mean 'eval'? (2) missing key "
        "'run.out' in override 'run={seed: 1}'; write it there or add run.out=VALUE (3) unknown "
        "key 'data.max_token' in demo.yaml; did you mean 'data.max_tokens'? (4) optim.lr must be "
        "float, got 'fast' in override 'optim.lr=fast' (5) train.max_steps must be int, got 'ten' "
        "in demo.yaml (6) checkpoint.every must be at least 1, got 0 (in demo.yaml)"
    )


@pytest.mark.parametrize(
    "key", ["train.batch_size", "batch_size", "data.train_batch_size", "optim.accumulation_steps"]
)
def test_a_batch_size_in_the_recipe_is_sent_to_the_deepspeed_json(key: str) -> None:
    assert override_refusal(f"{key}=8").endswith(
        "; the DeepSpeed JSON owns the batch, in packs over all ranks: set "
        "deepspeed.train_batch_size=N on the command line; data.max_tokens is the size of a pack, "
        "and accumulation follows from the number of ranks"
    )


def test_what_the_deepspeed_json_owns_is_sent_there() -> None:
    assert override_refusal("train.gradient_clipping=1").endswith(
        "; the DeepSpeed JSON owns it: set it there, or deepspeed.gradient_clipping on the command "
        "line"
    )


def test_the_batch_of_an_evaluation_is_not_the_deepspeed_jsons() -> None:
    assert override_refusal("eval.batch_size=8").endswith("; did you mean 'eval.batch_rows'?")


def test_columns_need_a_question_and_an_answer() -> None:
    assert dataset_refusal("source={path: a.csv, format: columns}").startswith(
        "source.user is needed to turn columns into messages, got nothing"
    )


def test_rows_of_messages_need_a_path_only() -> None:
    cfg = dataset("source={path: a.jsonl, format: messages}")
    assert (cfg.source.user, cfg.source.images) == (None, ())


@pytest.mark.parametrize("key", ["user", "assistant"])
def test_a_line_break_of_two_characters_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "rows.yaml"
    texts = {"user": "Q?", "assistant": "{title}"}
    path.write_text(
        yaml.safe_dump({"source": {"path": "a.csv", **texts}, "model": "m", "out": "o"})
    )

    def written(text: str) -> str:
        cfg = load_recipe(DatasetConfig, path, [f"source.{key}={text}"])
        return str(getattr(cfg.sources[0], key))

    with pytest.raises(ConfigError) as caught:
        written("<image>\\nWhat is {title}?")
    assert str(caught.value).startswith(
        f"source.{key} holds a backslash and an n, which are no line break, in "
        "'<image>\\\\nWhat is {title}?'; put the text in double quotes"
    )
    assert written('"<image>\\nWhat is {title}?"') == "<image>\nWhat is {title}?"
    assert written(r"Is $\nu \neq 0$, {title}?") == r"Is $\nu \neq 0$, {title}?"


def test_a_recipe_of_another_command_is_refused_as_that(tmp_path: Path) -> None:
    rows, run_of = tmp_path / "rows.yaml", tmp_path / "run.yaml"
    rows.write_text("{source: {path: a.csv}, model: models/tiny, out: shards/a, split: {}}")
    run_of.write_text("{run: {out: runs/a}, model: {path: models/tiny}, data: {}, optim: {}}")
    for cls, path, other in (
        (RunConfig, rows, "a dataset's recipe, for launch/prepare.py"),
        (DatasetConfig, run_of, "a run's recipe, for launch/train.py"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_recipe(cls, path, [])
        assert str(caught.value).startswith(f"{path} is {other}; this is to be ")


def test_a_recipe_with_the_other_suffix_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"a\.yml does not exist; did you mean .*a\.yaml\?"):
        load_recipe(RunConfig, tmp_path / "a.yml", [])


def test_a_recipe_that_is_no_file_is_said_to_be_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, kind in ((tmp_path / "pipe.yaml", "a pipe"), (tmp_path, "a folder")):
        with pytest.raises(ConfigError) as caught:
            load_recipe(DatasetConfig, path, [])
        assert str(caught.value) == (
            f"recipe {path} is {kind}; name a YAML file, see launch/recipes/"
        )
