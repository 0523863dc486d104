"""Jobs that turn corpora on disk into shards."""
