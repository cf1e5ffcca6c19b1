"""What the server opens, HTTP apart."""

import numpy as np
import pytest

from drama.encoder import Encoder
from drama.export import export
from drama.retrieve.search import Searcher
from drama.serve.asked import EmbedRequest, SearchRequest
from drama.serve.service import Service


@pytest.fixture(scope="module")
def with_graph(world, tmp_path_factory):
    """The world's model, and its graph."""
    folder = tmp_path_factory.mktemp("graph") / "tiny"
    return export(Encoder.from_pretrained(world.model), folder, onnx="float32")


def test_the_server_takes_the_graph_and_gives_the_same(world, with_graph):
    """With an index too; `drama search`, which ends soon, does not spend the time to open it."""
    services = [
        (Service(world.model, None), Service(with_graph, None)),
        (Service(None, world.index), Service(with_graph, world.index)),
    ]
    assert Searcher(world.index, model=with_graph).encoder.graph is None
    asked = [
        EmbedRequest([text] * n, "query", dim, "float")
        for text in ("bread", "a longer one about the moon") for n in (1, 9) for dim in (None, 16)
    ]  # fmt: skip
    for plain, quick in services:
        assert (plain.facts()["graph"], quick.facts()["graph"]) == (False, True)
        for one in asked:
            want_BD, tokens = plain.embed(one, lambda: False)
            found_BD, same = quick.embed(one, lambda: False)
            assert tokens == same
            assert found_BD.shape == (len(one.texts), one.dim or 64)
            np.testing.assert_allclose(found_BD, want_BD, atol=1e-5)
    plain, quick = services[1]
    want, found = (s.search(SearchRequest("bread", 5, 16), lambda: False) for s in (plain, quick))
    assert [hit["id"] for hit in found["hits"]] == [hit["id"] for hit in want["hits"]]
