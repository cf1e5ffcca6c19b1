import hashlib
import json
import os
import tarfile
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drama.data.manifest import read_manifest
from drama.data.records import Document, Record
from drama.data.shards import verify
from drama.data.stream import ShardSet
from drama.data.writer import write_shards
from drama.errors import UserError

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=600).filter(str.strip)
DOCUMENTS = st.lists(
    st.builds(Document, text=TEXT, title=st.just("") | TEXT), min_size=1, max_size=3
)
RECORDS = st.lists(
    st.builds(
        Record,
        query=TEXT,
        positives=DOCUMENTS.map(tuple),
        negatives=DOCUMENTS.map(tuple),
        source=st.sampled_from(["a", "b"]),
        lang=st.sampled_from(["", "en", "ja"]),
    ),
    min_size=1,
    max_size=12,
)


def sample(count, source="s"):
    return [
        Record(
            query=f"query {i}",
            positives=(Document(f"positive {i} " + "long " * (i % 300)),),
            negatives=(Document(f"negative {i}", "title"),),
            query_id=str(i),
            source=source,
            lang="en",
        )
        for i in range(count)
    ]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(records=RECORDS, shard_bytes=st.integers(1, 6000))
def test_round_trip(tmp_path, records, shard_bytes):
    manifest = write_shards(records, tmp_path / "out", shard_bytes=shard_bytes)
    shards = ShardSet([tmp_path / "out"])
    read = [shards.read(i) for i in range(len(shards))]
    for group in {(r.source, r.lang) for r in records}:  # the order within a source stays
        assert [r for r in read if (r.source, r.lang) == group] == [
            r for r in records if (r.source, r.lang) == group
        ]
    assert len(read) == len(records)
    assert manifest == verify(tmp_path / "out") == read_manifest(tmp_path / "out")
    for key in ("source", "lang"):
        assert manifest.counts(key) == Counter(getattr(record, key) for record in records)
    for shard in manifest.shards:
        of_shard = read[: shard.records]
        assert {(r.source, r.lang) for r in of_shard} == {(shard.source, shard.lang)}
        del read[: shard.records]
    assert sum(manifest.document_chars.values()) == sum(
        len(r.positives) + len(r.negatives) for r in records
    )


def test_histogram_counts_under_the_next_power_of_two(tmp_path):
    records = [
        Record("q" * n, (Document("p" * n),), source="s") for n in (1, 2, 3, 4, 5, 8, 9, 1024, 1025)
    ]
    manifest = write_shards(records, tmp_path / "out")
    expected = {1: 1, 2: 1, 4: 2, 8: 2, 16: 1, 1024: 1, 2048: 1}
    assert manifest.query_chars == manifest.document_chars == expected


def test_plain_webdataset_and_tarfile_read_the_same_records(tmp_path):
    records = sample(50)
    manifest = write_shards(records, tmp_path / "out", shard_bytes=20_000)
    paths = [str(tmp_path / "out" / shard.file) for shard in manifest.shards]
    assert len(paths) > 2
    dataset = webdataset.WebDataset(paths, shardshuffle=False).decode()
    assert [Record.from_json(item["json"]) for item in dataset] == records
    for shard, path in zip(manifest.shards, paths, strict=True):
        index = Path(path[:-4] + ".idx").read_bytes()
        offsets = np.frombuffer(index, "<u8", shard.records + 1)
        checksums = np.frombuffer(index, "<u4", shard.records, offsets.nbytes).tolist()
        assert index[-32:].hex() == shard.sha256
        assert hashlib.sha256(index).hexdigest() == shard.idx_sha256
        tar_bytes = Path(path).read_bytes()
        assert checksums == [zlib.crc32(tar_bytes[a:b]) for a, b in pairwise(offsets.tolist())]
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert [member.offset for member in members] == offsets[:-1].tolist()
        assert all(member.isreg() and "/" not in member.name for member in members)
        last = members[-1].offset_data + -(-members[-1].size // 512) * 512
        assert (offsets[-1], len(members)) == (last, shard.records)
        with open(path, "rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256


def test_same_records_same_bytes(tmp_path, monkeypatch):
    write_shards(sample(40), tmp_path / "a", shard_bytes=20_000)
    monkeypatch.setattr("time.time", lambda: 1e9)
    monkeypatch.setenv("USER", "somebody")
    write_shards(iter(sample(40)), tmp_path / "b", shard_bytes=20_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_fault_while_writing_leaves_nothing_or_the_old_folder(tmp_path):
    def failing():
        yield from sample(30)
        raise UserError("x.jsonl:31: invalid JSON")

    with pytest.raises(UserError, match=r"x\.jsonl:31"):
        write_shards(failing(), tmp_path / "out", shard_bytes=5000)
    assert list(tmp_path.iterdir()) == []
    write_shards(sample(5), tmp_path / "out")
    old = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"x\.jsonl:31"):
        write_shards(failing(), tmp_path / "out", shard_bytes=5000)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path / "out") == old


def test_a_killed_process_leaves_no_folder_that_reads_as_shards(tmp_path):
    pid = os.fork()
    if pid == 0:

        def dying():
            yield from sample(30)
            os.kill(os.getpid(), 9)

        write_shards(dying(), tmp_path / "out", shard_bytes=5000)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert any(left.iterdir())
    with pytest.raises(UserError, match=r"has no manifest\.json: .* its writing did not end"):
        read_manifest(left)


def test_older_shards_are_replaced_whole(tmp_path):
    write_shards(sample(40), tmp_path / "out", name="old", shard_bytes=5000)
    write_shards(sample(3), tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == [
        "manifest.json", "train-000000.idx", "train-000000.tar"
    ]  # fmt: skip


def test_refusals_to_write(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="mine exists and is no folder of shards"):
        write_shards(sample(1), tmp_path / "mine")
    assert (tmp_path / "mine/thesis.tex").read_text() == "x"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file exists and is no folder of shards"):
        write_shards(sample(1), tmp_path / "file")
    with pytest.raises(UserError, match="no records to write"):
        write_shards([], tmp_path / "out")
    with pytest.raises(UserError, match=r"shard name '\.\./x'"):
        write_shards(sample(1), tmp_path / "out", name="../x")
    with pytest.raises(UserError, match="shard_bytes is 0"):
        write_shards(sample(1), tmp_path / "out", shard_bytes=0)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def out(tmp_path):
    write_shards(sample(30), tmp_path / "out", shard_bytes=20_000)
    return tmp_path / "out"


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_truncated_and_missing_files(out):
    tar = out / "train-000001.tar"
    size = tar.stat().st_size
    os.truncate(tar, size - 512)
    said = rf"train-000001\.tar has {size - 512} bytes, manifest says {size}"
    with pytest.raises(
        UserError, match=rf"truncated: .*{said}; write the shards again with `drama"
    ):
        ShardSet([out])
    tar.unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar: missing, but the manifest names it"):
        ShardSet([out])


def test_truncated_index(out):
    idx = out / "train-000000.idx"
    os.truncate(idx, idx.stat().st_size - 8)
    with pytest.raises(UserError, match=r"truncated: .*train-000000\.idx"):
        ShardSet([out])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is no manifest of shards"),
        ({"schema_version": 99}, "has schema version 99; this program reads version 2"),
        ({"shards": {}}, "shards is missing or of the wrong type"),
        ({"shards": []}, "names no shards"),
        ({"shards": [{"file": "../x-000000.tar"}]}, r"shards\[0\].file '../x-000000.tar' is no"),
        ({"shards": [{"file": "x-000000.tar"}]}, r"shards\[0\].records is missing"),
        ({"left_out": {"s": "many"}}, "left_out: 's' must map to a number"),
        ({"weights": {"s": 0}}, "weights: 's' must map to a positive number"),
        ({"tokens": {"max_tokens": 3}}, r"tokens\.tokenizer_sha256 is missing"),
        ({"query_chars": {"short": 1}}, "query_chars: 'short' must map"),
    ],
)
def test_manifest_faults(out, changes, message):
    edit(out, **changes)
    with pytest.raises(UserError, match=message):
        read_manifest(out)


def test_no_folder_and_broken_manifest(out, tmp_path):
    with pytest.raises(UserError, match="none is no folder of shards: there is no such folder"):
        read_manifest(tmp_path / "none")
    (out / "manifest.json").write_text('{"format":')
    with pytest.raises(UserError, match=r"manifest\.json: invalid JSON"):
        read_manifest(out)


def flip(path, offset, value):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value)


def test_a_flipped_letter_that_still_parses_is_found(out):
    tar = out / "train-000000.tar"
    flip(tar, tar.read_bytes().index(b"query 3"), b"Q")
    said = r"train-000000\.tar: record 3 at byte \d+: its checksum"
    for find in (lambda: ShardSet([out]).read(3), lambda: verify(out)):
        with pytest.raises(UserError, match=said):
            find()
    flip(tar, tar.read_bytes().index(b"Query 3"), b"q")
    verify(out)
    flip(tar, tar.stat().st_size - 1, b"x")  # belongs to no record
    with pytest.raises(UserError, match=r"train-000000\.tar: its SHA-256 differs"):
        verify(out)


def test_a_changed_index_is_found(out):
    idx = out / "train-000000.idx"
    sound = idx.read_bytes()
    for at, fault in ((8, "its checksum differs"), (15, "its index leads elsewhere")):
        flip(idx, at, bytes([sound[at] ^ 1]))
        with pytest.raises(UserError, match=fault):
            ShardSet([out]).read(0)
        with pytest.raises(UserError, match=r"train-000000\.idx: its SHA-256 differs"):
            verify(out)
        idx.write_bytes(sound)
    flip(idx, len(sound) - 1, bytes([sound[-1] ^ 1]))
    with pytest.raises(UserError, match=r"train-000000\.idx: is not the index that the manifest"):
        ShardSet([out]).read(0)


def test_verify_names_the_broken_record(out):
    tar = out / "train-000000.tar"
    offset = int(np.fromfile(out / "train-000000.idx", "<u8", 6)[5])
    flip(tar, offset + 512, b"\xff")
    with pytest.raises(UserError, match=rf"train-000000\.tar: record 5 at byte {offset}: invalid"):
        verify(out)


def test_many_languages_at_a_time_get_one_shard_each(tmp_path, monkeypatch):
    """More than files are kept open: an open tar waits closed, and is gone on with."""
    monkeypatch.setattr("drama.data.writer.OPEN_FILES", 3)
    records = [
        Record(f"query {i}", (Document(f"text {i}"),), source="s", lang=f"l{i % 20:02d}")
        for i in range(200)
    ]
    manifest = write_shards(records, tmp_path / "out")
    assert [shard.records for shard in manifest.shards] == [10] * 20
    verify(tmp_path / "out")
    shards = ShardSet([tmp_path / "out"])
    assert sorted(shards.read(i).query for i in range(200)) == sorted(r.query for r in records)


def test_places_are_read_by_blocks(tmp_path, monkeypatch):
    """An index may have megabytes: of it, only what is needed is read."""
    monkeypatch.setattr("drama.data.stream.INDEX_ROWS", 4)
    records = sample(30)
    write_shards(records, tmp_path / "out", shard_bytes=30_000)
    shards = ShardSet([tmp_path / "out"])
    assert [shards.read(i) for i in (29, 3, 4, 0, 17)] == [records[i] for i in (29, 3, 4, 0, 17)]
    assert shards._places.cache_info().misses == 4  # 3 and 0 are of one block
