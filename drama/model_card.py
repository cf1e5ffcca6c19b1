"""README.md of an exported folder: Hugging Face's model card, with what is known of the run.

The front matter follows https://huggingface.co/docs/hub/model-cards; figures are in its
model-index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from drama.encoder import Encoder
from drama.errors import UserError
from drama.export_onnx import INT8, PLAIN, OnnxFacts
from drama.folder import RetrieverSettings
from drama.run_facts import RunFacts

_USE = """## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode(["how do vaccines work"], prompt_name="query")
documents = model.encode(["Vaccines train the immune system ..."], prompt_name="document")
scores = model.similarity(queries, documents)
```

With DRAMA, on packed tokens:

```python
from drama.encoder import Encoder

model = Encoder.from_pretrained("path/to/this/folder")
queries = model.encode(["how do vaccines work"], "query")
```

With transformers alone (the prompt is yours to put before the text):

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModel.from_pretrained("path/to/this/folder").eval()
batch = tokenizer([{prompt} + "how do vaccines work"], padding=True, return_tensors="pt")
with torch.no_grad():
    states = model(**batch).last_hidden_state
mask = batch["attention_mask"]
{pooled}
vectors = torch.nn.functional.normalize(pooled[:, :{dim}], dim=1)
```
"""
_POOLED = {
    "last": "pooled = states[torch.arange(len(mask)), mask.sum(1) - 1]",
    "mean": "pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
}
_SERVERS = {
    "llama": "vLLM (`vllm serve FOLDER --runner pooling`) and text-embeddings-inference "
    "(`--model-id FOLDER`) read this architecture; send the prompts with the texts.",
    "eurobert": "vLLM and text-embeddings-inference read the other architecture: write the folder "
    "with `drama export --architecture llama`, and send the prompts with the texts.",
}
_OTHER_SERVERS = (
    "Whether a server follows `is_causal` of this architecture has to be tried there; send the "
    "prompts with the texts."
)


@dataclass(frozen=True)
class Evaluation:
    """What `drama evaluate` wrote, and which of its systems is this model; None: it says not."""

    results: Mapping[str, Any]
    system: str | None

    @classmethod
    def read(cls, path: Path, *models: Path) -> Evaluation:
        """Read an evaluation.json; `models` are the paths by which it may know the model.

        Raises:
            UserError: no evaluation.
        """
        path = path / "evaluation.json" if path.is_dir() else path
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            specs = {
                name: Path(system["spec"]).resolve()
                for name, system in results["systems"].items()
                if system["dim"] is not None
            }
            if not all("systems" in dataset for dataset in results["datasets"].values()):
                raise KeyError("systems")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"--evaluation {path}: no evaluation.json of `drama evaluate` "
                f"({type(error).__name__}: {error})"
            ) from None
        known = {model.resolve() for model in models}
        found = [name for name, spec in specs.items() if spec in known]
        if not found and len(specs) == 1:
            found = list(specs)
        return cls(results, found[0] if len(found) == 1 else None)


def model_card(
    encoder: Encoder,
    settings: RetrieverSettings,
    architecture: str,
    *,
    run: RunFacts | None = None,
    evaluation: Evaluation | None = None,
    onnx: OnnxFacts | None = None,
) -> str:
    """The text of the card of `encoder`, written with `settings`."""
    name = run.name if run else "retriever"
    parts = [
        f"# {name}",
        _description(encoder.backbone, settings, architecture),
        _use(settings, settings.dim or encoder.backbone.config.hidden_size, architecture),
        _onnx(onnx) if onnx else "",
        _figures(run, evaluation),
        _training(run) if run else "",
        _LIMITS.format(max_tokens=settings.max_tokens),
    ]
    front = _front_matter(name, run, evaluation)
    return f"---\n{front}\n---\n\n" + "\n\n".join(part.strip() for part in parts if part) + "\n"


_LIMITS = """## Limits

Texts are cut after {max_tokens:,} tokens. Vectors are of norm 1: compare them by their dot product.
The model finds what is alike in the sense of its training data; languages and kinds of text that
are not in it are served worse, and what a text says is not judged."""


def _front_matter(name: str, run: RunFacts | None, evaluation: Evaluation | None) -> str:
    languages = [x for x in (run.languages if run else {}) if re.fullmatch("[a-z]{2,3}", x)]
    data = ModelCardData(
        model_name=name,
        language=languages or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "retrieval", "drama"],
        eval_results=_results(run, evaluation) or None,
    )
    return data.to_yaml().strip()


def _results(run: RunFacts | None, evaluation: Evaluation | None) -> list[EvalResult]:
    of_model = _by_dataset(evaluation).items()
    found = [(d, m, x) for d, metrics in of_model for m, x in metrics.items()]
    if not found and run:
        for figure, value in run.evaluation.items():
            metric, _, dataset = figure.partition(" ")
            if dataset:
                found.append((dataset, metric, value))
    return [
        EvalResult(
            task_type="information-retrieval",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric.lower().replace("@", "_at_"),
            metric_name=metric,
            metric_value=round(float(value), 5),
        )
        for dataset, metric, value in found
    ]


def _by_dataset(evaluation: Evaluation | None) -> dict[str, dict[str, float]]:
    """Figures of this model."""
    if evaluation is None or evaluation.system is None:
        return {}
    datasets = evaluation.results["datasets"].items()
    return {
        name: dataset["systems"][evaluation.system]["metrics"]
        for name, dataset in datasets
        if evaluation.system in dataset["systems"]
    }


def _description(backbone: Any, settings: RetrieverSettings, architecture: str) -> str:
    config = backbone.config
    dim = settings.dim or config.hidden_size
    dims = ", ".join(map(str, settings.matryoshka_dims or (dim,)))
    cut = ""
    if settings.dim:
        cut = f" The backbone gives {config.hidden_size}; the folder's linear module cuts them."
    rows = {
        "parameters": f"{sum(x.numel() for x in backbone.parameters()):,}",
        "layers, width": f"{config.num_hidden_layers}, {config.hidden_size}",
        "attention": settings.attention,
        "pooling": f"{settings.pooling}; the tokenizer appends EOS",
        "dimensions": f"{dim}; trained to be cut to {dims}",
        "tokens": f"at most {settings.max_tokens:,}",
        "query prompt": _quoted(settings.query_prefix),
        "document prompt": _quoted(settings.document_prefix),
        "architecture": f"`{architecture}`, no remote code",
    }
    return (
        f"A dense retriever: it turns queries and documents into vectors of {dim} "
        f"dimensions.{cut}\n\n{_table(('', ''), list(rows.items()))}"
    )


def _use(settings: RetrieverSettings, dim: int, architecture: str) -> str:
    code = _USE.format(
        prompt=json.dumps(settings.query_prefix, ensure_ascii=False),
        pooled=_POOLED[settings.pooling],
        dim=dim,
    )
    return f"{code}\n{_SERVERS.get(architecture, _OTHER_SERVERS)}"


def _onnx(facts: OnnxFacts) -> str:
    text = (
        f"## ONNX\n\n`{PLAIN}` takes `input_ids` and `attention_mask` of any size and gives "
        "`last_hidden_state` and `sentence_embedding`. Its vectors differ from the model's by at "
        f"most {facts.difference:.1e}."
    )
    if facts.cosine_mean is not None and facts.cosine_min is not None:
        text += (
            f" `{INT8}` has 8-bit weights; on a few texts the cosine of its vectors with the "
            f"model's is {facts.cosine_mean:.4f} on average and {facts.cosine_min:.4f} at least. "
            "Measure retrieval with it before you rely on it."
        )
    return text


def _figures(run: RunFacts | None, evaluation: Evaluation | None) -> str:
    text = ""
    if evaluation:
        for name, dataset in evaluation.results["datasets"].items():
            systems = dataset["systems"]
            metrics = list(next(iter(systems.values()))["metrics"]) if systems else []
            rows = [
                (
                    f"**{system}** (this model)" if system == evaluation.system else system,
                    *(f"{values['metrics'][metric]:.4f}" for metric in metrics),
                )
                for system, values in systems.items()
            ]
            text += f"\n\n{name}, {dataset.get('split', '')}:\n\n{_table(('', *metrics), rows)}"
    if run and run.evaluation:
        rows = [(figure, f"{value:.4f}") for figure, value in run.evaluation.items()]
        text += f"\n\nWhile training, of this step:\n\n{_table(('figure', 'value'), rows)}"
    return f"## Figures{text}" if text else ""


def _training(run: RunFacts) -> str:
    rows = {
        "steps": f"{run.steps:,}",
        "queries": f"{run.pairs:,}",
        "tokens": f"{run.tokens:,}",
        "loss at the end": "" if run.loss is None else f"{run.loss:.4f}",
        "hours of steps": f"{run.seconds / 3600:,.2f}",
        "backbone": run.backbone,
        **_pruning(run.parent),
    }
    parts = [f"## Training\n\n{_table(('', ''), [row for row in rows.items() if row[1]])}"]
    if run.shards:
        parts.append(f"## Data\n\nShards: {', '.join(run.shards)}.")
    if run.sources:
        records = [(source or "(no name)", f"{n:,}") for source, n in run.sources.items()]
        parts.append(_table(("source", "records"), records))
        parts.append("Licences are not recorded in shards: see each source's.")
    fence = "`" * 4
    parts.append(
        f"<details><summary>Recipe</summary>\n\n{fence}yaml\n{run.recipe.strip()}\n{fence}\n\n"
        "</details>"
    )
    return "\n\n".join(parts)


def _pruning(facts: Mapping[str, Any]) -> dict[str, str]:
    """Rows on what the backbone was cut from; of pruning.json, which may be anybody's."""
    rows = {}
    if isinstance(facts.get("model"), str):
        rows["cut from"] = Path(facts["model"]).name
    for key, title in (("source", "parent's shape"), ("target", "shape")):
        shape = facts.get(key)
        if isinstance(shape, dict):
            sizes = [(k, shape.get(k)) for k in ("layers", "hidden", "heads", "kv_heads", "ffn")]
            rows[title] = ", ".join(f"{k} {x}" for k, x in sizes if x is not None)
    if isinstance(facts.get("recoveries"), list):
        rows["recoveries"] = str(len(facts["recoveries"]))
    return rows


def _quoted(prompt: str) -> str:
    return f"`{prompt}`" if prompt else "none"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    escaped = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
