"""A language model that knows nothing, for the smoke scale: a cut of it takes seconds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
SPECIALS = ("<pad>", "<s>", "</s>")


def write_stand_in(folder: Path, texts: Iterable[str]) -> None:
    """Write a random Llama of 4 layers, width 96 and 6 heads, with a byte-pair tokenizer of the
    texts; the same files for the same texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, begin, end = SPECIALS
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end
    )
    config = LlamaConfig(
        vocab_size=len(whole),
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=whole.pad_token_id,
        bos_token_id=whole.bos_token_id,
        eos_token_id=whole.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    whole.save_pretrained(folder)
