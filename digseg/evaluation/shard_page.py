"""One HTML page that shows what a folder of shards holds: samples with their masks, classes, domains, licences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from digseg.console import progress
from digseg.data.corpus import Sample, ShardedCorpus
from digseg.data.duplicates import DuplicateGroup, Member, find_duplicates
from digseg.data.format import REJECTED_NAME, Manifest, Rejected, Statistics, list_manifests, split_path
from digseg.data.latents import LatentRecipe
from digseg.data.storage import Storage
from digseg.errors import DigSegError
from digseg.evaluation.colours import class_colours, paint
from digseg.evaluation.page import data_uri, render

_SHOWN_LEAKS = 24
_LISTED_GROUPS = 500
_TILE_PX = 320  # longer side of a picture on the page


@dataclass(frozen=True)
class _ClassRow:
    name: str
    colour: str
    images: int
    share: float


@dataclass(frozen=True)
class _Picture:
    key: str
    size: str
    classes: str
    image: str
    mask: str


@dataclass(frozen=True)
class _Leak:
    """Two images side by side, and what is to be said of them."""

    caption: str
    images: tuple[str, str]


@dataclass(frozen=True)
class _SplitView:
    name: str
    domain: str
    licence: str
    samples: int
    shards: int
    bytes: int
    sizes: str
    digest: str
    latents: str | None
    ignored: float
    rejected: list[Rejected]
    classes: list[_ClassRow]
    sheet: list[_Picture]


def shard_page(root: str | Path, samples_per_split: int = 12) -> str:
    """HTML of all splits below a root (a folder or fsspec URL); it refers to nothing outside itself.

    Statistics are those of the manifests; of each split ``samples_per_split`` samples are read, evenly spaced, and
    the images of the closest leaks.

    Raises:
        DigSegError: no shards there, or one of the samples is damaged.
    """
    manifests = list_manifests(root)
    duplicates = find_duplicates(Storage(root), manifests)
    with progress("drawing", len(manifests), unit="splits") as bar:
        splits = []
        for manifest in manifests:
            splits.append(_view(root, manifest, samples_per_split))
            bar.advance()
    return render(
        "shard_page.html.j2",
        root=str(root),
        splits=splits,
        duplicates=duplicates,
        leaks=[_leak(root, group) for group in duplicates.leaks[:_SHOWN_LEAKS]],
        groups=duplicates.groups[:_LISTED_GROUPS],
    )


def _leak(root: str | Path, group: DuplicateGroup) -> _Leak:
    first, second = (_image_of(root, member) for member in group.pair)
    return _Leak(str(group), (first, second))


def _image_of(root: str | Path, member: Member) -> str:
    corpus, _, split = member.split.partition("/")
    return data_uri(ShardedCorpus(root, corpus, split).must_read(member.number).image, "JPEG", _TILE_PX)


def _view(root: str | Path, manifest: Manifest, samples_per_split: int) -> _SplitView:
    corpus = ShardedCorpus(root, manifest.corpus, manifest.split)
    counts = manifest.statistics
    labelled = sum(counts.class_pixels)
    return _SplitView(
        name=split_path(manifest.corpus, manifest.split),
        domain=manifest.domain.replace("_", " "),
        licence=manifest.licence,
        samples=manifest.samples,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        sizes=_sizes(counts),
        digest=manifest.digest,
        latents=_latents(manifest.latents),
        ignored=counts.ignore_pixels / max(1, labelled + counts.ignore_pixels),
        rejected=_rejected(root, manifest),
        classes=[
            _ClassRow(name, f"rgb({red}, {green}, {blue})", images, pixels / max(1, labelled))
            for name, (red, green, blue), images, pixels in zip(
                manifest.vocabulary,
                class_colours(manifest.vocabulary),
                counts.class_images,
                counts.class_pixels,
                strict=True,
            )
        ],
        sheet=[_picture(sample, manifest) for sample in corpus.evenly(samples_per_split)],
    )


def _rejected(root: str | Path, manifest: Manifest) -> list[Rejected]:
    storage, path = Storage(root), f"{split_path(manifest.corpus, manifest.split)}/{REJECTED_NAME}"
    with storage.reading():
        try:
            return [Rejected.model_validate_json(line) for line in storage.read(path).splitlines()]
        except (ValueError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise DigSegError(f"{storage.url(path)} is damaged ({reason}); run {manifest.job} again") from error


def _latents(recipe: LatentRecipe | None) -> str | None:
    """What the views are, and which autoencoder encoded them."""
    if recipe is None:
        return None
    autoencoder = ", ".join(f"{name} {value[:12]}" for name, value in recipe.autoencoder.items())
    shape = " x ".join(map(str, recipe.latent_shape))
    return f"{recipe.views} views of each sample, {shape} by autoencoder of {autoencoder}"


def _sizes(counts: Statistics) -> str:
    smallest = f"{counts.min_width} x {counts.min_height}"
    largest = f"{counts.max_width} x {counts.max_height}"
    return f"{largest} px" if smallest == largest else f"{smallest} to {largest} px"


def _picture(sample: Sample, manifest: Manifest) -> _Picture:
    height, width = sample.mask.shape
    present = [name for number, name in enumerate(manifest.vocabulary) if (sample.mask == number).any()]
    # Painted small: every pixel of the tile is one of the mask, so that no colour is mixed.
    step = max(1, -(-max(height, width) // _TILE_PX))
    painted = paint(sample.mask[::step, ::step], manifest.vocabulary, manifest.ignore_id)
    return _Picture(
        sample.key,
        f"{width} x {height}",
        ", ".join(present) or "nothing labelled",
        data_uri(sample.image, "JPEG", _TILE_PX),
        data_uri(painted, "PNG", _TILE_PX),
    )
