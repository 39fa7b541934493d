"""The settings of pictures travel from the dataset to whatever asks or serves the model."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from phi3v.config import RunConfig, build_recipe, dump_yaml
from phi3v.config.dataset import DatasetConfig, ImagesSection, SourceSection
from phi3v.data import Dataset
from phi3v.data.mixture import open_datasets
from phi3v.errors import ConfigError
from phi3v.export.opening import (
    check_shards,
    made_preprocessor,
    open_processor,
    picture_settings,
)
from phi3v.export.originals import write_originals
from phi3v.files import write_json
from phi3v.pictures import PREPROCESSOR, PUBLISHED, PictureSettings
from phi3v.prepare import prepare
from phi3v.prepare.summary import summary
from phi3v.processing import Phi3VProcessor
from phi3v.training.opening import describe_data
from tests.commands import LAUNCH, run
from tests.export.runs import read
from tests.tiny import write_jsonl

PICTURES = ("clear.png", "turned.jpg", "plain.png")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows with a transparent picture, a turned one and a plain one."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 70, 4), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "clear.png")
    photo, exif = Image.fromarray(noise[..., :3]), Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif)
    photo.save(tmp_path / "plain.png")
    messages = [
        {"role": "user", "content": "<|image_1|>\nWhat?"},
        {"role": "assistant", "content": "Noise."},
    ]
    lines = [{"id": name, "messages": messages, "images": [name]} for name in PICTURES]
    return write_jsonl(tmp_path / "rows.jsonl", lines)


def make(rows: Path, model: Path, name: str, **values: Any) -> Path:
    out = rows.parent / name
    values = {"source": SourceSection(path=str(rows)), **values}
    prepare(DatasetConfig(model=str(model), out=str(out), workers=1, **values), say=lambda _: None)
    return out


def make_run(folder: Path, model: Path, *shards: Path) -> Path:
    tree = {
        "run": {"out": str(folder)},
        "model": {"path": str(model)},
        "data": {"shards": [{"path": str(path)} for path in shards]},
        "optim": {"lr": 1e-5},
        "train": {"max_steps": 3},
    }
    folder.mkdir()
    cfg = build_recipe(RunConfig, tree, Path("run.yaml"), [])
    (folder / "config.yaml").write_text(dump_yaml(cfg))
    write_json(folder / "data.json", describe_data(open_datasets(shards, "train")))
    return folder


def shown(processor: Phi3VProcessor, folder: Path) -> dict[str, np.ndarray]:
    return {n: processor.canvas(Image.open(folder / n)) for n in PICTURES}


@pytest.mark.parametrize(
    "values",
    [
        {"num_crops": 1},
        {"num_crops": 6, "never_upscale": True},
        {"images": PUBLISHED},
        {"images": ImagesSection(alpha="published")},
        {"images": ImagesSection(exif="published"), "num_crops": 2},
    ],
)
def test_run_and_export_show_pictures_as_the_shards_hold_them(
    rows: Path, tiny_model: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    shards = make(rows, tiny_model, "shards", **values)
    run, out = make_run(tmp_path / "run", tiny_model, shards), tmp_path / "served"
    out.mkdir()
    write_originals(str(tiny_model), out, torch.float32, picture_settings(run))
    held = {sample.id: sample.images[0].pixels for sample in Dataset(shards, "train")}
    for processor in (open_processor(str(run)), AutoProcessor.from_pretrained(out)):
        for name, canvas in shown(processor, tmp_path).items():
            assert np.array_equal(canvas, held[name]), name
    published = {k: v for k, v in read(tiny_model / "preprocessor_config.json").items()}
    found = read(out / "preprocessor_config.json")
    own = found.pop("phi3v", None)
    assert found | {"num_crops": 0} == published | {"num_crops": 0}
    assert (own is None) == (values.get("images") == PUBLISHED)


def test_settings_like_the_bases_leave_its_file_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    base = Phi3VProcessor.from_pretrained(tiny_model).pictures
    write_originals(str(tiny_model), tmp_path, torch.float32, base)
    name = "preprocessor_config.json"
    assert (tmp_path / name).read_bytes() == (tiny_model / name).read_bytes()


def without_preprocessor(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    (folder / PREPROCESSOR).unlink()
    return folder


def test_a_base_without_image_settings_is_asked_and_exported_with_those_of_the_shards(
    rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Also when the shards are gone; the run's own record knows."""
    shards = make(rows, tiny_model, "shards", num_crops=2, images=PUBLISHED)
    held = {sample.id: sample.images[0].pixels for sample in Dataset(shards, "train")}
    base = without_preprocessor(tiny_model, tmp_path / "base")
    run, out = make_run(tmp_path / "run", base, shards), tmp_path / "served"
    shutil.rmtree(shards)
    out.mkdir()
    pictures = picture_settings(run)
    made = made_preprocessor(run, pictures)
    write_originals(str(base), out, torch.float32, pictures, made)
    assert read(out / PREPROCESSOR) == read(tiny_model / PREPROCESSOR) | {"num_crops": 2}
    for processor in (open_processor(str(run)), AutoProcessor.from_pretrained(out)):
        assert processor.views == Phi3VProcessor.from_pretrained(tiny_model).views
        for name, canvas in shown(processor, tmp_path).items():
            assert np.array_equal(canvas, held[name]), name


def test_a_run_of_before_on_such_a_base_asks_its_shards_and_is_refused_without(
    rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    shards = make(rows, tiny_model, "shards")
    base = without_preprocessor(tiny_model, tmp_path / "base")
    run = make_run(tmp_path / "run", base, shards)
    data = read(run / "data.json")
    del data["view_settings"]
    write_json(run / "data.json", data)
    assert open_processor(str(run)).views == Phi3VProcessor.from_pretrained(tiny_model).views
    shutil.rmtree(shards)
    with pytest.raises(ConfigError) as caught:
        open_processor(str(run))
    assert str(caught.value) == (
        f"model {base} has no preprocessor_config.json, {run}/data.json does not say what it said, "
        "and the shards are gone; put the base's file back, or name where the shards are"
    )


@pytest.mark.slow
def test_the_whole_job_needs_no_image_settings_of_the_base(
    tiny_model: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """Train, look, evaluate, export, and ask run and export: both answer as with the file."""
    answers = []
    for name, base in (
        ("with", tiny_model),
        ("without", without_preprocessor(tiny_model, tmp_path / "base")),
    ):
        recipe = tmp_path / f"{name}.yaml"
        tree = {
            "run": {"out": name},
            "model": {"path": str(base)},
            "data": {"shards": str(tiny_shards), "max_tokens": 264},
            "optim": {"lr": 1e-3},
            "train": {"max_steps": 1},
            "eval": {"rows": 2, "max_new_tokens": 2, "blind": False},
        }
        write_json(recipe, tree)
        picture = tmp_path / "p.png"
        Image.new("RGB", (60, 40), (200, 20, 20)).save(picture)
        asked = ("--prompt", "What?", "--image", picture, "--max_new_tokens", 4)
        view = ("view.py", tiny_shards, "--out", "v.html", "--rows", 1, "--model", base)
        commands = [
            ("train.py", recipe),
            view,
            ("evaluate.py", name, "--shards", tiny_shards, "eval.rows=2"),
            ("export.py", name, "--out", f"{name}/export"),
            ("generate.py", name, *asked),
            ("generate.py", f"{name}/export", *asked),
        ]
        done = [run(sys.executable, LAUNCH / c, *rest, cwd=tmp_path) for c, *rest in commands]
        assert all(one.returncode == 0 for one in done), "".join(one.stderr for one in done)
        answers += [one.stdout for one in done[-2:]]
    assert len(set(answers)) == 1
    files = [tmp_path / name / "export" / PREPROCESSOR for name in ("with", "without")]
    assert read(files[0]) == read(files[1])


def test_sources_that_differ_are_told_with_what_is_taken(
    rows: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = make(rows, tiny_model, "few", num_crops=1)
    both = (SourceSection(path=str(rows), num_crops=2), SourceSection(path=str(rows)))
    many = make(rows, tiny_model, "many", source=both, num_crops=6, images=PUBLISHED)
    run = make_run(tmp_path / "run", tiny_model, few, many)
    assert picture_settings(run) == PictureSettings(6, False, PUBLISHED)
    assert capsys.readouterr().err == (
        f"{run}: pictures were prepared in different ways: num_crops 1, never_upscale False, alpha "
        f"white, exif apply for {few}; num_crops 2, never_upscale False, alpha published, exif "
        f"published for {rows} in {many}; num_crops 6, never_upscale False, alpha published, exif "
        f"published for {rows} in {many}; taken is num_crops 6, never_upscale False, alpha "
        "published, exif published\n"
    )


def test_a_run_of_before_asks_its_shards_and_says_when_they_are_gone(
    rows: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make(rows, tiny_model, "shards", num_crops=1, images=PUBLISHED)
    run = make_run(tmp_path / "run", tiny_model, shards)
    data, manifest = read(run / "data.json"), read(shards / "manifest.json")
    del data["pictures"], manifest["pictures"], manifest["recipe"]["images"]
    write_json(run / "data.json", data)
    write_json(shards / "manifest.json", manifest)
    assert picture_settings(run) == PictureSettings(1)
    assert capsys.readouterr().err == ""
    shards.rename(tmp_path / "elsewhere")
    assert picture_settings(run) is None
    assert "does not say how pictures were prepared, and the shards are gone" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"phi3v": {"alpha": "black"}}, "says alpha 'black' of pictures, this program knows"),
        ({"phi3v": {"gamma": 2}}, "says gamma 2 of pictures, this program knows never_upscale"),
        ({"phi3v": "white"}, "phi3v must be an object, got 'white'"),
        ({"num_crops": "4"}, "num_crops must be a number from 1, got '4'"),
    ],
)
def test_what_a_folder_says_and_nobody_knows_is_refused(
    base: Path, values: dict[str, Any], message: str
) -> None:
    path = base / "preprocessor_config.json"
    path.write_text(json.dumps(read(path) | values))
    with pytest.raises(ConfigError, match=f"{path}.* {message}|{path}: {message}"):
        Phi3VProcessor.from_pretrained(base)


def test_shards_of_another_way_are_told_when_a_run_is_evaluated(
    rows: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, many = (make(rows, tiny_model, f"s{n}", num_crops=n) for n in (1, 4))
    run = make_run(tmp_path / "run", tiny_model, few)
    check_shards(str(run), Dataset(few, "train"))
    check_shards(str(tiny_model), Dataset(few, "train"))
    assert capsys.readouterr().err == ""
    check_shards(str(run), Dataset(many, "train"))
    told = capsys.readouterr().err
    assert "was trained on pictures with num_crops 1, " in told and "them with num_crops 4" in told


def test_prepare_counts_what_pictures_needed(rows: Path, tiny_model: Path) -> None:
    shards = make(rows, tiny_model, "shards")
    manifest = read(shards / "manifest.json")
    counted = {"pictures": 3, "transparent": 1, "turned": 1, "deep": 0}
    assert manifest["splits"]["train"]["audit"]["pictures"] == counted
    line = "1 pictures have transparency, 1 are turned by EXIF; images.alpha is white, images.exif"
    assert any(text.startswith(line) for text in summary(shards, manifest))


def test_the_rule_is_part_of_the_fingerprint_and_old_shards_mean_the_published_one(
    rows: Path, tiny_model: Path
) -> None:
    new, old = make(rows, tiny_model, "new"), make(rows, tiny_model, "old", images=PUBLISHED)
    assert Dataset(new, "train").fingerprint != Dataset(old, "train").fingerprint
    manifest = read(old / "manifest.json")
    del manifest["recipe"]["images"], manifest["pictures"]
    write_json(old / "manifest.json", manifest)
    make(rows, tiny_model, "old", images=PUBLISHED)  # is up to date
    with pytest.raises(ConfigError) as caught:
        make(rows, tiny_model, "old")
    assert str(caught.value).endswith(
        "images.alpha, images.exif differ; name another folder in 'out', or remove this one, or "
        "write images: {alpha: published, exif: published}, as it was made"
    )


def test_a_dataset_is_up_to_date_wherever_its_model_lies(
    rows: Path, base: Path, tmp_path: Path
) -> None:
    cfg = DatasetConfig(
        source=SourceSection(path=str(rows)),
        model=str(base),
        out=str(tmp_path / "shards"),
        workers=1,
    )
    before = prepare(cfg)
    base.rename(tmp_path / "moved")
    assert prepare(replace(cfg, model=str(tmp_path / "moved"))) == before
