"""Random corruption of a folder of shards: an error of one line, or the very record; never else."""

import json
import os
import random
import shutil
import struct
import tarfile
import zlib
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drama.data.manifest import read_manifest
from drama.data.members import make_member
from drama.data.records import Document, Record
from drama.data.sharding import ShardingOptions, shard_sources
from drama.data.shards import verify
from drama.data.sources import Source
from drama.data.stream import ShardSet
from drama.data.writer import write_manifest, write_shards
from drama.errors import UserError
from drama.testing import tiny_llama

RULES = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def sample():
    draw = random.Random(0)
    for i in range(24):
        yield Record(
            f"query {i} ü",
            (Document(f"positive {i} " + "long " * draw.randint(0, 200), "title"),),
            (Document(f"negative {i}"),),
            source="ab"[i % 2],
            lang=["en", ""][i % 3 == 0],
            scores={Document(f"negative {i}").id: i / 7} if i % 4 == 0 else None,
        )


@pytest.fixture(scope="module", params=["text", "tokens"])
def whole(request, tmp_path_factory):
    """A folder with token ids or without: its files, its records, its token ids."""
    folder = tmp_path_factory.mktemp("whole")
    options = ShardingOptions(shard_bytes=12_000)
    if request.param == "tokens":
        model = tiny_llama(folder / "model")
        options = ShardingOptions(shard_bytes=12_000, tokenizer=str(model))
    source = folder / "x.jsonl"
    source.write_text("".join(json.dumps(record.to_json()) + "\n" for record in sample()))
    shard_sources([Source.parse(f"n:2={source}")], folder / "out", options)
    records, tokens = read_all(folder / "out")
    assert len(records) == 24
    assert (tokens is not None) == (request.param == "tokens")
    files = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert len(files) > 8
    return Whole((files, records, tokens))


class Whole(tuple):
    """What a test needs of a folder; a failing example is not to print all of it."""

    __slots__ = ()

    def __repr__(self):
        return "Whole(...)"


def read_all(folder):
    shards = ShardSet([folder])
    numbers = range(len(shards))
    records = [shards.read(i) for i in numbers]
    tokens = [shards.read_tokens(i).to_bytes() for i in numbers] if shards.tokens else None
    return records, tokens


def laid_out(files, folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def one_line(error):
    text = str(error)
    assert text
    assert "\n" not in text
    return text


def check(folder, records, tokens):
    """Each record is the original one or an error; whether something stood out."""
    try:
        shards = ShardSet([folder])
    except UserError as error:
        return one_line(error)
    assert len(shards) == len(records)
    assert (shards.tokens is None) == (tokens is None)
    said = ""
    for index, record in enumerate(records):
        try:
            assert shards.read(index) == record
        except UserError as error:
            said = one_line(error)
        if tokens is not None:
            try:
                assert shards.read_tokens(index).to_bytes() == tokens[index]
            except UserError as error:
                said = one_line(error)
    return said


def flip(draw, content):
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    return bytes(content)


def truncate(draw, content):
    return content[: draw(st.integers(0, len(content) - 1))]


def extend(draw, content):
    return content + draw(st.binary(min_size=1, max_size=700))


def zero(draw, content):
    start = draw(st.integers(0, len(content) - 1))
    end = draw(st.integers(start + 1, len(content)))
    return content[:start] + bytes(end - start) + content[end:]


def shift(draw, content):
    start = draw(st.integers(0, len(content) - 1))
    return content[:start] + b"x" + content[start:-1]


KINDS = ["flip", "truncate", "extend", "zero", "shift", "swap", "copy", "delete", "folder"]


@RULES
@given(data=st.data())
def test_random_corruption(whole, tmp_path, data):
    files, records, tokens = whole
    changed = dict(files)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(files)))
        other = data.draw(st.sampled_from(sorted(files)))
        kind = data.draw(st.sampled_from(KINDS))
        if kind in ("swap", "copy"):
            changed[name], changed[other] = (
                changed.get(other, b""),
                changed.get(name if kind == "swap" else other, b""),
            )
        elif kind in ("delete", "folder"):
            changed.pop(name, None)
        elif changed.get(name):
            change = {f.__name__: f for f in (flip, truncate, extend, zero, shift)}[kind]
            changed[name] = change(data.draw, changed[name])
    folder = laid_out(changed, tmp_path / "out")
    if kind == "folder":
        (folder / name).mkdir()
    found = check(folder, records, tokens)
    if changed == files:
        assert not found
        verify(folder)
    else:  # no byte of any file goes unchecked
        with pytest.raises(UserError) as error:
            verify(folder)
        one_line(error.value)


def test_no_byte_is_without_a_checksum(whole, tmp_path):
    """One bit of each byte of the smallest shard, of its index and of the manifest.

    A change inside a member is found by reading; `verify` also finds those that no record has.
    """
    files, records, tokens = whole
    folder = laid_out(files, tmp_path / "out")
    verify(folder)
    (tar,) = sorted((n for n in files if n.endswith(".tar")), key=lambda n: len(files[n]))[:1]
    manifest = read_manifest(folder)
    (shard,) = [shard for shard in manifest.shards if shard.file == tar]
    offsets = np.frombuffer(files[shard.idx_file], "<u8", shard.records * manifest.members + 1)
    draw = random.Random(1)
    for name in (tar, shard.idx_file, "manifest.json"):
        content = files[name]
        # the first and last bytes of each kind, and a sample of those between
        places = {0, len(content) - 1, *draw.sample(range(len(content)), min(120, len(content)))}
        if name == tar:
            places |= {int(offsets[-1]) - 1, int(offsets[-1])}
        for place in sorted(places):
            changed = bytearray(content)
            changed[place] ^= 1 << draw.randrange(8)
            (folder / name).write_bytes(changed)
            with pytest.raises(UserError):
                verify(folder)
            if name != tar or place < offsets[-1]:
                said = check(folder, records, tokens)
                # white space of the manifest alone means nothing to a reader
                assert said or (name == "manifest.json" and same_json(content, changed))
        (folder / name).write_bytes(content)
    verify(folder)


def same_json(a, b):
    return json.loads(a) == json.loads(b)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**30, float("inf"), float("nan"), 1.5])
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "../x-000000.tar", "train-000000.tar", "manifest.json"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths_of(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(item, (*path, key))


@RULES
@given(data=st.data())
def test_edits_of_the_manifest(whole, tmp_path, data):
    """Another type, another number, a key less or more: an error, or the same manifest."""
    files, records, tokens = whole
    value = json.loads(files["manifest.json"])
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(sorted(paths_of(value), key=str)))
        new = data.draw(VALUES)
        if not path:
            value = new
            break
        at = value
        for key in path[:-1]:
            at = at[key]
        kind = data.draw(st.sampled_from(["set", "delete", "add", "nudge"]))
        if kind == "set":
            at[path[-1]] = new
        elif kind == "delete":
            del at[path[-1]]
        elif kind == "add" and isinstance(at, dict):
            at[data.draw(st.text(max_size=4))] = new
        elif isinstance(at[path[-1]], int | float):
            at[path[-1]] += data.draw(st.sampled_from([-1, 1, 512, -512]))
    folder = laid_out(files, tmp_path / "out")
    (folder / "manifest.json").write_text(json.dumps(value))
    found = check(folder, records, tokens)
    assert found or same_json(files["manifest.json"], (folder / "manifest.json").read_bytes())


@RULES
@given(content=st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_a_manifest_of_any_bytes(whole, tmp_path, content):
    files, records, tokens = whole
    folder = laid_out(files | {"manifest.json": content}, tmp_path / "out")
    assert check(folder, records, tokens)


@pytest.mark.parametrize("deep", ['{"weights":' * 100_000, "[" * 100_000, "9" * 10_000])
def test_a_manifest_for_the_parser(whole, tmp_path, deep):
    files, records, tokens = whole
    folder = laid_out(files | {"manifest.json": deep.encode()}, tmp_path / "out")
    assert "invalid JSON" in check(folder, records, tokens)


@pytest.mark.parametrize("depth", [900, 990, 995, 20_000])
def test_deep_values_where_nothing_looks(whole, tmp_path, depth):
    files, records, tokens = whole
    deep = b'"shards": [\n  {\n   "more": ' + b"[" * depth + b"]" * depth + b","
    content = files["manifest.json"].replace(b'"shards": [\n  {', deep)
    assert content != files["manifest.json"]
    assert check(laid_out(files | {"manifest.json": content}, tmp_path / "out"), records, tokens)


def test_a_manifest_older_or_newer_than_its_shards(tmp_path):
    """As when a copy of a folder was interrupted: same names, other contents."""
    old, new = list(sample()), list(sample())
    new[3] = Record("query 3 ö", old[3].positives, old[3].negatives, source="b", lang="")
    write_shards(old, tmp_path / "old")
    write_shards(new, tmp_path / "new")
    for a, b in (("old", "new"), ("new", "old")):
        folder = tmp_path / f"{a}-{b}"
        shutil.copytree(tmp_path / a, folder)
        shutil.copy(tmp_path / b / "manifest.json", folder)
        with pytest.raises(UserError):
            read_all(folder)
        with pytest.raises(UserError):
            verify(folder)


def test_a_member_as_a_stranger_may_write_it(whole, tmp_path):
    """Every checksum fits, the contents do not: `verify` trusts nobody."""
    files, _, tokens = whole
    folder = laid_out(files, tmp_path / "out")
    manifest = read_manifest(folder)
    shard = manifest.shards[0]
    content = files[shard.file]
    count = shard.records * manifest.members
    offsets = np.frombuffer(files[shard.idx_file], "<u8", count + 1)
    head = bytearray(make_member("x.json", b"{}"))
    info = tarfile.TarInfo("0000000000.json")
    huge = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    huge[124:136] = b"\x80" + (2).to_bytes(11, "big")  # a size in base 256
    good_json = content[: offsets[1]]
    link = tarfile.TarInfo("0000000000.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    cases = {
        "a size in base 256": [checked(huge) + b"{}" + bytes(510)],
        "a link": [link.tobuf(tarfile.USTAR_FORMAT)],
        "another name": [make_member("../x.json", b"{}")],
        "no record": [bytes(head)],
        "broken utf-8": [make_member("x.json", b'{"query": "\xff"}')],
        "nothing": [b""],
    }
    if tokens is not None:
        good_tokens = content[offsets[1] : offsets[2]]
        cases = {name: [*members, good_tokens] for name, members in cases.items()}
        for name, payload in {
            "no token ids": b"",
            "few bytes": b"123",
            "a huge count": struct.pack("<IIII", 2**32 - 1, 2**32 - 1, 1, 0) + bytes(64),
            "zeros": bytes(200),
            "uneven": bytes(201),
        }.items():
            cases[name] = [good_json, make_member("0000000000.tok", payload)]
    for name, members in cases.items():
        forge(folder, files, members, shard, manifest)
        with pytest.raises(UserError) as error:
            verify(folder)
        assert "record 0 at byte 0" in one_line(error.value), name


def checked(head):
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head[:512])
    return bytes(head)


def forge(folder, files, members, shard, manifest):
    """A folder whose first shard has these members as its first record, all checksums right."""
    count = shard.records * manifest.members
    old = np.frombuffer(files[shard.idx_file], "<u8", count + 1)
    parts = [files[shard.file][a:b] for a, b in pairwise(old.tolist())]
    parts[: manifest.members] = members
    offsets = np.cumsum([0, *map(len, parts)]).astype("<u8")
    index = offsets.tobytes() + np.array([zlib.crc32(part) for part in parts], "<u4").tobytes()
    tar = b"".join(parts) + bytes(1024)
    index += sha256(tar).digest()
    (folder / shard.file).write_bytes(tar)
    (folder / shard.idx_file).write_bytes(index)
    forged = replace(
        shard,
        bytes=len(tar),
        sha256=sha256(tar).hexdigest(),
        idx_sha256=sha256(index).hexdigest(),
    )
    write_manifest(folder, replace(manifest, shards=(forged, *manifest.shards[1:])))


def test_a_file_cut_after_it_was_opened(whole, tmp_path):
    files, records, _ = whole
    folder = laid_out(files, tmp_path / "out")
    shards = ShardSet([folder])
    assert shards.read(0) == records[0]
    os.truncate(folder / shards.shards[0].file, 600)
    with pytest.raises(UserError, match=r"record 0 at byte 0: truncated: \d+ of \d+ bytes are the"):
        shards.read(0)


def test_a_folder_that_is_being_written(tmp_path):
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps(record.to_json()) + "\n" for record in sample()))
    write_shards(sample(), tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    for open_it in (lambda: ShardSet([tmp_path / "out"]), lambda: verify(tmp_path / "out")):
        with pytest.raises(UserError, match=r"has no manifest\.json: .*its writing did not end"):
            open_it()
