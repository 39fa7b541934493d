"""The settings by which pictures become canvases; they travel from a dataset to whoever asks.

    dataset's recipe  ->  manifest.json  ->  run's data.json  ->  generate, evaluate, the export's
                                                                  preprocessor_config.json

A base's preprocessor_config.json is read when a dataset is prepared; whoever comes later finds what
it said in the manifest and in data.json, so that the base may lack it.

A model folder that says nothing of `images` is the published one, and so is a dataset folder that
was made before there was a choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from phi3v.config.dataset import Alpha, Exif, ImagesSection
from phi3v.errors import ConfigError

PUBLISHED = ImagesSection(alpha="published", exif="published")
OWN_KEY = "phi3v"
"""Of preprocessor_config.json: what the published processor has no key for, and passes over."""

PREPROCESSOR = "preprocessor_config.json"
VIEWS = ("crop_size", "image_side", "image_mean", "image_std")
"""Of a dataset's manifest: how its canvases become views."""

CHOICES = {"never_upscale": (False, True), "alpha": get_args(Alpha), "exif": get_args(Exif)}
"""What each may be; the published way is what is meant where nothing is said."""


@dataclass(frozen=True)
class PictureSettings:
    """How a picture becomes a canvas; each is a key of a dataset's recipe."""

    num_crops: int
    never_upscale: bool = False
    images: ImagesSection = PUBLISHED

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], place: str) -> "PictureSettings":
        """Read what `to_dict` gave.

        place  for messages: the file that holds it
        Raises: ConfigError if it says something that this program does not know.
        """
        own = {name: value for name, value in values.items() if name != "num_crops"}
        return cls(_num_crops(values, place), *_own(own, place))

    @classmethod
    def from_preprocessor(cls, values: Mapping[str, Any], place: str) -> "PictureSettings":
        """Read a model's preprocessor_config.json.

        Raises: ConfigError as `from_dict`.
        """
        own = values.get(OWN_KEY, {})
        if not isinstance(own, dict):
            raise ConfigError(f"{place}: {OWN_KEY} must be an object, got {own!r}")
        return cls(_num_crops(values, place), *_own(own, place))

    def to_dict(self) -> dict[str, Any]:
        """As JSON, on one level."""
        return {
            "num_crops": self.num_crops,
            "never_upscale": self.never_upscale,
            **asdict(self.images),
        }

    def to_preprocessor(self) -> dict[str, Any]:
        """What these settings change in a preprocessor_config.json."""
        own = {name: value for name, value in self.to_dict().items() if name != "num_crops"}
        is_published = (self.never_upscale, self.images) == (False, PUBLISHED)
        return {"num_crops": self.num_crops} | ({} if is_published else {OWN_KEY: own})

    def whole_preprocessor(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """A preprocessor_config.json with the published keys, where there is none to change.

        manifest  a dataset's, or what a run's data.json keeps of it (VIEWS)
        """
        return {
            **self.to_preprocessor(),
            "image_mean": list(manifest["image_mean"]),
            "image_std": list(manifest["image_std"]),
            "image_processor_type": "Phi3VImageProcessor",
            "processor_class": "Phi3VProcessor",
            "num_img_tokens": manifest["image_side"] ** 2,
        }

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.to_dict().items())


@dataclass(frozen=True)
class Prepared:
    """A source of a dataset, and how its pictures were prepared."""

    dataset: str
    source: str | None
    samples: int
    settings: PictureSettings

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], place: str) -> "Prepared":
        """Read what `to_dict` gave.

        Raises: ConfigError as `PictureSettings.from_dict`.
        """
        own = {
            name: v for name, v in values.items() if name not in ("dataset", "source", "samples")
        }
        settings = PictureSettings.from_dict(own, place)
        return cls(values["dataset"], values["source"], values["samples"], settings)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        name = {"dataset": self.dataset, "source": self.source, "samples": self.samples}
        return name | self.settings.to_dict()

    def __str__(self) -> str:
        return self.dataset if self.source is None else f"{self.source} in {self.dataset}"


def prepared(folder: str, split: str, manifest: Mapping[str, Any]) -> list[Prepared]:
    """The sources of a dataset folder by its manifest, each with its settings.

    A manifest of before knows one number of crops, the largest, and the published pixels.
    Raises: ConfigError as `PictureSettings.from_dict`.
    """
    place = f"{folder}/manifest.json"
    samples = manifest["splits"][split]["samples"]
    if "pictures" not in manifest:
        never_upscale = manifest["recipe"].get("never_upscale", False)
        settings = PictureSettings(manifest["num_crops"], never_upscale)
        return [Prepared(folder, None, samples, settings)]
    sources = [
        (entry["source"], PictureSettings.from_dict(_without(entry, "source"), place))
        for entry in manifest["pictures"]
    ]
    is_one = len({settings for _, settings in sources}) == 1
    found = sources[:1] if is_one else sources
    return [Prepared(folder, None if is_one else name, samples, s) for name, s in found]


def choose(parts: Sequence[Prepared]) -> tuple[PictureSettings, str | None]:
    """The settings that a model trained on these is asked by, and a sentence if they differ.

    Those with the most crops are taken, for the model has seen as many; among equals those of the
    dataset with the most samples.
    """
    taken = max(parts, key=lambda part: (part.settings.num_crops, part.samples)).settings
    names: dict[PictureSettings, list[str]] = {}
    for part in parts:
        names.setdefault(part.settings, []).append(str(part))
    if len(names) == 1:
        return taken, None
    told = "; ".join(f"{settings} for {', '.join(of)}" for settings, of in names.items())
    return taken, f"pictures were prepared in different ways: {told}; taken is {taken}"


def _num_crops(values: Mapping[str, Any], place: str) -> int:
    number = values.get("num_crops")
    if type(number) is not int or number < 1:
        raise ConfigError(f"{place}: num_crops must be a number from 1, got {number!r}")
    return number


def _own(values: Mapping[str, Any], place: str) -> tuple[bool, ImagesSection]:
    """never_upscale and the rules of images; each may be missing."""
    for name, value in values.items():
        if name not in CHOICES or value not in CHOICES[name]:
            known = ", ".join(f"{key} {list(choices)}" for key, choices in CHOICES.items())
            raise ConfigError(
                f"{place} says {name} {value!r} of pictures, this program knows {known}; use the "
                "program that wrote it"
            )
    images = asdict(PUBLISHED) | _without(values, "never_upscale")
    return values.get("never_upscale", False), ImagesSection(**images)


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
