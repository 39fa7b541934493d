"""What a recipe can ask for: several sources, weights, caps, strata, crops, codecs, likeness."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from phi3v.config import DatasetConfig
from phi3v.config.load import build_recipe
from phi3v.data import Dataset
from phi3v.prepare import Part, merge, prepare, prepare_part, summary, verify
from phi3v.processing import Phi3VProcessor
from tests.tiny import assert_same, recipe, turn, write_jsonl, write_picture

ROWS = [turn(f"Question {k}", f"Answer {k}", id=f"r{k}", category=f"g{k % 7}") for k in range(300)]


def several(model: Path, out: Path, *sources: dict[str, Any], **values: Any) -> DatasetConfig:
    tree = {"model": str(model), "out": str(out), "source": list(sources), **values}
    return build_recipe(DatasetConfig, tree, Path("recipe.yaml"), ())


def names(folder: Path, split: str = "train") -> list[str]:
    return [sample.id for sample in Dataset(folder, split)]


# Several sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Chats, a table and a LLaVA file, each with pictures of its own."""
    for name in ("chats", "shop", "llava"):
        write_picture(tmp_path / name / "a.png", width=300, height=60, seed=len(name))
    write_jsonl(
        tmp_path / "chats/rows.jsonl", [turn("<|image_1|>?", "chat", id="c", images=["a.png"])]
    )
    (tmp_path / "shop/rows.csv").write_text("id,title,picture\ns,Red cap,a.png\n,Hat,gone.png\n")
    (tmp_path / "llava/rows.json").write_text(
        '[{"id": "l", "image": "a.png", "conversations": ['
        '{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "llava"}]},'
        '{"id": "t", "conversations": ['
        '{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "text"}]}]'
    )
    return tmp_path


def test_sources_of_all_kinds_make_one_dataset(folder: Path, tiny_model: Path) -> None:
    shop = {"user": "<|image_1|>?", "assistant": "{title}", "images": ["picture"]}
    cfg = several(
        tiny_model,
        folder / "out",
        {"path": f"{folder}/chats/rows.jsonl"},
        {"path": f"{folder}/shop/rows.csv", "num_crops": 1, **shop},
        {"path": f"{folder}/llava/rows.json"},
        max_rejected=0.2,
    )
    manifest = prepare(cfg)
    samples = {sample.id: sample for sample in Dataset(folder / "out", "train")}
    answers = {name: sample.meta["reference"] for name, sample in samples.items()}
    assert answers == {"c": "chat", "s": "Red cap", "l": "llava", "t": "text"}
    sizes = {name: [c.size for c in sample.images] for name, sample in samples.items()}
    assert sizes == {"c": [(56, 224)], "s": [(56, 56)], "l": [(56, 224)], "t": []}
    assert {sample.meta["source"] for sample in samples.values()} == set(
        section.paths[0] for section in cfg.sources
    )
    assert manifest["rows"] == 5 and manifest["num_crops"] == 4
    line = (folder / "out/rejected.jsonl").read_text()
    assert f'"source": "{folder}/shop/rows.csv", "row": 1, "line": 3, "id": null' in line


def test_a_list_of_paths_shares_a_section(tmp_path: Path, tiny_model: Path) -> None:
    paths = [str(write_jsonl(tmp_path / f"{k}.jsonl", ROWS[k::3])) for k in range(3)]
    prepare(recipe(tiny_model, tmp_path / "out", {"path": paths}))
    found = names(tmp_path / "out")
    assert found == [row["id"] for k in range(3) for row in ROWS[k::3]]


def test_one_changed_source_of_several_is_another_recipe(tmp_path: Path, tiny_model: Path) -> None:
    paths = [str(write_jsonl(tmp_path / f"{k}.jsonl", ROWS[k::2])) for k in range(2)]
    cfg = recipe(tiny_model, tmp_path / "out", {"path": paths})
    prepare(cfg)
    write_jsonl(tmp_path / "1.jsonl", ROWS)
    with pytest.raises(Exception, match="made by another recipe: inputs.source differ"):
        prepare(cfg)


# Ids


def test_no_two_samples_of_a_dataset_are_called_the_same(tmp_path: Path, tiny_model: Path) -> None:
    """An id that several rows have, rows without one, and an id that looks like a way out."""
    own = [turn("Q", "A", id=name) for name in ("a", "b", "a", "a#2", "0", "a#b")]
    none = [turn("Q", "A"), turn("Q", "A"), turn("Q", "")]
    files = {"own.jsonl": own, "none.jsonl": none}
    sources = [{"path": str(write_jsonl(tmp_path / name, rows))} for name, rows in files.items()]
    split = {"validation": 0.5, "seed": 1}
    values = {"split": split, "max_rejected": 0.5, "shard_bytes": 2000}
    manifest = prepare(several(tiny_model, tmp_path / "out", *sources, **values))
    found = [name for split in manifest["splits"] for name in names(tmp_path / "out", split)]
    assert set(found) == {"a#0", "b", "a#2", "a#2#3", "0#4", "a#b", "0#6", "1"}
    assert len(found) == 8 and min(e["samples"] for e in manifest["splits"].values()) > 0
    assert manifest["shared_ids"] == 5
    assert any(
        line.startswith("5 rows have an id that another row has, too: their samples are called ")
        for line in summary(tmp_path / "out", manifest)
    )
    (line,) = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert (line["id"], line["row"]) == (None, 2)


def test_a_row_that_is_listed_twice_keeps_its_id(tmp_path: Path, tiny_model: Path) -> None:
    path = str(write_jsonl(tmp_path / "rows.jsonl", ROWS[:3]))
    manifest = prepare(recipe(tiny_model, tmp_path / "out", {"path": path, "weight": 2}))
    assert names(tmp_path / "out") == ["r0", "r0", "r1", "r1", "r2", "r2"]
    assert manifest["shared_ids"] == 0


def test_unfinished_work_of_a_version_without_unique_ids_is_joined_again(
    tmp_path: Path, tiny_model: Path
) -> None:
    path = str(write_jsonl(tmp_path / "rows.jsonl", [turn("Q", "A", id="a")] * 2))
    cfg = recipe(tiny_model, tmp_path / "out", {"path": path})
    prepare_part(cfg, Part())
    merge(cfg)
    (tmp_path / ".out.partial/shared.npy").unlink()
    prepare(cfg)
    assert names(tmp_path / "out") == ["a#0", "a#1"]


# Weights and caps


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "rows.jsonl", ROWS))


def test_a_cap_takes_the_first_rows(tmp_path: Path, source: str, tiny_model: Path) -> None:
    manifest = prepare(recipe(tiny_model, tmp_path / "out", {"path": source, "max_rows": 10}))
    assert names(tmp_path / "out") == [f"r{k}" for k in range(10)]
    assert manifest["rows"] == 10


def test_a_weight_below_one_takes_that_share_of_the_rows_whatever_the_others_are(
    tmp_path: Path, source: str, tiny_model: Path
) -> None:
    manifest = prepare(recipe(tiny_model, tmp_path / "out", {"path": source, "weight": 0.25}))
    taken = names(tmp_path / "out")
    assert len(taken) == pytest.approx(75, abs=25)
    assert manifest["left_out"] == 300 - len(taken)
    assert f"{manifest['left_out']} of 300 rows left out by weights" in "\n".join(
        summary(tmp_path / "out", manifest)
    )
    fewer = str(write_jsonl(tmp_path / "fewer.jsonl", ROWS[::-3]))
    prepare(recipe(tiny_model, tmp_path / "some", {"path": fewer, "weight": 0.25}))
    assert set(names(tmp_path / "some")) == set(taken) & {row["id"] for row in ROWS[::-3]}


def test_a_weight_above_one_lists_rows_again_and_stores_them_once(
    tmp_path: Path, source: str, tiny_model: Path
) -> None:
    split = {"validation": 0.2}
    settings = {"shard_bytes": 20_000, "split": split}
    prepare(recipe(tiny_model, tmp_path / "once", {"path": source}, **settings))
    cfg = recipe(tiny_model, tmp_path / "out", {"path": source, "weight": 2.5}, **settings)
    manifest = prepare(cfg)
    verify(tmp_path / "out")
    counts = Counter(names(tmp_path / "out"))
    assert set(counts) == set(names(tmp_path / "once")) and set(counts.values()) == {2, 3}
    assert sum(counts.values()) == pytest.approx(2.5 * len(counts), rel=0.1)
    assert manifest["splits"]["train"]["samples"] == sum(counts.values())
    stored = sum(shard["samples"] for shard in manifest["splits"]["train"]["shards"])
    assert stored == len(counts)
    assert manifest["splits"]["train"]["tokens"] == Dataset(tmp_path / "out", "train").tokens.sum()
    assert names(tmp_path / "out", "validation") == names(tmp_path / "once", "validation")


# The split


def test_of_every_stratum_the_same_share_is_held_out(
    tmp_path: Path, source: str, tiny_model: Path
) -> None:
    split = {"validation": 0.2, "stratify": "category"}
    prepare(recipe(tiny_model, tmp_path / "out", {"path": source}, split=split))
    held_out = Counter(int(name[1:]) % 7 for name in names(tmp_path / "out", "validation"))
    total = Counter(k % 7 for k in range(300))
    assert {k: abs(held_out[k] - 0.2 * total[k]) <= 0.5 for k in range(7)} == dict.fromkeys(
        range(7), True
    )


def photo(seed: int) -> Image.Image:
    """A picture of broad patches, unlike that of any other seed."""
    random = np.random.default_rng(seed)
    patches = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((480, 360), Image.Resampling.BICUBIC)


@pytest.mark.slow
def test_rows_with_the_same_picture_in_other_clothes_stay_on_one_side(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Half of them a JPEG of another size; ignored, about a third would be torn apart."""
    lines = []
    for seed in range(60):
        photo(seed).save(tmp_path / f"{seed}.png")
        photo(seed).resize((320, 240)).save(tmp_path / f"{seed}.jpg", quality=80)
        for suffix in ("png", "jpg"):
            name = f"{seed}.{suffix}"
            lines.append(turn("<|image_1|>?", f"{seed}", id=name, images=[name]))
    path = str(write_jsonl(tmp_path / "rows.jsonl", lines))
    torn = {}
    for policy in ("together", "ignore"):
        split = {"validation": 0.3, "near_duplicates": policy}
        manifest = prepare(recipe(tiny_model, tmp_path / policy, {"path": path}, split=split))
        sides = [{n.split(".")[0] for n in names(tmp_path / policy, s)} for s in manifest["splits"]]
        torn[policy] = len(sides[0] & sides[1])
        if policy == "together":
            assert manifest["near_duplicates"]["look_alikes"] == 60
            assert manifest["near_duplicates"]["largest_group"] == 2
    assert torn["together"] == 0 and torn["ignore"] > 10


# Resolution and codecs


def test_a_picture_that_is_never_enlarged_saves_tokens_and_the_saving_is_told(
    tmp_path: Path, tiny_model: Path
) -> None:
    write_picture(tmp_path / "small.png", width=50, height=30)
    write_picture(tmp_path / "large.png", width=500, height=300)
    lines = [turn("<|image_1|>?", "yes", id=n, images=[f"{n}.png"]) for n in ("small", "large")]
    path = str(write_jsonl(tmp_path / "rows.jsonl", lines))
    tokens, views = {}, {}
    for policy in (False, True):
        out = tmp_path / f"{policy}"
        manifest = prepare(recipe(tiny_model, out, {"path": path}, never_upscale=policy))
        dataset = Dataset(out, "train")
        tokens[policy], views[policy] = dataset.tokens, dataset.views.tolist()
    assert views == {False: [5, 5], True: [2, 5]}
    saved = int((tokens[False] - tokens[True]).sum())
    assert manifest["saved_tokens"] == saved > 0
    share = saved / tokens[False].sum()
    assert f"never_upscale saves {saved:,} tokens, {share:.1%} of what" in "\n".join(
        summary(out, manifest)
    )


def test_the_samples_of_every_codec_are_those_of_raw_but_for_jpegs_pixels(
    tmp_path: Path, tiny_model: Path
) -> None:
    lines = []
    for seed in range(8):
        photo(seed).save(tmp_path / f"{seed}.png")
        lines.append(turn("<|image_1|>?", f"{seed}", images=[f"{seed}.png"] * (seed > 0)))
        lines[0] = turn("Hi", "Ho")
    path = str(write_jsonl(tmp_path / "rows.jsonl", lines))
    samples, sizes = {}, {}
    for codec in ("raw", "zstd", "png", "jpeg"):
        out = tmp_path / codec
        manifest = prepare(recipe(tiny_model, out, {"path": path}, pixels={"codec": codec}))
        assert manifest["pixels"]["codec"] == codec
        assert manifest["pixels"]["is_lossy"] == (codec == "jpeg")
        samples[codec] = list(Dataset(out, "train"))
        sizes[codec] = manifest["splits"]["train"]["shards"][0]["bytes"]
    for codec in ("zstd", "png"):
        for one, other in zip(samples["raw"], samples[codec], strict=True):
            assert_same(one, other)
    for one, other in zip(samples["raw"], samples["jpeg"], strict=True):
        assert np.array_equal(one.input_ids, other.input_ids)
        for left, right in zip(one.images, other.images, strict=True):
            assert 0 < np.abs(left.pixels.astype(int) - right.pixels).mean() < 4
    assert sizes["jpeg"] < sizes["zstd"] < sizes["raw"] and sizes["png"] < sizes["raw"]


def test_canvases_and_tokens_are_the_processors(tmp_path: Path, tiny_model: Path) -> None:
    write_picture(tmp_path / "a.png", width=131, height=77)
    line = turn("<|image_1|>\nWhat?", " An answer \n", images=["a.png"])
    path = str(write_jsonl(tmp_path / "rows.jsonl", [line]))
    prepare(recipe(tiny_model, tmp_path / "out", {"path": path}))
    (sample,) = Dataset(tmp_path / "out", "train")
    processor = Phi3VProcessor.from_pretrained(tiny_model)
    text = "<|user|>\n<|image_1|>\nWhat?<|end|>\n<|assistant|>\nAn answer<|end|>\n"
    with Image.open(tmp_path / "a.png") as image:
        inputs = processor(text, [image])
        assert np.array_equal(sample.images[0].pixels, processor.canvas(image))
    assert sample.input_ids.tolist() == inputs["input_ids"][0].tolist()


def test_parts_of_several_weighted_sources_give_the_bytes_of_one(
    folder: Path, tiny_model: Path
) -> None:
    chats = {"path": str(write_jsonl(folder / "many.jsonl", ROWS * 2)), "weight": 1.5}
    llava = {"path": f"{folder}/llava/rows.json", "max_rows": 1}
    settings = {"split": {"validation": 0.1, "stratify": "id"}, "shard_bytes": 30_000}
    cfg = several(tiny_model, folder / "whole", chats, llava, **settings)
    prepare(cfg)
    parts = several(tiny_model, folder / "parts", chats, llava, **settings)
    for _ in ("scan", "write"):
        for number in (3, 1, 2):
            prepare_part(parts, Part(number, 3))
        merge(parts)
    for path in (folder / "whole").iterdir():
        assert path.read_bytes() == (folder / "parts" / path.name).read_bytes(), path.name


def test_a_split_that_likeness_leaves_without_rows_is_told(
    tmp_path: Path, tiny_model: Path
) -> None:
    """One picture in all rows: they are one group, held out whole or not at all."""
    photo(0).save(tmp_path / "a.png")
    lines = [turn(f"<|image_1|>{k}?", "yes", id=f"r{k}", images=["a.png"]) for k in range(40)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", lines))
    cfg = recipe(tiny_model, tmp_path / "out", {"path": path}, split={"validation": 0.3})
    lines = list(summary(tmp_path / "out", prepare(cfg)))
    assert any(line.startswith("40 rows share an image or one that looks alike") for line in lines)
    assert (
        "only 0 of 40 samples are held out, split.validation asks for a share of 0.3; the largest "
        "group of rows that stay together has 40"
    ) in lines
