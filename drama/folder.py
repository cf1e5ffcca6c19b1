"""What a retriever's folder says: architecture, mask, pooling, prompts, length.

Read are config.json and the files of sentence-transformers, as its versions 2 to 6 write them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

from drama.errors import UserError
from drama.truncation import baked_dim

Pooling = Literal["last", "mean"]
Attention = Literal["bidirectional", "causal"]

# the blocks that `drama.blocks` runs exactly
ARCHITECTURES = ("llama", "eurobert", "mistral", "qwen2", "qwen3")
# classes in the code of a model folder, which is never run: a Llama in all but the mask
BIDIRECTIONAL_CLASSES = ("DramaModel",)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
# what the Transformer module may say without changing a vector
_NEUTRAL = {
    "do_lower_case": (False,),
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "unpad_inputs": (None, True, False),
}
_POOLING_NAMES: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean"}


@dataclass(frozen=True)
class RetrieverSettings:
    """What makes a backbone a retriever; stored with the model in sentence-transformers' files."""

    pooling: Pooling = "last"
    attention: Attention = "bidirectional"
    query_prefix: str = "Query: "
    document_prefix: str = ""
    matryoshka_dims: tuple[int, ...] = ()
    max_tokens: int = 512
    dim: int | None = None  # to which all vectors are cut; None: the backbone's width


class NotForEncoderError(UserError):
    """A folder that `Encoder` does not run as it is meant; sentence-transformers may."""


def read_settings(folder: Path, attention: Attention | None = None) -> RetrieverSettings:
    """Read pooling, mask, prefixes, widths and length from a retriever folder's files.

    A folder without sentence-transformers files gets the defaults (those of DRAMA's released models
    where it is one).

    Args:
        attention: instead of what the folder declares.

    Raises:
        NotForEncoderError: another architecture, pooling or module than `Encoder` has.
        UserError: a file that is no JSON, or a mask that is not declared.
    """
    config = read_config(folder)
    settings = RetrieverSettings()
    dims = getattr(config, "matryoshka_dimensions", None)
    if dims:
        settings = replace(settings, matryoshka_dims=tuple(dims))
    if not (folder / "modules.json").is_file():
        if _remote_class(config) is None:
            return replace(settings, attention=attention or settings.attention)
        mask = attention or _mask(config, folder)
        return replace(settings, attention=mask, pooling="mean")
    transformer, pooling = _read_modules(folder)
    prompts = _read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
    longest = longest_text(config)
    limit = transformer.get("max_seq_length") or _tokenizers_limit(folder, config)
    if limit > longest and longest < config.max_position_embeddings:
        raise NotForEncoderError(
            f"{folder}: texts of {limit} tokens go beyond its sliding window of {longest}; write "
            f'"max_seq_length": {longest} into sentence_bert_config.json'
        )
    return replace(
        settings,
        attention=attention or _mask(config, folder),
        pooling=pooling,
        query_prefix=prompts.get("query") or "",
        # sentence-transformers writes an empty "document" beside a prompt of another name
        document_prefix=next((prompts[n] for n in DOCUMENT_PROMPTS if prompts.get(n)), ""),
        max_tokens=limit,
        dim=baked_dim(folder),
    )


def read_config(folder: Path) -> Any:
    """The model's configuration, of an architecture whose blocks `drama.blocks` runs exactly.

    Others look alike and are not: a scaled embedding or residual would be left out without a word.

    Raises:
        NotForEncoderError: another architecture.
        UserError: config.json is missing or cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a model folder (config.json is missing)")
    if not isinstance(_read_json(folder / "config.json"), dict):
        raise UserError(f"{folder}/config.json holds no object; copy the model's there")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}/config.json cannot be read: {reason}") from error
    if config.model_type not in ARCHITECTURES:
        raise NotForEncoderError(
            f"{folder}: architecture {config.model_type} is not supported; "
            f"{', '.join(ARCHITECTURES)} are"
        )
    return config


def longest_text(config: Any) -> int:
    """How many tokens a text may have: the positions, or a sliding window that is narrower.

    Within the window every token sees what it would see without one, so the blocks need none.
    """
    positions: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if not window or "sliding_attention" not in kinds:
        return positions
    return min(window, positions)


def _read_modules(folder: Path) -> tuple[dict[str, Any], Pooling]:
    """The Transformer module's own settings, and the pooling.

    Raises:
        NotForEncoderError: other modules than Transformer, Pooling, Normalize, or settings of
            theirs that `Encoder` does not follow.
    """
    modules = _read_json(folder / "modules.json")
    try:
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        paths = [module["path"] for module in modules]
    except (TypeError, KeyError, AttributeError):
        raise UserError(
            f"{folder}/modules.json is no list of modules, each with type and path; copy it anew"
        ) from None
    ours = [kind for kind in kinds if kind != "Dense" or baked_dim(folder) is None]
    if ours not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise NotForEncoderError(
            f"{folder}/modules.json: modules {', '.join(kinds)}; the encoder runs Transformer, "
            "Pooling and Normalize, open_model gives the others to sentence-transformers"
        )
    at = folder / paths[0] / "sentence_bert_config.json"
    transformer = _read_json(at)
    for key, value in transformer.items():
        if key in _NEUTRAL:
            known = value in _NEUTRAL[key]
        elif key == "modality_config":
            known = (value.get("text") or {}).get("method_output_name") == "last_hidden_state"
        else:
            known = key == "max_seq_length" or not value
        if not known:
            raise NotForEncoderError(f"{at}: {key} {value!r} is nothing that the encoder follows")
    if paths[0]:
        raise NotForEncoderError(
            f"{folder}/modules.json: the model lies in {paths[0]}, not beside it"
        )
    return transformer, _read_pooling(folder / paths[1] / "config.json")


def _read_pooling(path: Path) -> Pooling:
    config = _read_json(path)
    modes = config.get("pooling_mode")
    if modes is None:  # sentence-transformers < 5.4: a switch for each
        modes = [
            key for key, on in config.items() if key.startswith("pooling_mode_") and on is True
        ]
        names = {"pooling_mode_lasttoken": "lasttoken", "pooling_mode_mean_tokens": "mean"}
        modes = [names.get(key, key) for key in modes]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLING_NAMES:
        raise NotForEncoderError(f"{path}: pooling is neither last token nor mean")
    pooling = _POOLING_NAMES[modes[0]]
    # the last token is never one of the prompt
    if pooling == "mean" and config.get("include_prompt", True) is False:
        raise NotForEncoderError(
            f"{path}: include_prompt false; the encoder takes the mean over the prompt as well"
        )
    return pooling


def _tokenizers_limit(folder: Path, config: Any) -> int:
    limit = _read_json(folder / "tokenizer_config.json").get("model_max_length")
    return int(min(limit or config.max_position_embeddings, config.max_position_embeddings))


def declared_mask(config: Any, folder: Path) -> Attention | None:
    """What the folder declares: the mask keys of transformers and text-embeddings-inference, which
    must agree, else a known class in the folder's code; None where it says nothing.

    Raises:
        UserError: contradictory, or left to code that is never run.
    """
    claims = []
    if getattr(config, "is_causal", None) is not None:
        claims.append(bool(config.is_causal))
    if getattr(config, "use_bidirectional_attention", None) is not None:
        claims.append(not config.use_bidirectional_attention)
    if len(set(claims)) == 2:
        raise UserError(
            f"{folder}/config.json: is_causal and use_bidirectional_attention contradict each other"
        )
    if claims:
        return "causal" if claims[0] else "bidirectional"
    remote = _remote_class(config)
    if remote is None:
        return None
    if remote in BIDIRECTIONAL_CLASSES:
        return "bidirectional"
    raise UserError(
        f"{folder}/config.json: {remote} is code of the folder, which is never run and may change "
        'the mask; write "is_causal": false (or true) there, or give attention='
    )


def _mask(config: Any, folder: Path) -> Attention:
    """The declared mask, else the architecture's.

    Raises:
        UserError: as `declared_mask`, or the declaration was lost since the export.
    """
    declared = declared_mask(config, folder)
    if declared or config.model_type == "eurobert":
        return declared or "bidirectional"
    files = _read_json(folder / "config_sentence_transformers.json")
    if files.get("attention") == "bidirectional":  # `drama.export` writes it
        raise UserError(
            f"{folder}/config.json: exported as bidirectional, but is_causal is gone, so it would "
            'run as causal; write "is_causal": false there'
        )
    return "causal"


def _remote_class(config: Any) -> str | None:
    """The model class that the folder brings as code, by its name."""
    known = [name for name in config.architectures or () if name in BIDIRECTIONAL_CLASSES]
    code: Mapping[str, str] = getattr(config, "auto_map", None) or {}
    classes = [code[key].rpartition(".")[2] for key in sorted(code) if key.startswith("AutoModel")]
    return next(iter([*known, *classes]), None)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
