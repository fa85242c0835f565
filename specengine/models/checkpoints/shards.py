"""The files that an index of shards names, none of which may lead away from what the user named."""

from __future__ import annotations

import re
from pathlib import Path

from specengine.errors import ModelLoadError
from specengine.json_file import read_json, shorten


def indexed_files(directory: Path, index_name: str, suffix: str) -> list[str]:
    """The shards that an index names, in order.

    A shard is a file of the directory, or a link there whose target lies in the folder that holds the directory (so
    also in a sibling of it) or in the Hub's cache beside a snapshot. Raises `ModelLoadError` for any other.
    """
    where = directory / index_name
    weight_map = read_json(where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{where}: weight_map: {shorten(weight_map)} does not map tensors to files")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelLoadError(f"{where}: weight_map: every file must be a string")
    files = list(dict.fromkeys(weight_map.values()))
    roots = _roots(directory)
    for file in files:
        if not re.fullmatch(r"[\w.\-]+", file) or not file.endswith(suffix):
            raise ModelLoadError(
                f"{where}: weight_map: {shorten(file)} is no {suffix} file of this directory"
            )
        target = (directory / file).resolve()
        if not any(target.is_relative_to(root) for root in roots):
            raise ModelLoadError(
                f"{where}: weight_map: {shorten(file)} links to {target}, outside of {roots[-1]}; "
                "copy the file, or keep it in a folder beside the model's"
            )
    return files


def _roots(directory: Path) -> list[Path]:
    """Where a shard's bytes may lie. Without a folder around it, at the root, a directory has no siblings."""
    roots = [directory.resolve()]
    if roots[0].parent.name == "snapshots":  # the Hub's cache links into the repository's blobs
        roots.append(roots[0].parent.parent / "blobs")
    for named in (directory.absolute(), directory.resolve()):
        parent = named.parent.resolve()
        if parent != Path(parent.anchor):
            roots.append(parent)
    return roots
