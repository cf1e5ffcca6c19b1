"""Every library reads the same records, and a kill costs ours none."""

from pathlib import Path

import pytest

from drama.bench import data as bench
from drama.data.stream import ShardSet
from drama.testing import byte_tokenizer

PAIRS = Path(__file__).parents[2] / "data" / "demo" / "pairs.jsonl.xz"
COUNT = 2100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    bench.prepare(PAIRS, folder / "tokenizer", folder, COUNT)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", ["webdataset", "datasets"])
def test_peers_read_every_record_and_what_we_read(folder: Path, way: str) -> None:
    queries = {value["query"] for _, value in bench.READERS[way](folder, "text")}
    assert len(queries) == COUNT
    ours = {record.query for _, record in bench.read_ours(folder, "text")}
    assert len(ours) == bench.BATCH
    assert ours < queries
    rows = [[row.tolist() for row in rows] for _, rows in bench.READERS[way](folder, "tokens")]
    own = [[row.tolist() for row in rows] for _, rows in bench.read_ours(folder, "tokens")]
    assert len(rows) == COUNT
    assert all(record in rows for record in own[:20])


@pytest.mark.slow
def test_a_kill_and_another_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    assert bench.killed("ours", folder, tmp_path) == {"repeated": 0, "lost": 0}
    assert bench.killed("webdataset", folder, tmp_path)["repeated"] > 500


@pytest.mark.slow
def test_figures_come_out_of_processes_of_their_own(folder: Path) -> None:
    for kind in bench.KINDS:
        found = bench.alone("speed", way="ours", kind=kind, folder=folder, seconds=0.01)
        assert found["records/s"] > 0
        assert (found["tokens/s"] > 0) == (kind == "tokens")
    bench.link_many(folder / "ours-text", 3, folder / "many" / "ours-text")
    assert len(ShardSet([folder / "many" / "ours-text"])) == 3 * COUNT
    found = bench.alone("resume", way="ours", kind="text", folder=folder / "many", share=0.9)
    assert 0 < found["first record"] < found["first batch"]
