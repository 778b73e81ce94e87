"""Shards in groups, each of which one task reads."""

from pathlib import Path

import pyarrow as pa
import pytest

from cluster.artifacts import Artifact, unfinished_artifact, write_shards
from cluster.file_list import FileList
from cluster.shard_groups import shard_groups
from cluster.storage import open_storage


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """Five shards, of which the third is much larger."""
    storage = open_storage(tmp_path)
    texts = ["a", "b", "c" * 10_000 + "".join(map(str, range(3000))), "d", "e"]
    return unfinished_artifact(
        storage, FileList.of(write_shards(storage, pa.table({"text": texts, "n": range(5)}), 1))
    )


def test_group_is_of_shards_side_by_side_up_to_a_size(artifact: Artifact) -> None:
    small, large = artifact.shards[0].num_bytes, artifact.shards[2].num_bytes
    assert large > 4 * small
    groups = list(shard_groups(artifact, 2 * small + 2))
    assert [group.read(["n"])["n"].to_pylist() for group in groups] == [[0, 1], [2], [3, 4]]
    assert [(group.number, group.first_row) for group in groups] == [(0, 0), (2, 2), (3, 3)]
    assert [len(list(shard_groups(artifact, size))) for size in (1, 1 << 20)] == [5, 1]


def test_artifact_without_shards_has_no_group(tmp_path: Path) -> None:
    assert list(shard_groups(unfinished_artifact(open_storage(tmp_path), FileList.of([])))) == []
