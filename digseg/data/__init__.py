"""Shards, the global order of samples, the mixture of corpora, and training batches.

Nothing is imported here: data preparation reads ``format`` and ``writer`` without paying for torch.
"""
