"""Every value of a run recipe has a type and a range; whatever is outside is named and refused."""

import shlex
from pathlib import Path

import pytest

from phi3v.config import RunConfig, load_recipe
from phi3v.errors import ConfigError

RUN = """
run: {out: runs/demo}
model: {path: models/tiny}
data: {shards: shards/demo, max_tokens: 512}
optim: {lr: 1.0e-4}
train: {max_steps: 10}
"""


@pytest.fixture(autouse=True)
def _recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put demo.yaml into an empty current folder."""
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(RUN)


def run(*overrides: str) -> RunConfig:
    return load_recipe(RunConfig, Path("demo.yaml"), overrides)


def override_refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run(*overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps=ten", "train.max_steps must be int, got 'ten'"),
        ("train.max_steps=true", "train.max_steps must be int, got True"),
        ("train.max_steps=1.5", "train.max_steps must be int, got 1.5"),
        ("data.max_tokens=null", "data.max_tokens must be int, got nothing"),
        ("optim.lr=fast", "optim.lr must be float, got 'fast'"),
        ("optim.lr=true", "optim.lr must be float, got True"),
        ("optim.lr=.nan", "optim.lr must be float, got nan"),
        ("optim.lr=[1]", "optim.lr must be float, got [1]"),
        ("eval.blind=1", "eval.blind must be bool, got 1"),
        ("run.out=2024", "run.out must be str, got 2024"),
        ("eval=off", "eval must be a section with keys of its own, got False"),
        ("model.freeze=vision", "model.freeze must be a list, [a, b], got 'vision'"),
        ("eval.metrics=[a, 5]", "eval.metrics[1] must be str, got 5"),
        (
            "model.attention=fast",
            "model.attention must be one of auto, flash, varlen, sdpa, got 'fast'",
        ),
        (
            "model.kernels=fused",
            "model.kernels must be one of auto, compiled, eager, got 'fused'",
        ),
        ("model.loss=full", "model.loss must be one of auto, liger, chunked, got 'full'"),
        (
            "model.checkpointing=true",
            "model.checkpointing must be one of none, selective, full, got True",
        ),
        (
            "model.vision_checkpointing=all",
            "model.vision_checkpointing must be one of none, selective, full, got 'all'",
        ),
        ("model.offload_activations=cpu", "model.offload_activations must be bool, got 'cpu'"),
        ("data.shards=5", "data.shards must be str, got 5"),
        (
            "data.shards=[a]",
            "data.shards[0] must be a section with keys of its own, got 'a'",
        ),
        (
            "data.shards=[{path: a, weight: much}]",
            "data.shards[0].weight must be float, got 'much'",
        ),
        ("data.cost.token=true", "data.cost.token must be float, got True"),
        ("debug.profile_steps=3", "debug.profile_steps must be a list, [a, b], got 3"),
        ("debug.profile_steps=[a]", "debug.profile_steps[0] must be int, got 'a'"),
        ("debug.overfit_one_pack=1", "debug.overfit_one_pack must be bool, got 1"),
        (
            "model.freeze=[tower]",
            "model.freeze[0] must be one of vision, projector, language, embeddings, head, "
            "got 'tower'",
        ),
    ],
)
def test_a_wrong_type_or_choice_is_refused(override: str, message: str) -> None:
    assert override_refusal(override).partition("; ")[0] == f"{message} in override {override!r}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.out=''", "run.out must not be empty, got ''"),
        ("run.seed=-1", "run.seed must be at least 0, got -1"),
        ("model.path=' '", "model.path must not be empty, got ' '"),
        ("model.freeze=[head, head]", "model.freeze holds 'head' twice; keep one"),
        ("data.shards=''", "data.shards must not be empty, got ''"),
        ("data.max_tokens=0", "data.max_tokens must be at least 1, got 0"),
        ("data.max_views=0", "data.max_views must be at least 1, got 0"),
        ("data.window=0", "data.window must be at least 1, got 0"),
        ("data.window_steps=0", "data.window_steps must be at least 1, got 0"),
        ("data.shards=[]", "data.shards must name at least one dataset folder, got []"),
        (
            "data.shards=[{path: a}, {path: a, weight: 2}]",
            "data.shards holds 'a' twice; keep one",
        ),
        ("debug.profile_steps=[0]", "debug.profile_steps must be at least 1, got 0"),
        ("debug.profile_steps=[3, 3]", "debug.profile_steps holds '3' twice; keep one"),
        (
            "optim.vision_layer_decay=0",
            "optim.vision_layer_decay must be a factor above 0 and at most 1, got 0.0",
        ),
        (
            "optim.vision_layer_decay=1.5",
            "optim.vision_layer_decay must be a factor above 0 and at most 1, got 1.5",
        ),
        (
            "optim.lr=0",
            "optim.lr must be above 0, got 0.0; to keep a module as it is, name it in model.freeze",
        ),
        (
            "optim.head_lr=-1",
            "optim.head_lr must be above 0, got -1.0; "
            "to keep a module as it is, name it in model.freeze",
        ),
        ("optim.weight_decay=-0.1", "optim.weight_decay must be at least 0, got -0.1"),
        ("optim.warmup_steps=-1", "optim.warmup_steps must be at least 0, got -1"),
        ("optim.warmup_ratio=-1", "optim.warmup_ratio must be at least 0, got -1.0"),
        (
            "optim.warmup_ratio=1",
            "optim.warmup_ratio must be a share from 0 to below 1, got 1.0",
        ),
        ("optim.min_lr_ratio=2", "optim.min_lr_ratio must be a share from 0 to 1, got 2.0"),
        ("train.max_steps=0", "train.max_steps must be at least 1, got 0"),
        (
            "train.stop_if={metric: loss, patience: 0}",
            "train.stop_if.patience must be at least 1, got 0",
        ),
        (
            "train.stop_if={metric: loss, patience: 1, min_delta: -1}",
            "train.stop_if.min_delta must be at least 0, got -1.0",
        ),
        (
            "train.stop_if={metric: '', patience: 1}",
            "train.stop_if.metric must not be empty, got ''",
        ),
        (
            "train.stop_if={metric: loss}",
            "train.stop_if needs one of train.stop_if.patience, train.stop_if.above and "
            "train.stop_if.below, got none; to train to the last step set train.stop_if to null",
        ),
        (
            "train.stop_if={metric: loss, above: 3, min_delta: 1}",
            "train.stop_if.min_delta is 1 without train.stop_if.patience, which it belongs to; set "
            "patience, or leave it out",
        ),
        (
            "train.stop_if={metric: loss, above: 1, below: 2}",
            "train.stop_if.above is 1 and train.stop_if.below 2, so that every value ends the run; "
            "exchange them, or leave one out",
        ),
        (
            "eval={at_start: true, rows: 0}",
            "eval.at_start is true, but eval.rows is 0, so nothing is evaluated; set eval.rows "
            "above 0, or eval.at_start to false",
        ),
        ("eval.split=''", "eval.split must not be empty, got ''"),
        ("eval.metrics=[a, a]", "eval.metrics holds 'a' twice; keep one"),
        ("eval.every=-1", "eval.every must be at least 0, got -1"),
        ("eval.batch_rows=0", "eval.batch_rows must be at least 1, got 0"),
        ("eval.loss_rows=0", "eval.loss_rows must be at least 1, got 0"),
        (
            "eval.max_seconds=0",
            "eval.max_seconds must be above 0, got 0.0; leave it out for no limit",
        ),
        ("checkpoint.every=0", "checkpoint.every must be at least 1, got 0"),
        ("checkpoint.keep=0", "checkpoint.keep must be at least 1, got 0"),
        ("wandb.project=''", "wandb.project must not be empty, got ''"),
        ("deepspeed=''", "deepspeed must not be empty, got ''"),
    ],
)
def test_a_run_value_out_of_range_is_refused(override: str, message: str) -> None:
    assert override_refusal(override) == f"{message} (in override {override!r})"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.shards=[{path: ''}]", "data.shards.path must not be empty, got ''"),
        (
            "data.shards=[{path: a, weight: 0}]",
            "data.shards.weight must be above 0, got 0.0; to leave a dataset out, remove it",
        ),
        ("data.cost.view=-1", "data.cost.view must be at least 0, got -1.0"),
    ],
)
def test_a_value_out_of_range_deeper_down_is_refused(override: str, message: str) -> None:
    assert override_refusal(override) == f"{message} (in override {override!r})"


@pytest.mark.parametrize(
    ("override", "got"),
    [
        ("train.epochs=2", "both, 10 and 2; set the other to null"),
        ("train.max_steps=null", "neither"),
    ],
)
def test_a_run_has_one_length(override: str, got: str) -> None:
    """Of two keys the file has one, the command line the other: both places are named."""
    order = ("demo.yaml", f"override {override!r}")
    places = " and ".join(order if "epochs" in override else order[::-1])
    assert override_refusal(override) == (
        f"exactly one of train.max_steps and train.epochs must be set, got {got} (in {places})"
    )


def test_a_warm_up_has_one_length_even_if_it_is_0() -> None:
    assert run("optim.warmup_ratio=0.1").optim.warmup(50) == 5
    both = ("optim.warmup_ratio=0.1", "optim.warmup_steps=0")
    assert override_refusal(*both).startswith(
        "only one of optim.warmup_steps and optim.warmup_ratio may be set, got both, 0 and 0.1; "
    )
    assert run(*both, "optim.warmup_ratio=null").optim.warmup(50) == 0


@pytest.mark.parametrize(
    ("override", "way"),
    [
        ("wandb.name=42", "write 'wandb.name=\"42\"'"),
        ("wandb.name=on", "write 'wandb.name=\"on\"'"),
        ("eval.pattern=Price: {p}", "write 'eval.pattern=\"Price: {p}\"'"),
        ("eval.metrics=[a, 5]", "; put it in double quotes, and the whole override in single ones"),
    ],
)
def test_a_text_that_yaml_takes_for_something_else_is_shown_as_a_shell_takes_it(
    override: str, way: str
) -> None:
    """The shell eats the one pair of quotes that a newcomer adds."""
    message = override_refusal(override)
    assert message.endswith(way)
    if way.startswith("write "):
        run(*shlex.split(way.removeprefix("write ")))


def test_a_list_where_a_text_is_due_is_not_told_to_use_quotes() -> None:
    assert override_refusal("wandb.name=[a]") == (
        "wandb.name must be str, got ['a'] in override 'wandb.name=[a]'"
    )


def test_shards_are_one_folder_or_a_list_with_weights() -> None:
    one = run("data.shards=a").data
    assert (one.folders, [part.weight for part in one.parts]) == (("a",), [1.0])
    many = run("data.shards=[{path: a, weight: 0.25}, {path: b}]").data
    assert (many.folders, [part.weight for part in many.parts]) == (("a", "b"), [0.25, 1.0])


def test_an_unknown_key_of_a_listed_dataset_is_refused() -> None:
    assert override_refusal("data.shards=[{path: a, wieght: 2}]") == (
        "unknown key 'data.shards[0].wieght' in override 'data.shards=[{path: a, wieght: 2}]'; "
        "did you mean 'data.shards[0].weight'?"
    )


def test_the_tower_is_checkpointed_as_the_rest_unless_it_says_otherwise() -> None:
    assert run("model.checkpointing=full").model.tower_checkpointing == "full"
    apart = run("model.checkpointing=full", "model.vision_checkpointing=none").model
    assert apart.tower_checkpointing == "none"


def test_a_cost_is_given_when_any_of_its_keys_is() -> None:
    assert not run().data.cost.is_given
    assert run("data.cost.view=2").data.cost.is_given
