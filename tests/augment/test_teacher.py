"""The teacher's rankings against plain numpy, from models of both kinds, resumable."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import BertConfig, BertModel

from drama.augment import teacher as module
from drama.augment.corpus import write_corpus
from drama.augment.teacher import Retrieval, Teacher
from drama.data.lines import read_objects
from drama.data.sources import Source
from drama.encoder import Encoder
from drama.errors import UserError
from drama.retrieve import fill
from drama.retrieve.models import OurModel
from drama.testing import byte_tokenizer, run_deepspeed, tiny_llama

SCIFACT = Path(__file__).parents[2] / "data" / "demo" / "scifact"
QUERIES = ["Glioma stem cells need A20.", "serotyping by microarray", "x"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model and a corpus of titles, one of them twice, one row empty."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama(folder / "model", num_hidden_layers=1)
    titles = [row["title"] for _, row in read_objects(SCIFACT / "corpus.jsonl.gz")][:150]
    rows = [{"text": text} for text in [*titles, "", titles[0]]]
    (folder / "titles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def retrieval(world, work, model="model", **options):
    source = Source.parse(world / "titles.jsonl")
    return Retrieval((source,), str(world / model), work, **options)


def test_the_exact_search_equals_numpy_whatever_the_blocks(world, tmp_path, monkeypatch):
    corpus, teacher = retrieval(world, tmp_path / "work").open()
    assert len(corpus) == 151
    want = Encoder.from_pretrained(world / "model").encode(
        [item.document.full_text for item in corpus.read()], "document"
    )
    np.testing.assert_allclose(teacher.vectors_ND, want, atol=1e-3)
    cosines = teacher.encode(QUERIES, "query") @ np.asarray(teacher.vectors_ND, np.float32).T
    for block in (65_536, 40, 7):
        monkeypatch.setattr(module, "BLOCK", block)
        numbers, scores = teacher.search(QUERIES, 20)
        np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1)[:, :20], atol=1e-5)
        # by score, not by number: the text that is there twice has two
        np.testing.assert_allclose(np.take_along_axis(cosines, numbers, 1), scores, atol=1e-5)
        assert all(len(set(row)) == 20 for row in numbers.tolist())


def test_a_list_is_as_long_as_the_corpus_at_most(world, tmp_path):
    _, teacher = retrieval(world, tmp_path / "work").open()
    numbers, scores = teacher.search(QUERIES[:1], 1000)
    assert sorted(numbers[0].tolist()) == list(range(151))
    assert (np.diff(scores[0]) <= 0).all()
    assert [part.shape for part in teacher.search([], 5)] == [(0, 5), (0, 5)]


def test_a_cosine_is_what_the_search_gives(world, tmp_path):
    corpus, teacher = retrieval(world, tmp_path / "work").open()
    numbers, scores = teacher.search(QUERIES, 3)
    texts = [corpus[int(row[2])].document.full_text for row in numbers]
    got = teacher.cosines(teacher.embed(QUERIES), texts)
    np.testing.assert_allclose(got, scores[:, 2], atol=1e-3)
    assert teacher.cosines(teacher.embed([]), []).shape == (0,)


def test_the_graph_finds_most_and_is_built_once(world, tmp_path, monkeypatch):
    _, flat = retrieval(world, tmp_path / "work").open()
    _, graph = retrieval(world, tmp_path / "work", search="hnsw").open()
    exact, found = (teacher.search(QUERIES, 10)[0] for teacher in (flat, graph))
    assert np.mean([len(set(a) & set(b)) for a, b in zip(exact, found, strict=True)]) >= 9
    monkeypatch.setattr(module.Index, "from_vectors", lambda *_: pytest.fail("built again"))
    _, again = retrieval(world, tmp_path / "work", search="hnsw").open()
    np.testing.assert_array_equal(again.search(QUERIES, 10)[0], found)
    path = next((tmp_path / "work").glob("vectors-*")) / "hnsw.faiss"
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"hnsw\.faiss cannot be read .*remove it"):
        retrieval(world, tmp_path / "work", search="hnsw").open()


def test_a_stopped_encoding_goes_on_to_the_same_bytes(world, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 32)
    retrieval(world, tmp_path / "whole").open()
    encode, calls = OurModel.encode, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(OurModel, "encode", stopping)
        with pytest.raises(KeyboardInterrupt):
            retrieval(world, tmp_path / "work").open()
    (folder,) = (tmp_path / "work").glob("vectors-*")
    assert sum((folder / "done.bin").read_bytes()) == 2
    retrieval(world, tmp_path / "work").open()
    (whole,) = (tmp_path / "whole").glob("vectors-*")
    assert (folder / "vectors.npy").read_bytes() == (whole / "vectors.npy").read_bytes()
    monkeypatch.setattr(fill, "_work", lambda *_: pytest.fail("encoded again"))
    retrieval(world, tmp_path / "work").open()


def test_a_sentence_transformers_folder_teaches(world, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    config = BertConfig(
        vocab_size=260, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    model = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    model.save(str(tmp_path / "st"))
    corpus, teacher = retrieval(world, tmp_path / "work", str(tmp_path / "st")).open()
    texts = [item.document.full_text for item in corpus.read()]
    cosines = model.encode(QUERIES, normalize_embeddings=True) @ model.encode(
        texts, normalize_embeddings=True
    ).T  # fmt: skip
    _, scores = teacher.search(QUERIES, 5)
    np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1)[:, :5], atol=2e-3)


def test_teachers_share_a_folder_and_corpora_do_not(world, tmp_path):
    _, teacher = retrieval(world, tmp_path / "work").open()
    (folder,) = (tmp_path / "work").glob("vectors-*")
    tiny_llama(tmp_path / "other", num_hidden_layers=1, seed=3)
    retrieval(world, tmp_path / "work", str(tmp_path / "other")).open()
    assert len(list((tmp_path / "work").glob("vectors-*"))) == 2
    (tmp_path / "b.jsonl").write_text('{"text": "bees"}\n')
    other = write_corpus([Source.parse(tmp_path / "b.jsonl")], tmp_path / "b")
    with pytest.raises(UserError, match="holds vectors of other inputs"):
        Teacher(teacher.encode, "model", teacher.manifest.model_sha256, other, folder)


def test_no_model_is_one_line(world, tmp_path):
    with pytest.raises(UserError, match="gone: not a model folder"):
        retrieval(world, tmp_path / "work", "gone").about()


@pytest.mark.slow
def test_the_ranks_of_the_launcher_make_what_one_process_makes(world, tmp_path):
    """Three windows on two ranks; the commands find the vectors and encode nothing anew."""
    rows = [{"text": f"{word} number {n}"} for n in range(1500) for word in ("a", "the", "one")]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    launcher = Path(__file__).parents[2] / "launchers" / "encode_teacher.py"
    done = run_deepspeed(
        launcher, str(tmp_path / "c.jsonl"), "--teacher", str(world / "model"),
        "--work", str(tmp_path / "ranks"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4,500 documents, vectors of width 64" in done.stderr
    source = (Source.parse(tmp_path / "c.jsonl"),)
    model = str(world / "model")
    found = Retrieval(source, model, tmp_path / "ranks")
    (vectors,) = (tmp_path / "ranks").glob("vectors-*/vectors.npy")
    before = vectors.stat().st_mtime_ns
    _, teacher = found.open()
    assert vectors.stat().st_mtime_ns == before
    _, alone = Retrieval(source, model, tmp_path / "alone").open()
    assert np.array_equal(teacher.vectors_ND, alone.vectors_ND)
    assert found.about() == Retrieval(source, model, tmp_path / "alone").about()
