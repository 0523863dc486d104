"""What a training sample is asked: which class names, in which slots, in which colours.

A query is drawn from the corpus' vocabulary alone, before the mask is seen: a class keeps its slot whether
or not the crop shows it, else the set of names would tell the answer. Some queries are random
sub-vocabularies, where the pixels of dropped classes become background, and some ask for *foreign* classes
that cannot be visible, so that a name without its object is learned to be empty. What its classes are called is
drawn last (:mod:`digseg.data.wordings`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from digseg.config.schema import BACKGROUND, QueriesConfig
from digseg.data.format import Manifest
from digseg.data.wordings import Ids, Synonyms, class_names, name_table, put_into_words, unambiguous

IGNORE_SLOT = 255


@dataclass(frozen=True)
class QueryVocabulary:
    """A corpus' classes as ids of the table of all names, and the foreign names it may be asked for.

    ``background_class`` is the vocabulary's own background class, or None where it has none; ``synonym_ids`` are
    the other wordings, by the id of the name, where there are any; ``num_names`` is the size of the table.
    """

    name_ids: Ids
    background_class: int | None
    background_name_id: int
    foreign_name_ids: Ids
    synonym_ids: Mapping[int, Ids]
    num_names: int
    mask_values: int

    @cached_property
    def foreground(self) -> Ids:
        """Class numbers without the background."""
        classes = np.arange(len(self.name_ids))
        return classes if self.background_class is None else np.delete(classes, self.background_class)


@dataclass(frozen=True)
class Query:
    """K slots. A slot's place says nothing: slots are shuffled.

    ``text_ids`` int64 [K] into the table of texts, ``colour_ids`` int64 [K] into the palette, no colour
    twice; ``label_map`` uint8 [256 or 65536]: mask value -> slot, 255 where ignored; ``frequencies``
    float64 [K]: share of the corpus' labelled training pixels in the slot, -1 for foreign slots.
    """

    text_ids: Ids
    colour_ids: Ids
    label_map: npt.NDArray[np.uint8]
    frequencies: npt.NDArray[np.float64]


def query_vocabulary(
    manifest: Manifest, manifests: Sequence[Manifest], names: Sequence[str], synonyms: Synonyms
) -> QueryVocabulary:
    """The query vocabulary of one corpus of a mixture.

    A name is foreign if some corpus of *another* domain has it and it can not be visible here: it is not in
    the vocabulary, not in ``may_contain``, and no corpus of the same domain has it, or a synonym like it (two corpora
    of a domain often have two words for one thing); case does not count, as text encoders do not read it. Foreign names
    go by their synonyms too, as a wording would else tell that the class is one of the image's own corpus.

    Args:
        names: the table of names.
    """
    position = {name: number for number, name in enumerate(names)}
    visible = {BACKGROUND, *manifest.may_contain}
    for other in manifests:
        if other.domain == manifest.domain:
            visible.update(other.vocabulary, *synonyms.get(other.corpus, {}).values())
    visible = {word.lower() for word in visible}
    known = class_names(manifests)
    foreign = [name for name in known if name.lower() not in visible]
    wordings = {**unambiguous(synonyms, foreign, visible.union(known)), **synonyms.get(manifest.corpus, {})}
    own = manifest.vocabulary

    def ids(words: Iterable[str]) -> Ids:
        return np.array([position[word] for word in words], dtype=np.int64)

    return QueryVocabulary(
        name_ids=ids(own),
        background_class=own.index(BACKGROUND) if BACKGROUND in own else None,
        background_name_id=position[BACKGROUND],
        foreign_name_ids=ids(foreign),
        synonym_ids={position[name]: ids(words) for name, words in wordings.items() if words},
        num_names=len(names),
        mask_values=manifest.ignore_id + 1,
    )


def class_frequencies(manifest: Manifest) -> npt.NDArray[np.float64]:
    """Share of each class in the labelled pixels of a split, [classes]; zeros where nothing is labelled."""
    pixels = np.array(manifest.statistics.class_pixels, dtype=np.float64)
    shares: npt.NDArray[np.float64] = pixels / max(pixels.sum(), 1.0)
    return shares


def largest_query(settings: QueriesConfig, manifests: Sequence[Manifest]) -> int:
    """Slots of the largest query that a mixture may draw; the most that any may where nothing is known of it."""
    names, synonyms = name_table(manifests, settings.synonyms), settings.synonyms
    vocabularies = [query_vocabulary(one, manifests, names, synonyms) for one in manifests]
    sizes = [len(one.name_ids) + min(settings.max_foreign, len(one.foreign_name_ids)) for one in vocabularies]
    return min(settings.max_classes, max(sizes, default=settings.max_classes))


def draw_query(
    vocabulary: QueryVocabulary,
    frequencies: npt.NDArray[np.float64],
    settings: QueriesConfig,
    rng: np.random.Generator,
) -> Query:
    """Draw the query of one sample; it depends on nothing but the arguments and the generator's state.

    ``frequencies`` [classes] is shared out to the slots: dropped classes add to the background's.
    """
    kept, num_foreign = _draw_classes(vocabulary, settings, rng)
    kept = _within(kept, vocabulary, settings.max_classes, rng)
    has_background = vocabulary.background_class is not None or len(kept) < len(vocabulary.foreground)
    num_foreign = min(num_foreign, settings.max_classes - len(kept) - int(has_background))
    foreign = vocabulary.foreign_name_ids[:0]
    if num_foreign > 0:
        foreign = rng.choice(vocabulary.foreign_name_ids, size=num_foreign, replace=False)

    name_ids = np.concatenate(
        [vocabulary.name_ids[kept], foreign, [vocabulary.background_name_id] if has_background else []]
    ).astype(np.int64)
    slot_of = rng.permutation(len(name_ids))
    label_map = np.full(vocabulary.mask_values, IGNORE_SLOT, dtype=np.uint8)
    slot_frequencies = np.full(len(name_ids), -1.0)
    if has_background:
        slot = slot_of[-1]
        label_map[: len(vocabulary.name_ids)] = slot
        slot_frequencies[slot] = frequencies.sum() - frequencies[kept].sum()
    label_map[kept] = slot_of[: len(kept)]
    slot_frequencies[slot_of[: len(kept)]] = frequencies[kept]

    shuffled = np.empty_like(name_ids)
    shuffled[slot_of] = name_ids
    if settings.random_colours:
        colours = rng.permutation(settings.palette_size)[: len(name_ids)]
    else:
        colours = np.empty_like(name_ids)
        colours[slot_of] = _colours_in_order(kept, len(foreign), vocabulary, has_background)
    text_ids = put_into_words(shuffled, vocabulary.synonym_ids, vocabulary.num_names, settings, rng)
    return Query(text_ids, colours.astype(np.int64), label_map, slot_frequencies)


def class_weights(frequencies: npt.NDArray[np.float64], exponent: float, maximum: float) -> npt.NDArray[np.float32]:
    """Loss weights [K] of a query's slots: min(maximum, f_c^-e / sum_j f_j^(1-e)), and 1 for foreign slots
    (f = -1).

    The mean weight of a labelled pixel is 1 before the cut-off. ``exponent`` 0 weighs all pixels alike.
    """
    weights = np.ones(len(frequencies), dtype=np.float32)
    own = frequencies >= 0
    shares = frequencies[own]
    if shares.sum() > 0:
        shares = np.maximum(shares / shares.sum(), 1e-9)
        weights[own] = np.minimum(maximum, shares**-exponent / np.sum(shares ** (1 - exponent)))
    return weights


def _draw_classes(vocabulary: QueryVocabulary, settings: QueriesConfig, rng: np.random.Generator) -> tuple[Ids, int]:
    """(foreground classes that are kept, number of foreign names)."""
    foreground = vocabulary.foreground
    if rng.random() >= settings.sub_vocabulary_p:
        return foreground, 0
    available = min(settings.max_foreign, len(vocabulary.foreign_name_ids))
    num_foreign = int(rng.integers(1, available + 1)) if available else 0
    if len(foreground) > 1:
        size = int(rng.integers(1, len(foreground)))
        kept = np.sort(rng.choice(foreground, size=size, replace=False))
        return kept, num_foreign if rng.random() < settings.foreign_p else 0
    # Without a single name but the background there would be nothing to decide.
    keep = rng.random() < settings.foreground_p or num_foreign == 0
    return foreground if keep else foreground[:0], num_foreign


def _colours_in_order(kept: Ids, num_foreign: int, vocabulary: QueryVocabulary, has_background: bool) -> Ids:
    """The palette's first colours as prediction gives them to the same names: in the order of the vocabulary.

    A background that is none of its classes comes first, foreign names last. The result follows the query's order
    before its slots are shuffled: kept classes, foreign names, background.
    """
    background = -1 if vocabulary.background_class is None else vocabulary.background_class
    foreign = len(vocabulary.name_ids) + np.arange(num_foreign)
    order = np.concatenate([kept, foreign, [background] if has_background else []])
    return order.argsort().argsort()


def _within(kept: Ids, vocabulary: QueryVocabulary, max_classes: int, rng: np.random.Generator) -> Ids:
    """So many of the classes that they and the background fit; chance decides, not what the mask shows."""
    dropped = vocabulary.background_class is not None or len(kept) < len(vocabulary.foreground)
    if len(kept) + int(dropped) <= max_classes:
        return kept
    return np.sort(rng.choice(kept, size=max_classes - 1, replace=False))
