"""Adapters from corpora as they lie on disk to (image, mask of contiguous class ids).

A corpus is described by data, ``configs/corpora/NAME.yaml``: where its images and masks lie, how its splits
are made, how mask pixels become classes. :func:`load_corpus` joins a description with a folder.
"""

from data_prep.corpora.corpus import Corpus, SampleContent, corpus_names, load_corpus
from data_prep.corpora.layout import SampleRef
from data_prep.corpora.source import BadSample

__all__ = ["BadSample", "Corpus", "SampleContent", "SampleRef", "corpus_names", "load_corpus"]
