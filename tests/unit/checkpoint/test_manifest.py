"""Which bytes a checkpoint should hold, and who looks."""

from pathlib import Path

import pytest

from megasd.checkpoint.manifest import (
    MANIFEST_FILE,
    describe,
    look_at_files,
    read_manifest,
    share_of,
    write_manifest,
    wrong_checksums,
)


def test_a_checksum_is_that_of_the_whole_file(tmp_path: Path) -> None:
    """CRC-32 of "123456789" is the check value of the standard."""
    (tmp_path / "a").write_bytes(b"123456789")
    assert describe(tmp_path, ["a"]) == {"a": {"bytes": 9, "crc32": "cbf43926"}}
    content = b"123456789" * 3_000_000  # read in pieces
    (tmp_path / "b").write_bytes(content)
    assert describe(tmp_path, ["b"])["b"]["bytes"] == len(content)
    (tmp_path / "b").write_bytes(content[:-1] + b"8")
    assert describe(tmp_path, ["b"]) != describe(tmp_path, ["a"])


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_every_file_has_one_reader_and_readers_have_alike_much(num_ranks: int) -> None:
    files = {f"file{i}": {"bytes": 100 + i % 7, "crc32": ""} for i in range(50)}
    shares = [share_of(files, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    loads = [sum(files[name]["bytes"] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 106


def test_what_is_not_as_it_was_written_is_named(tmp_path: Path) -> None:
    names = ["whole", "cut", "changed", "gone"]
    for name in names:
        (tmp_path / name).write_bytes(b"0123456789")
    write_manifest(tmp_path, describe(tmp_path, names))
    (tmp_path / "cut").write_bytes(b"01234")
    (tmp_path / "changed").write_bytes(b"0123456780")
    (tmp_path / "gone").unlink()
    files, wrong, trouble = look_at_files(tmp_path)
    assert wrong == ["cut has 5 bytes instead of 10", "gone is missing"]
    assert trouble == ""
    wrong, trouble = wrong_checksums(tmp_path, files, ["whole", "changed"])
    assert wrong == ["changed has other bytes than were written"]
    assert trouble == ""


def test_a_file_system_that_fails_is_no_damage(tmp_path: Path) -> None:
    """A folder in the place of a file cannot be read, like a stale handle of a network."""
    (tmp_path / "shard").write_bytes(b"0123456789")
    write_manifest(tmp_path, describe(tmp_path, ["shard"]))
    (tmp_path / "shard").unlink()
    (tmp_path / "shard").mkdir()
    wrong, trouble = wrong_checksums(tmp_path, read_manifest(tmp_path), ["shard"])
    assert wrong == []
    assert "Is a directory" in trouble
    (tmp_path / MANIFEST_FILE).unlink()
    (tmp_path / MANIFEST_FILE).mkdir()
    files, wrong, trouble = look_at_files(tmp_path)
    assert (files, wrong) == ({}, [])
    assert "Is a directory" in trouble


@pytest.mark.parametrize("text", ["", '{"files": {"a"', '{"files": {"a": {"bytes": 1}}}', "[]"])
def test_a_manifest_that_is_not_one_is_damage_too(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^has no {MANIFEST_FILE}$"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"^has a {MANIFEST_FILE} that cannot be read$"):
        read_manifest(tmp_path)
