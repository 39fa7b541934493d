"""The page says all of a dataset, escapes it, stands alone, and refuses what it cannot show."""

import json
import os
import shutil
from pathlib import Path

import pytest

from phi3v.data import Dataset
from phi3v.data.audit import SUSPICIONS, Audit
from phi3v.errors import ConfigError, ShardError
from phi3v.prepare import prepare
from phi3v.view import Wishes, write_view
from phi3v.view.findings import audit_section
from phi3v.view.samples import find
from tests.page import Page
from tests.tiny import make_model, make_sample, recipe, turn, write_jsonl, write_samples
from tests.view.conftest import HOSTILE, View


def edited(shards: Path, folder: Path, **values: object) -> Path:
    """A copy of a dataset folder, its manifest changed."""
    shutil.copytree(shards, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps(manifest | values), encoding="utf-8")
    return folder


def test_the_page_needs_nothing_from_outside(view: View) -> None:
    page = view()
    links = [a[key] for _, a in page.tags for key in ("src", "href", "srcset") if key in a]
    pictures = [link for link in links if not link.startswith("#")]
    assert pictures and all(link.startswith("data:image/jpeg;base64,") for link in pictures)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert "url(" not in page.source and "default-src 'none'" in page.source
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert {link[1:] for link in links if link.startswith("#")} <= targets


def test_everything_of_the_dataset_is_escaped(view: View) -> None:
    page = view(rows=20)
    assert "<script" not in page.source and "<i>0" not in page.source
    for text in (f"No picture, {HOSTILE}?", f"None: {HOSTILE}", "<i>0</i>", "<b>0.png"):
        assert text in page.text


def test_rows_read_are_prepared_and_rejected(view: View, shards: Path) -> None:
    page = view()
    assert "25 rows read = 21 prepared + 4 rejected." in page.text
    manifest = json.loads((shards / "manifest.json").read_text(encoding="utf-8"))
    assert f"Fingerprint {manifest['fingerprint']}" in page.text
    for split in manifest["splits"].values():
        for key in ("samples", "tokens", "image_tokens", "label_tokens", "views"):
            assert f">{split[key]:,}</td>" in page.source
    for shown in ("pixels raw", "split.validation0.2", "split.near_duplicatesignore"):
        assert shown in page.text.replace("\n", "")


def test_weights_that_leave_out_or_repeat_rows_are_accounted_for(
    tmp_path: Path, tiny_model: Path, view: View
) -> None:
    rows = [turn(f"Question {k}", "Yes.") for k in range(40)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    for weight, said in ((0.5, "left out by weights."), (2, "40 prepared + 0 rejected. Weights ")):
        source = {"path": path, "weight": weight}
        prepare(recipe(tiny_model, tmp_path / f"out{weight}", source))
        assert said in view(tmp_path / f"out{weight}").text
    assert "Weights list them as 80 samples." in view(tmp_path / "out2").text


def test_a_shown_sample_has_its_tokens_texts_and_provenance(view: View, shards: Path) -> None:
    text = view(ids=("square-1",)).text
    sample = next(
        s for name in ("train", "validation") for s in Dataset(shards, name) if s.id == "square-1"
    )
    tokens = int((sample.input_ids == -1).sum())
    assert f"image 1: {tokens} tokens, 2 \u00d7 2 crops" in text
    assert f"image 1: 112 \u00d7 112 pixels, 2 \u00d7 2 crops, {tokens} tokens" in text
    assert "a blue picture. a blue picture.<|end|>" in text and "<|user|>" in text
    assert f"rows.jsonl, row {sample.meta['row'] + 1}" in text
    assert f"{len(sample.input_ids)} tokens, " in text and "1 of 21" in text


def test_shown_samples_are_those_that_were_asked_for_in_that_order(view: View) -> None:
    page = view(ids=("tall-3", "<i>2</i>"))
    headings = page.source.split("<h3>")[1:3]
    assert [h.partition("<")[0] for h in headings] == ["tall-3", "&lt;i&gt;2&lt;/i&gt;"]


def test_of_an_id_that_samples_of_a_dataset_of_before_share_all_are_shown(tmp_path: Path) -> None:
    """Each once, though a weight lists it twice."""
    one, other = make_sample("a", seed=0), make_sample("a", seed=1)
    shards = write_samples(tmp_path / "shards", [one, make_sample("b"), other, other])
    found = find({"train": Dataset(shards, "train")}, ["b", "a"])
    assert [place.index for place in found] == [1, 0, 2]


def test_rejected_rows_stand_by_reason_the_most_frequent_first(view: View) -> None:
    text = view().text
    part = text[text.index("Rejected rows") : text.index("Packs")]
    assert "4 of 25 rows" in part
    assert part.index("image does not exist") < part.index("an answer is empty")
    for shown in ("row 22", "row 23", "row 24", "row 25", "<b>2.png", "gone"):
        assert shown in part


def test_three_examples_of_a_reason_are_shown_and_all_are_counted(
    view: View, shards: Path, tmp_path: Path
) -> None:
    entry = {"source": "s", "row": 0, "id": None, "reason": "too long: it is"}
    lines = [json.dumps(entry | {"row": number}) for number in range(50)]
    rejected = {"count": 50, "by_reason": {"too long": 50}}
    folder = edited(shards, tmp_path / "copy", rejected=rejected, rows=70)
    (folder / "rejected.jsonl").write_text("\n".join(lines), encoding="utf-8")
    page = view(folder)
    assert page.source.count("<small>too long: it is</small>") == 3
    assert '<td class="number">50</td>' in page.source


def test_suspicious_masks_are_named_with_their_samples() -> None:
    clean, found = Audit(1, 2).to_dict(), Audit(1, 2).to_dict()
    found["suspicious"]["not_ended"] = {"count": 1234, "examples": ["<x>", "y"]}
    for audit, verdict in ((clean, "No mask looks wrong."), (found, "Some masks look wrong.")):
        page = Page(audit_section(audit))
        assert verdict in page.text and all(text in page.text for text in SUSPICIONS.values())
    assert '<tr class="wrong"><td>a trained run does not end with &lt;|end|&gt;' in page.source
    assert "1,234<x>, y" in page.text


def test_answers_that_rows_exclude_are_counted_in_words_and_shown_at_their_sample(
    view: View, tmp_path: Path, tiny_model: Path
) -> None:
    row = turn("Hi", "Draft.")
    row["messages"] += turn("Again", "Final.")["messages"]
    row["messages"][1]["train"] = False
    path = write_jsonl(tmp_path / "rows.jsonl", [row, turn("Hi", "Ho")])
    prepare(recipe(tiny_model, tmp_path / "shards", {"path": str(path)}))
    text = view(tmp_path / "shards").text
    assert "2 answers trained, 1 excluded by their rows. No mask looks wrong." in text
    assert text.count("trained_answers") == 1 and "trained_answers[false, true]" in text
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text(encoding="utf-8"))
    splits = manifest["splits"]
    del splits["train"]["audit"]["answers"]  # as in a dataset of before
    text = view(edited(tmp_path / "shards", tmp_path / "before", splits=splits)).text
    assert "of 2 samples it is not recorded which answers their rows exclude. No mask" in text


def test_the_audit_is_the_manifests_where_it_has_one(
    view: View, shards: Path, tmp_path: Path
) -> None:
    manifest = json.loads((shards / "manifest.json").read_text(encoding="utf-8"))
    splits = manifest["splits"]
    splits["train"]["audit"]["longest"][0]["id"] = "from the manifest"
    assert "from the manifest" in view(edited(shards, tmp_path / "copy", splits=splits)).text
    for split in splits.values():
        del split["audit"]
    read = view(edited(shards, tmp_path / "bare", splits=splits)).source
    assert read[read.index('id="audit"') :] == view().source[view().source.index('id="audit"') :]


def test_one_text_sample_without_rejections_gives_a_page(
    view: View, tmp_path: Path, tiny_model: Path
) -> None:
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", [turn("Hello", "Hi")]))}
    prepare(recipe(tiny_model, tmp_path / "shards", source))
    page = view(tmp_path / "shards", rows=1000)
    assert "1 of 1;" in page.text and "Rejected rowsNone." in page.text
    assert not page.all("img") and not page.all("image")
    assert "Crops of canvases" not in page.text and "all packs" in page.text.lower()


def test_the_same_dataset_gives_the_same_page(view: View) -> None:
    assert view().source == view().source


def test_the_tokenizer_must_be_the_datasets(view: View, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", text_pieces=20)
    with pytest.raises(ConfigError, match="^model .*other has tokenizer .* made with .*--model$"):
        view(model=str(other))
    with pytest.raises(ConfigError, match="^there is no folder .*nothing, .*; --model says where"):
        view(model=str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"rows": 0}, "^--rows must be at least 1, got 0$"),
        ({"max_views": -1}, "^--max_views must be at least 1"),
        ({"ids": ("square-0", "nobody")}, "^--ids names 'nobody', which is no sample"),
        ({"max_tokens": 20}, "^sample '.*' has .* tokens .* a pack holds .* 20 "),
    ],
)
def test_what_cannot_be_met_is_refused(view: View, wishes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        view(**wishes)


def test_a_missing_folder_is_made_and_an_out_that_cannot_be_is_refused(
    shards: Path, tmp_path: Path
) -> None:
    write_view(shards, tmp_path / "a/b/view.html", Wishes(rows=1))
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["view.html"]
    with pytest.raises(ConfigError, match="^--out .*/b is a folder; name a file in it"):
        write_view(shards, tmp_path / "a/b", Wishes())
    with pytest.raises(ConfigError, match="^--out .* cannot be written .*; name another file$"):
        write_view(shards, tmp_path / "a/b/view.html/view.html", Wishes(rows=1))


def test_a_page_that_cannot_be_written_leaves_the_former_one(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = view(rows=1).source

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(ConfigError, match="disk full"):
        view(rows=2)
    assert [path.name for path in tmp_path.iterdir()] == ["view.html"]
    assert (tmp_path / "view.html").read_text(encoding="utf-8") == before


def test_a_folder_that_is_no_dataset_or_damaged_is_refused(
    view: View, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShardError, match="holds no manifest.json"):
        view(tmp_path)
    folder = edited(shards, tmp_path / "copy")
    for text, message in (
        ("", "^.*/rejected.jsonl lists 0 rows, the manifest says 4; remove"),
        ("[1]\n", "^.*/rejected.jsonl cannot be read"),
        ("{\n", "^.*/rejected.jsonl cannot be read"),
    ):
        (folder / "rejected.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(ShardError, match=message):
            view(folder)
    (folder / "rejected.jsonl").unlink()
    with pytest.raises(ShardError, match="cannot be read .*No such file"):
        view(folder)
