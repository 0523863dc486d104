"""What a protocol asks, given what models say they were trained on and which shards there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from digseg.config import Protocol
from digseg.data.format import Manifest, list_manifests, split_path
from digseg.errors import DigSegError, nearest
from digseg.evaluation.evaluate import Question, renamed

if TYPE_CHECKING:  # takes seconds to import
    from digseg.model.card import ModelCard


@dataclass(frozen=True)
class AskedSplit:
    """A split with its questions: the vocabulary as it is, then once for each renamed class."""

    manifest: Manifest
    questions: tuple[Question, ...]
    renamings: tuple[tuple[str, str], ...]  # (class, wording) of the questions after the first

    @property
    def name(self) -> str:
        """`corpus/split`."""
        return split_path(self.manifest.corpus, self.manifest.split)


def ask(
    protocol: Protocol,
    manifests: Sequence[Manifest],
    cards: Sequence[ModelCard],
    synonyms: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    oracle: bool = False,
) -> list[AskedSplit]:
    """The splits that belong to the protocol, with what is asked of them.

    Args:
        cards: of all models that are to be compared: a corpus is *trained* if it is so for each of them, and
            *untrained* if it is for none.
        synonyms: further wordings, beside the protocol's: corpus -> class -> wordings.

    Raises:
        DigSegError: no split is left, a synonym of a class or corpus that is not there, or a model that does not
            say what it was trained on where the protocol asks for it.
    """
    chosen = [manifest for manifest in manifests if _belongs(protocol, manifest, cards)]
    if not chosen:
        there = ", ".join(split_path(manifest.corpus, manifest.split) for manifest in manifests)
        raise DigSegError(f"protocol {protocol.name!r} has nothing to evaluate: none of {there} is {_wanted(protocol)}")
    names = {manifest.corpus for manifest in chosen}
    for corpus in synonyms or {}:
        if corpus not in names:
            raise DigSegError(f"synonyms: corpus {corpus!r} is not among those evaluated{nearest(corpus, names)}")
    return [_asked(manifest, {**protocol.synonyms, **(synonyms or {})}, oracle) for manifest in chosen]


def choose_splits(root: str, split: str | None = None, corpora: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(corpus, split) pairs below a shards' root: those of `split`, else all that are not for training; only
    `corpora` if any are named.

    Raises:
        DigSegError: nothing is left, a corpus that is not there, or latents in place of images.
    """
    manifests = list_manifests(root)
    if any(manifest.latents is not None for manifest in manifests):
        raise DigSegError(f"{root} holds latents of augmented views; evaluate on the shards they were made from")
    names = sorted({manifest.corpus for manifest in manifests})
    for name in corpora:
        if name not in names:
            raise DigSegError(f"corpora: no shards of {name!r} below {root}{nearest(name, names)}")
    chosen = [
        (manifest.corpus, manifest.split)
        for manifest in manifests
        if (manifest.split == split if split else manifest.split != "train")
        and (not corpora or manifest.corpus in corpora)
    ]
    if not chosen:
        found = ", ".join(f"{manifest.corpus}/{manifest.split}" for manifest in manifests)
        wanted = f"split {split!r}" if split else "split for evaluation (all are 'train'; name one as split)"
        raise DigSegError(f"no {wanted} below {root}; there are: {found}")
    return chosen


def trained_corpora(card: ModelCard) -> set[str]:
    """Names of the corpora that a model was trained on.

    Raises:
        DigSegError: the model does not say it.
    """
    datasets = card.metadata.get("datasets")
    if not isinstance(datasets, dict):
        raise DigSegError(
            "the model does not say what it was trained on (its card has no metadata.datasets), so corpora cannot be "
            "told into trained and untrained ones; evaluate without a protocol, or name them with --corpora"
        )
    return {name.partition("/")[0] for name in datasets}


def _belongs(protocol: Protocol, manifest: Manifest, cards: Sequence[ModelCard]) -> bool:
    if protocol.corpora != "any":
        trained = [manifest.corpus in trained_corpora(card) for card in cards]
        if not (all(trained) if protocol.corpora == "trained" else not any(trained)):
            return False
    if protocol.unseen_classes:
        known = [{name.lower() for name in card.names} for card in cards]
        return any(all(name.lower() not in names for names in known) for name in manifest.vocabulary)
    return True


def _wanted(protocol: Protocol) -> str:
    images = {"any": "a corpus", "trained": "a corpus trained on", "untrained": "a corpus never trained on"}
    return images[protocol.corpora] + (" with class names never trained on" if protocol.unseen_classes else "")


def _asked(manifest: Manifest, synonyms: Mapping[str, Mapping[str, Sequence[str]]], oracle: bool) -> AskedSplit:
    wordings = synonyms.get(manifest.corpus, {})
    renamings = tuple((label, wording) for label, others in wordings.items() for wording in others)
    names = [manifest.vocabulary, *(renamed(manifest.vocabulary, *renaming) for renaming in renamings)]
    return AskedSplit(manifest, tuple(Question(wording, oracle) for wording in names), renamings)
