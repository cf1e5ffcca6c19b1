"""The kinds of nodes: what each shipped command makes, and how long that takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from drama.demo import ROOT
from drama.evidence.nodes import OUT, Node
from drama.evidence.scales import Scale
from drama.files import sha256_of

RECIPES = "recipes/evidence"
QUERY_TOKENS = 24  # of a pair, beside its document
PARENT_SHARE = 0.09  # speed of the parent's training, of the small shape's
FORWARD = 3.0  # encoding is so much faster than training
SUITE_TEXTS = {"smoke": 400, "basic": 11_000, "wide": 18_000, "all": 52_000}  # to encode


def _contents(folder: Path) -> str:
    """Changes when a file in it does; a copy of the folder is the same."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [str(path.relative_to(folder)) for path in files]
    return json.dumps(list(zip(names, sha256_of(files), strict=True)))


@dataclass(frozen=True)
class Kinds:
    """Makes nodes for one scale from a folder of data sets and a language model."""

    scale: Scale
    data: Path | None  # None: the embedded sample
    llm: Path | None  # None: the stand-in beside the embedded sample
    teacher: str

    @cached_property
    def prepared(self) -> Node:
        source = [str(self.data)] if self.data is not None else ["--demo"]
        return self._node("data", 0.3, [
            ["python", "-m", "drama.evidence.data", *source, "--crops",
             str(self.scale.crops), "--asked", str(self.scale.queries), "--out", f"{OUT}/data"],
        ], recipes=[f"drama/evidence/{name}.py" for name in ("data", "layouts", "pairs")],
            inputs=_contents(self.data) if self.data is not None else "")  # fmt: skip

    @cached_property
    def llm_path(self) -> str:
        return str(self.llm) if self.llm is not None else self.data_at("llm")

    def data_at(self, *parts: str) -> str:
        """A path in the prepared data."""
        return self.prepared.at("data", *parts)

    @cached_property
    def parent(self) -> Node:
        """The language model with the vocabulary of the texts."""
        return self.vocabulary_cut(self._files("text", self.scale.texts))

    def vocabulary_cut(self, texts: Sequence[str]) -> Node:
        """The language model with the tokens that the texts need most."""
        corpora = [w for path in texts for w in ("--vocab-from", path)]
        command = ["drama", "prune", self.llm_path, *corpora, "--keep", self.scale.vocabulary,
                   "--out", f"{OUT}/model"]  # fmt: skip
        return self._node("parent", 1.0, [command], [self.prepared])

    def start(self, choice: str, size: str, seed: int = 0) -> tuple[Node, str]:
        """A cut without recovery, and the path of its model."""
        return self.cut(choice, self.scale.shapes[size], seed)

    def cut(
        self, choice: str, shape: str, seed: int = 0, parent: Node | None = None
    ) -> tuple[Node, str]:
        """A cut to any shape, of `parent` (default: the one with the vocabulary of the texts)."""
        parent = parent or self.parent
        if choice == "learned":
            tokens = self.scale.mask_steps * 8 * 64
            node = self._recipe_node("masks", "prune.py", "masks", tokens, PARENT_SHARE, {
                "model.path": parent.at("model"), "model.to": shape, "seed": seed,
                "data.domains.text": self._list("text", self.scale.texts),
                "train.steps": self.scale.mask_steps,
            }, [parent, self.prepared])  # fmt: skip
            return node, node.at("run", "model")
        command = ["drama", "prune", parent.at("model"), "--to", shape, "--calibration",
                   self.data_at("text", "calibration.txt"), "--calibration-tokens",
                   str(self.scale.calibration_tokens), "--choose", choice, "--seed", str(seed),
                   "--out", f"{OUT}/model"]  # fmt: skip
        minutes = 1.2 if choice == "importance" else 0.5
        node = self._node("cut", minutes, [command], [parent, self.prepared])
        return node, node.at("model")

    @cached_property
    def text(self) -> Node:
        """Shards of the texts, and of the held-out ones."""
        held_out = self._files("text", [f"held-out-{t}" for t in self.scale.texts])
        return self._node("text", 0.4, [
            ["drama", "shard", *self._files("text", self.scale.texts), *self._clean(),
             "--out", f"{OUT}/shards"],
            ["drama", "shard", *held_out, "--out", f"{OUT}/held-out"],
        ], [self.prepared])  # fmt: skip

    def recovered(self, start: tuple[Node, str], size: str, seed: int = 0) -> tuple[Node, str]:
        """The same after a little continued pre-training."""
        tokens = self.scale.recover_steps * 16 * 100
        node = self._recipe_node("recovery", "recover.py", "recover", tokens, self._share(size), {
            "model.path": start[1], "seed": seed, "data.shards": f"[{self.text.at('shards')}]",
            "eval.shards": f"[{self.text.at('held-out')}]",
            "train.steps": self.scale.recover_steps,
        }, [start[0], self.text])  # fmt: skip
        return node, node.at("run", "model")

    def shards(self, sources: Sequence[str], needs: Sequence[Node] = ()) -> Node:
        """Training shards without what the test sets hold; counts are in its log and bad.jsonl."""
        command = ["drama", "shard", *sources, *self._clean(), "--out", f"{OUT}/shards"]
        return self._node("shards", 0.5, [command], [self.prepared, *needs])

    @cached_property
    def pairs(self) -> Node:
        """The supervised pairs, one source."""
        return self.shards([f"pairs={self.data_at('pairs', 'english.jsonl')}"])

    def trained(
        self, start: tuple[Node, str], shards: Sequence[Node], size: str, seed: int,
        recipe: str = f"{RECIPES}/retriever.yaml", **values: object,
    ) -> Node:  # fmt: skip
        """A retriever. values: keys of the recipe, `__` for a dot, that are not the scale's."""
        sets: dict[str, object] = {
            "model.path": start[1],
            "data.shards": "[" + ", ".join(node.at("shards") for node in shards) + "]",
            "data.max_document_tokens": self.scale.max_tokens,
            "train.batch_size": self.scale.batch,
            "train.steps": self.scale.steps,
            "train.token_budget": self.scale.token_budget,
            "data.workers": self.scale.workers,
            "seed": seed,
        } | {key.replace("__", "."): value for key, value in values.items()}
        examples = int(str(sets["train.batch_size"])) * int(str(sets["train.steps"]))
        tokens = examples * (int(str(sets["data.max_document_tokens"])) * 0.8 + QUERY_TOKENS)
        return self._recipe_node("retriever", "train.py", recipe, int(tokens), self._share(size),
                                 sets, [start[0], *shards], {"examples": examples})  # fmt: skip

    def evaluated(
        self, models: dict[str, str], needs: Sequence[Node], suite: str, size: str,
        *, dim: int | None = None, max_tokens: int | None = None,
    ) -> Node:  # fmt: skip
        """Figures of models (paths by name, or "bm25") on a suite of test sets."""
        own = len([spec for spec in models.values() if spec != "bm25"])
        length = max_tokens or self.scale.max_tokens
        systems = [w for name, spec in models.items() for w in ("--system", f"{name}={spec}")]
        path = f"{RECIPES}/suites/{suite}.yaml"
        command = ["drama", "evaluate", "--suite", f"{{root}}/{path}", "--root",
                   self.data_at("eval"),
                   *systems, "--max-tokens", str(length), "--drop-vectors",
                   "--out", f"{OUT}/evaluation"]  # fmt: skip
        command += ["--dim", str(dim)] if dim else []
        tokens = SUITE_TEXTS[suite] * length * 0.7 * own
        minutes = self._minutes(tokens / FORWARD, self._share(size))
        return self._node("evaluation", minutes, [command], [self.prepared, *needs], [path])

    def crops(self) -> Node:
        """One sentence of every document is a query; the teacher ranks."""
        documents = self.scale.crops * len(self.scale.texts)
        return self._augmented("crops", 0.3 + documents / 2500, [
            ["drama", "augment", "crops", self.data_at("sample", "crops.jsonl"),
             *self._teacher(), "--depth", "40", "--positives", "1-2", "--negatives", "20-40",
             "--out", f"{OUT}/records.jsonl"],
        ])  # fmt: skip

    def queries(self) -> Node:
        """A language model's queries for some documents, in a process with its server."""
        minutes = self.scale.queries * 45 / 20 / 60 + 1.5
        return self._augmented("queries", minutes, [
            ["python", "-m", "drama.evidence.serving", self.llm_path, "--out", OUT, "--",
             "drama", "augment", "queries", self.data_at("sample", "asked.jsonl"),
             *self._teacher(), "--depth", "30", "--positives", "1", "--negatives", "10-20",
             "--model", "{model}", "--base-url", "{url}", "--concurrency", "8",
             "--max-tokens", "64", "--document-chars", "600", "--out", f"{OUT}/records.jsonl"],
        ])  # fmt: skip

    def reranked(self, queries: Node) -> Node:
        """The same model orders what the teacher found for its queries."""
        minutes = self.scale.queries * 60 / 20 / 60 + 1.5
        return self._augmented("rerank", minutes, [
            ["python", "-m", "drama.evidence.serving", self.llm_path, "--out", OUT, "--",
             "drama", "augment", "rerank", queries.at("records.jsonl"), "--corpus",
             self.data_at("sample", "asked.jsonl"), *self._teacher(),
             "--model", "{model}", "--base-url", "{url}", "--concurrency", "8",
             "--max-tokens", "64", "--passage-chars", "200",
             "--out", f"{OUT}/records.jsonl"],
        ], [queries])  # fmt: skip

    # -- parts ------------------------------------------------------------------------------------

    def _augmented(
        self, name: str, minutes: float, commands: list[list[str]], needs: Sequence[Node] = ()
    ) -> Node:
        return self._node(name, minutes, commands, [self.prepared, *needs])

    def _teacher(self) -> list[str]:
        return ["--teacher", self.teacher, "--work", f"{OUT}/work"]

    def _recipe_node(
        self, name: str, launcher: str, recipe: str, tokens: float, share: float,
        sets: dict[str, object], needs: Sequence[Node], facts: dict[str, object] | None = None,
    ) -> Node:  # fmt: skip
        path = recipe if recipe.endswith(".yaml") else f"{RECIPES}/{recipe}.yaml"
        changed = [w for key, value in {**sets, "output": f"{OUT}/run"}.items()
                   for w in ("--set", f"{key}={value}")]  # fmt: skip
        command = ["python", f"{{root}}/launchers/{launcher}", "--recipe", f"{{root}}/{path}",
                   *changed]  # fmt: skip
        return self._node(name, self._minutes(tokens, share), [command], needs, [path], facts=facts)

    def _node(
        self, name: str, minutes: float, commands: Sequence[Sequence[str]],
        needs: Sequence[Node] = (), recipes: Sequence[str] = (), inputs: str = "",
        facts: dict[str, object] | None = None,
    ) -> Node:  # fmt: skip
        return Node(name, tuple(map(tuple, commands)), minutes, tuple(needs), tuple(recipes),
                    inputs, facts or {})  # fmt: skip

    def _minutes(self, tokens: float, share: float) -> float:
        return (self.scale.start_s + tokens / (self.scale.speed * share)) / 60

    @staticmethod
    def _share(size: str) -> float:
        """Speed of a size, of the small one's."""
        return {"small": 1.0, "large": 0.55, "nano": 0.75}[size]

    def _files(self, kind: str, names: Sequence[str]) -> list[str]:
        return [self.data_at(kind, f"{name}.jsonl") for name in names]

    def _list(self, kind: str, names: Sequence[str]) -> str:
        return "[" + ", ".join(self._files(kind, names)) + "]"

    def _clean(self) -> list[str]:
        """Leaves out what stands in a test set of the widest suite of this scale."""
        from drama.retrieve.suite import load_suite

        suite = load_suite(ROOT / RECIPES / "suites" / f"{self.scale.suites['nano']}.yaml")
        sets = [self.data_at("eval", entry.path or entry.name) for entry in suite.datasets]
        return [word for path in sets for word in ("--decontaminate", path)]
