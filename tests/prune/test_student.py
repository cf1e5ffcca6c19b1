from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from drama.attention import ATTENTION_NAME
from drama.prune.predictions import MaskedNextToken, NextToken
from drama.prune.recovery_recipe import RecoveryLossRecipe
from drama.prune.student import Alignment, ParentStates, Student, read_states

LENGTHS = (3, 17, 17, 1, 40)
SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "initializer_range": 0.2,
}  # fmt: skip
FORMS = [
    (LlamaConfig, {"tie_word_embeddings": True}),
    (LlamaConfig, {"tie_word_embeddings": False, "attention_bias": True}),
    (Qwen3Config, {"tie_word_embeddings": False}),
]


def model(kind: Any = LlamaConfig, seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(kind(**(SHAPE | config))).double().eval()


def rows(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 97, n).astype(np.int32) for n in LENGTHS]


def keys() -> list[tuple[int, int]]:
    return [(0, i) for i in range(len(LENGTHS))]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize(("kind", "config"), FORMS)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_is_that_of_every_text_alone(kind: Any, config: Any, recompute: bool) -> None:
    """Packed and fused against transformers' own forward, text by text, whole logits: float64."""
    plain = model(kind, **config)
    student = Student(copy.deepcopy(plain), RecoveryLossRecipe(), causal=True, recompute=recompute)
    chunk = NextToken().chunk(rows(), keys())
    total, ce_P, kl_P, apart = student(chunk)
    total.backward()
    alone = []
    for row in rows():
        ids = torch.from_numpy(row).long()[None]
        logits = plain(input_ids=ids).logits[0, :-1]
        alone.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
    whole = torch.cat(alone)
    whole.sum().backward()
    torch.testing.assert_close(ce_P, whole.detach().to(ce_P.dtype), rtol=1e-5, atol=1e-5)
    assert total.item() == pytest.approx(whole.sum().item(), rel=1e-12)
    assert kl_P.count_nonzero() == 0
    assert apart.item() == 0
    wanted = dict(plain.named_parameters())
    for name, weight in student.lm.named_parameters():
        assert relative(weight.grad, wanted[name].grad) < 1e-9, name


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_parts_of_the_loss_against_plain_torch(temperature: float) -> None:
    """Cross-entropy, KL to a wider parent and states, value and every gradient, in float64."""
    loss = RecoveryLossRecipe(lm=0.7, kl=1.3, temperature=temperature, hidden=0.4)
    plain, parent = model(), model(seed=1, hidden_size=48, num_hidden_layers=5)
    channels = tuple(range(0, 48, 2))[:16] + tuple(range(1, 33, 2))
    alignment = Alignment(((0, 1), (1, 3), (2, 4)), tuple(sorted(channels)))
    student = Student(copy.deepcopy(plain), loss, causal=True, alignment=alignment, parent_width=48)
    student.double()
    chunk = NextToken().chunk(rows(), keys())
    parent.set_attn_implementation(ATTENTION_NAME)
    with torch.no_grad():
        final, states = read_states(parent.model, chunk, causal=True, wanted={1, 3, 4})
    of_parent = ParentStates(final, parent.lm_head.weight.detach(), [states[b] for b in (1, 3, 4)])
    total, ce_P, kl_P, apart = student(chunk, of_parent)
    total.backward()

    mapping = student.aligner.weight.detach().clone().requires_grad_()
    want = torch.zeros((), dtype=torch.float64)
    sums = torch.zeros(3, dtype=torch.float64)
    for row in rows():
        ids = torch.from_numpy(row).long()[None]
        ours = plain(input_ids=ids, output_hidden_states=True)
        with torch.no_grad():
            theirs = parent(input_ids=ids, output_hidden_states=True)
        z, y = (out.logits[0, :-1] for out in (ours, theirs))
        ce = F.cross_entropy(z, ids[0, 1:], reduction="sum")
        p, q = (F.log_softmax(x / temperature, -1) for x in (y, z))
        kl = temperature**2 * (p.exp() * (p - q)).sum()
        # transformers' last hidden state is normed, so the last block is left to the norm's input
        pairs = [(1, 2), (2, 4)]
        apart_of = [
            1 - F.cosine_similarity(
                ours.hidden_states[a][0, :-1] @ mapping.T, theirs.hidden_states[b][0, :-1]
            )
            for a, b in pairs
        ]  # fmt: skip
        last = 1 - F.cosine_similarity(
            before_norm(plain, ids)[:-1] @ mapping.T, before_norm(parent, ids)[:-1].detach()
        )
        states_apart = torch.stack([*apart_of, last]).mean(0).sum()
        want = want + 0.7 * ce + 1.3 * kl + 0.4 * states_apart
        sums += torch.stack([ce, kl, states_apart]).detach()
    want.backward()
    found = torch.stack([ce_P.double().sum(), kl_P.double().sum(), apart.double()])
    torch.testing.assert_close(found, sums, rtol=1e-5, atol=1e-5)
    assert total.item() == pytest.approx(want.item(), rel=1e-6)
    wanted = dict(plain.named_parameters())
    for name, weight in student.lm.named_parameters():
        assert relative(weight.grad, wanted[name].grad) < 1e-6, name
    assert relative(student.aligner.weight.grad, mapping.grad) < 1e-5


def before_norm(lm: Any, ids: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = lm.model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    lm(input_ids=ids)
    handle.remove()
    return found[0]


@pytest.mark.parametrize(("kind", "config"), FORMS)
@pytest.mark.parametrize("objective", [NextToken(), MaskedNextToken(0.4, 2, 97, 0)])
def test_packed_texts_never_see_each_other(kind: Any, config: Any, objective: Any) -> None:
    """Change one text: the others' losses stay to the last bit, its own do not."""
    student = Student(model(kind, **config), RecoveryLossRecipe(), causal=objective.causal)
    before, changed = rows(), rows()
    changed[2] = rows(seed=1)[2]
    chunk, other = (objective.chunk(x, keys()) for x in (before, changed))
    with torch.no_grad():
        a, b = student(chunk)[1], student(other)[1]
    assert torch.equal(a[chunk.text_P != 2], b[other.text_P != 2])
    assert not torch.equal(a[chunk.text_P == 2], b[other.text_P == 2])


@pytest.mark.parametrize(("causal", "sees"), [(True, False), (False, True)])
def test_a_masked_objective_sees_what_follows(causal: bool, sees: bool) -> None:
    student = Student(model(), RecoveryLossRecipe(), causal=causal)
    before, changed = rows(), rows()
    changed[4][-1] = 2
    with torch.no_grad():
        first = [
            read_states(student.lm.model, NextToken().chunk(x, keys()), causal=causal, wanted=set())
            for x in (before, changed)
        ]
    same = torch.equal(first[0][0], first[1][0])
    assert same != sees


def test_a_text_that_predicts_nothing_has_gradients_of_zero() -> None:
    student = Student(model(), RecoveryLossRecipe(), causal=True)
    total, ce_P, *_ = student(NextToken().chunk([[5]], [(0, 0)]))
    total.backward()
    assert (total.item(), len(ce_P)) == (0, 0)
    assert all(w.grad is None or not w.grad.any() for w in student.parameters())


def test_the_map_between_the_streams_begins_at_the_cut() -> None:
    alignment = Alignment(((0, 0),), (1, 4, 5))
    student = Student(
        model(hidden_size=3, num_attention_heads=1, num_key_value_heads=1, head_dim=2),
        RecoveryLossRecipe(hidden=1), causal=True, alignment=alignment, parent_width=6,
    )  # fmt: skip
    weight_ED = student.aligner.weight.detach()
    parent_D = torch.arange(6.0)
    assert torch.equal(weight_ED @ parent_D[[1, 4, 5]], torch.tensor([0.0, 1, 0, 0, 4, 5]))
