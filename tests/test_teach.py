"""A teacher's vectors on disk: every text once, found by its id, resumable."""

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from drama import teach
from drama.data.records import content_id, document_hash64, query_hash64
from drama.data.sources import read_source
from drama.data.writer import write_shards
from drama.encoder import Encoder
from drama.errors import UserError
from drama.retrieve.models import OurModel
from drama.teach import write_teacher_vectors
from drama.teacher import TeacherVectors
from drama.testing import byte_tokenizer, tiny_llama

PAIRS = Path(__file__).parents[1] / "data" / "demo" / "pairs.jsonl.xz"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama(folder / "model")
    write_shards(islice(read_source(PAIRS), 40), folder / "shards")
    return folder


def test_every_text_is_found_with_the_models_own_vector(world, tmp_path, monkeypatch):
    monkeypatch.setattr(teach, "BLOCK", 30)
    vectors = write_teacher_vectors([world / "shards"], world / "model", tmp_path / "out")
    assert not (tmp_path / "out" / "blocks").exists()
    assert np.all(np.diff(vectors.ids) > 0)
    encoder = Encoder.from_pretrained(world / "model")
    for record in islice(read_source(PAIRS), 40):
        document = record.positives[0]
        ids = torch.tensor(
            [
                query_hash64(record.query),
                document_hash64(content_id(document.title, document.text)),
            ]
        )
        want = np.concatenate(
            [
                encoder.encode([record.query], "query"),
                encoder.encode([document.full_text], "document"),
            ]
        )
        np.testing.assert_allclose(vectors.look_up(ids).numpy(), want, atol=2e-3)
    with pytest.raises(UserError, match="lacks texts"):
        vectors.look_up(torch.tensor([1]))


def test_a_killed_run_goes_on_and_a_finished_one_is_left_alone(world, tmp_path, monkeypatch):
    monkeypatch.setattr(teach, "BLOCK", 30)
    arguments = ([world / "shards"], world / "model")
    whole = write_teacher_vectors(*arguments, tmp_path / "whole")
    encode, calls = OurModel.encode, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(OurModel, "encode", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_teacher_vectors(*arguments, tmp_path / "out")
    done = len(list((tmp_path / "out" / "blocks").glob("*.npz")))
    assert done == 2
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setattr(OurModel, "encode", encode)
    again = write_teacher_vectors(*arguments, tmp_path / "out")
    np.testing.assert_array_equal(again.ids, whole.ids)
    np.testing.assert_array_equal(again.vectors, whole.vectors)
    monkeypatch.setattr(teach, "open_model", lambda model: pytest.fail("encoded again"))
    write_teacher_vectors(*arguments, tmp_path / "out")


def test_another_teacher_or_no_folder_is_refused(world, tmp_path):
    write_teacher_vectors([world / "shards"], world / "model", tmp_path / "out")
    tiny_llama(tmp_path / "other", seed=3)
    with pytest.raises(UserError, match="another model"):
        write_teacher_vectors([world / "shards"], tmp_path / "other", tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match="drama teach"):
        TeacherVectors(tmp_path / "out")


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
    vectors = write_teacher_vectors([world / "shards"], tmp_path / "st", tmp_path / "out")
    assert vectors.vectors.shape[1] == 24
    query = next(read_source(PAIRS)).query
    want = model.encode([query], normalize_embeddings=True)
    got = vectors.look_up(torch.tensor([query_hash64(query)]))
    np.testing.assert_allclose(got.numpy(), want, atol=2e-3)
