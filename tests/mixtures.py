"""Manifests of corpora without shards, whose vocabularies overlap in all ways that matter to queries."""

from digseg.data.format import FORMAT_VERSION, Manifest, Statistics, ignore_id


def manifest(
    corpus: str,
    domain: str,
    vocabulary: tuple[str, ...],
    may_contain: tuple[str, ...] = (),
    pixels: tuple[int, ...] | None = None,
) -> Manifest:
    pixels = pixels or tuple(100 * (place + 1) for place in range(len(vocabulary)))
    return Manifest(
        format_version=FORMAT_VERSION,
        corpus=corpus,
        domain=domain,
        split="train",
        licence="none",
        vocabulary=vocabulary,
        may_contain=may_contain,
        ignore_id=ignore_id(len(vocabulary)),
        samples=1,
        rejected=0,
        rejected_sha256="0" * 64,
        shards=(),
        statistics=Statistics(
            class_pixels=pixels,
            class_images=pixels,
            ignore_pixels=0,
            min_height=1,
            max_height=1,
            min_width=1,
            max_width=1,
        ),
    )


STREET = manifest("street", "natural", ("road", "car", "sky", "person"), may_contain=("building",))
TOWN = manifest("town", "natural", ("house", "lamp"))
CELLS = manifest("cells", "medical", ("background", "nucleus"))
TILES = manifest("tiles", "remote_sensing", ("background", "building", "field", "water"), may_contain=("road", "car"))
WIDE = manifest("wide", "agriculture", tuple(f"plant {number}" for number in range(300)))
ALL = [STREET, TOWN, CELLS, TILES, WIDE]
