"""Which checkpoint of a run answers: the newest, that of a step, or the best."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from phi3v.config.running import EvalSection
from phi3v.errors import CheckpointError, ConfigError
from phi3v.export import check_step, evaluation_settings, open_any
from tests.commands import LAUNCH, last_line, run
from tests.export.runs import drawn, move_run


@pytest.fixture
def best(made: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """The run of the steps 2 and 3, of which 2 is the best."""
    moved = move_run(made, tiny_model, tmp_path / "run")
    (moved / "checkpoints").unlink()
    (moved / "checkpoints").mkdir()
    for saved in (made / "checkpoints").glob("step-*"):
        (moved / "checkpoints" / saved.name).mkdir()
        for file in saved.iterdir():
            (moved / "checkpoints" / saved.name / file.name).hardlink_to(file)
    (moved / "checkpoints" / "best").write_text("step-00000002")
    return moved


@pytest.mark.parametrize(("step", "seed"), [(None, 3), ("3", 3), ("2", 2), ("best", 2)])
def test_a_run_answers_with_the_checkpoint_that_is_named(
    best: Path, tiny_model: Path, step: str | None, seed: int
) -> None:
    steps = check_step([str(best)], step)
    model = open_any(str(best), EvalSection(), steps[str(best)]).model
    head = drawn(tiny_model, seed)["lm_head.weight"]
    torch.testing.assert_close(model.lm_head.weight.float().cpu(), head)


def test_a_step_is_refused_before_a_model_is_opened(
    made: Path, best: Path, tiny_model: Path
) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint of step 5, it has: 2, 3"):
        check_step([str(best)], "5")
    with pytest.raises(CheckpointError, match="has no best checkpoint, for checkpoint.best of"):
        check_step([str(made)], "best")
    with pytest.raises(ConfigError, match=f"--step 2 is for run folders, and {tiny_model} is non"):
        check_step([str(tiny_model)], "2")
    base, compared = str(tiny_model), {str(tiny_model): None, str(best): 2}
    assert check_step([base], None) == {base: None}
    assert check_step([base, str(best)], "best") == compared, "the base beside its run"


def test_code_that_a_run_folder_names_is_run_only_if_the_command_line_names_it_too(
    made: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder may be somebody else's, and the module another one than its author meant."""
    (tmp_path / "trap.py").write_text("raise SystemExit('the code of another person ran')")
    monkeypatch.syspath_prepend(tmp_path)
    moved = move_run(made, tiny_model, tmp_path / "run")
    config = yaml.safe_load((moved / "config.yaml").read_text())
    config["eval"]["metrics"] = ["exact_match", "trap:f"]
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError) as caught:
        evaluation_settings(moved, ["eval.rows=5"])
    assert str(caught.value).startswith(f"{moved / 'config.yaml'} has trap:f in eval.metrics, ")
    assert "add 'eval.metrics=[exact_match, trap:f]', or name other metrics" in str(caught.value)
    for metrics in (("anls",), ("exact_match", "trap:f")):
        override = f"eval.metrics=[{', '.join(metrics)}]"
        assert evaluation_settings(moved, [override]).metrics == metrics
    assert "trap" not in sys.modules


@pytest.mark.slow
def test_the_best_is_exported_and_asked_from_the_command_line(best: Path, tmp_path: Path) -> None:
    export = [sys.executable, LAUNCH / "export.py", best, "--step"]
    done = run(*export, "best", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step-00000002" in (tmp_path / "out" / "phi3v_export.json").read_text()
    ask = [sys.executable, LAUNCH / "generate.py", best, "--prompt", "Hi", "--max_new_tokens", "2"]
    assert run(*ask, "--step", "best", cwd=tmp_path).returncode == 0
    done = run(*ask, "--image", "http://127.0.0.1:9/a.jpg", cwd=tmp_path)
    assert done.returncode == 2
    assert last_line(done, "ConfigError").startswith(
        "ConfigError: --image: image URL leads to a private address: http://127.0.0.1:9/a.jpg, "
    )
