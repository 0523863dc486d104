"""What classes are called in training: their names, synonyms that a run gives them, and templates around both.

A text has an id, its row of the table of embeddings: class names first, then synonyms that are no class's name, then
all of these in each template. At prediction the user chooses the words; a model that has seen a class in one wording
alone may know the wording instead of the class.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from digseg.config.schema import BACKGROUND, QueriesConfig
from digseg.data.format import Manifest
from digseg.errors import DigSegError, nearest

Ids = npt.NDArray[np.int64]
Synonyms = Mapping[str, Mapping[str, Sequence[str]]]  # corpus -> class -> other words for it


def class_names(manifests: Sequence[Manifest]) -> tuple[str, ...]:
    """All class names of the corpora and ``background``, sorted."""
    return tuple(sorted({BACKGROUND}.union(*(manifest.vocabulary for manifest in manifests))))


def name_table(manifests: Sequence[Manifest], synonyms: Synonyms) -> tuple[str, ...]:
    """The class names, then the synonyms that are none of them, sorted."""
    names = class_names(manifests)
    wordings = {word for classes in synonyms.values() for words in classes.values() for word in words}
    return names + tuple(sorted(wordings.difference(names)))


def check_synonyms(synonyms: Synonyms, manifests: Sequence[Manifest]) -> None:
    """Whether synonyms are of classes that their corpora have, and none is itself a class there.

    Raises:
        DigSegError: names the corpus, the class and the wording.
    """
    for manifest in manifests:
        taken = {BACKGROUND, *(name.lower() for name in manifest.vocabulary)}
        for name, wordings in synonyms.get(manifest.corpus, {}).items():
            where = f"data.queries.synonyms: {manifest.corpus}"
            if name not in manifest.vocabulary:
                raise DigSegError(f"{where}: there is no class {name!r}{nearest(name, manifest.vocabulary)}")
            for wording in wordings:
                if wording.lower() in taken:
                    raise DigSegError(
                        f"{where}: {wording!r}, a wording of {name!r}, is itself a class that is asked for; remove it"
                    )


def unambiguous(synonyms: Synonyms, names: Collection[str], known: Collection[str]) -> dict[str, list[str]]:
    """The synonyms of ``names`` in all corpora together, without those that stand for some other class as well and
    those that are ``known`` for something else."""
    meanings: dict[str, set[str]] = defaultdict(set)
    for classes in synonyms.values():
        for name, wordings in classes.items():
            for wording in wordings:
                meanings[wording.lower()].add(name)
    taken = {word.lower() for word in known}
    return {
        name: sorted(
            {
                word
                for classes in synonyms.values()
                for word in classes.get(name, ())
                if meanings[word.lower()] == {name} and word.lower() not in taken
            }
        )
        for name in names
    }


def put_into_words(
    name_ids: Ids, synonym_ids: Mapping[int, Ids], num_names: int, settings: QueriesConfig, rng: np.random.Generator
) -> Ids:
    """The texts ``[K]`` that a query asks for: each name or a synonym of it, all of them perhaps in one template."""
    text_ids = name_ids.copy()
    for slot, name_id in enumerate(name_ids.tolist()):
        others = synonym_ids.get(name_id)
        if others is not None and rng.random() < settings.synonym_p:
            text_ids[slot] = rng.choice(others)
    if settings.templates and rng.random() < settings.template_p:
        text_ids += num_names * rng.integers(1, len(settings.templates) + 1)
    return text_ids
