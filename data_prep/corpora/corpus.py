"""A corpus on disk: its description joined with a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from data_prep.corpora.description import CONFIGS, load_spec
from data_prep.corpora.labels import mask_ids
from data_prep.corpora.layout import SampleRef, list_samples
from data_prep.corpora.patterns import missing_folder
from data_prep.corpora.source import BadSample, Source, UInt8Array, image_pixels, open_source
from data_prep.corpora.spec import CorpusSpec
from digseg.errors import DigSegError, nearest


def corpus_names() -> list[str]:
    """Names that :func:`load_corpus` knows, sorted."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_corpus(name: str, root: str | Path) -> Corpus:
    """The corpus called ``name`` (or described by the YAML file ``name``) whose files lie below ``root``.

    Raises:
        DigSegError: the name is unknown, the folder is missing or the description is wrong.
    """
    described = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not described.is_file():
        hint = nearest(name, corpus_names())
        raise DigSegError(f"unknown corpus {name!r}{hint} (or give the path of a description of your own)")
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise DigSegError(f"corpus {described.stem}: the folder {root} does not exist")
    corpus_name, spec = load_spec(described, root)
    return Corpus(corpus_name, root, spec)


class SampleContent(NamedTuple):
    """What :meth:`Corpus.read` gives."""

    image: UInt8Array
    """uint8 [H, W, 3], RGB."""
    mask: UInt8Array
    """uint8 [H, W], ids of the vocabulary, 255 where there is no label."""
    image_bytes: bytes | None
    """The image file as it is, where a shard may hold it verbatim."""
    image_ext: str
    """Suffix that fits ``image_bytes``: ``jpg`` or ``png``."""


@dataclass(frozen=True)
class Corpus:
    """Lists and reads the samples of one corpus. Holds no open files, so it travels to worker processes."""

    name: str
    root: Path
    spec: CorpusSpec

    @property
    def domain(self) -> str:
        return self.spec.domain

    @property
    def licence(self) -> str:
        return self.spec.licence

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Class names; the id of a class is its position."""
        return self.spec.vocabulary

    @property
    def may_contain(self) -> tuple[str, ...]:
        """Foreign class names that may be visible in the images."""
        return tuple(name for name in self.spec.may_contain if name not in self.vocabulary)

    @property
    def splits(self) -> tuple[str, ...]:
        return self.spec.split_names()

    def list(self, split: str) -> list[SampleRef]:
        """The samples of a split, sorted by key, those with a ``problem`` included.

        Raises:
            DigSegError: the corpus has no such split, or it is empty.
        """
        if split not in self.splits:
            raise DigSegError(f"corpus {self.name} has no split {split!r}{nearest(split, self.splits)}")
        refs = list_samples(self.spec, self.root, split)
        if not refs:
            patterns = self.spec.layout.get(split) or next(iter(self.spec.layout.values()))
            missing = missing_folder(self.root, patterns.images)
            raise DigSegError(
                f"corpus {self.name}: split {split!r} is empty, no sample matches {patterns.images} below {self.root}"
                + (f": {missing} does not exist" if missing else "")
            )
        return refs

    def read(self, ref: SampleRef) -> SampleContent:
        """Decode a sample and map its mask to class ids.

        Raises:
            BadSample: with the reason why it cannot be used.
        """
        _, content = next(self.read_all([ref]))
        if isinstance(content, BadSample):
            raise content
        return content

    def read_all(self, refs: Iterable[SampleRef]) -> Iterator[tuple[SampleRef, SampleContent | BadSample]]:
        """Read samples in turn; the reason stands in place of one that cannot be used.

        Files are decoded once for all tiles of theirs that follow each other.
        """
        for (image, mask, problem), tiles in groupby(refs, key=lambda ref: (ref.image, ref.mask, ref.problem)):
            try:
                if problem is not None:
                    raise BadSample(problem)
                source = open_source(image, mask if isinstance(mask, tuple) else (mask,), self.spec)
            except BadSample as error:
                for ref in tiles:
                    yield ref, error
                continue
            for ref in tiles:
                yield ref, self._content(ref, source)

    def _content(self, ref: SampleRef, source: Source) -> SampleContent | BadSample:
        part = source if ref.box is None else source.cropped(ref.box)
        try:
            mask = mask_ids(part, self.spec)
        except BadSample as error:
            return error if ref.box is None else BadSample(f"tile at row {ref.box[1]}, column {ref.box[0]}: {error}")
        # By what is in the file, not by its name: readers of the shard choose their decoder by the suffix.
        extension = "jpg" if part.image.format == "JPEG" else "png"
        return SampleContent(image_pixels(part.image, self.spec), mask, part.image_bytes, extension)
