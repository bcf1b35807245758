import dataclasses
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moelpr.measure.evaluate.models import hf_model, load_model
from moelpr.measure.evaluate.routing import Routing, broken_priors
from moelpr.measure.evaluate.scoring import Settings


def test_shares_equal_a_plain_computation_from_hidden_states(score, moe_dir, texts):
    loaded = load_model(moe_dir, device="cpu")
    result, layers = score(loaded, texts, Settings(64, 0)), loaded.model.model.layers
    for language, documents in texts.items():
        hidden: dict[int, list[torch.Tensor]] = {0: [], 2: []}  # without the start and the last token
        with ExitStack() as hooks, torch.no_grad():
            for number, seen in hidden.items():
                note = partial(lambda seen, module, inputs: seen.append(inputs[0][0, 1:-1]), seen)
                hooks.callback(layers[number].mlp.register_forward_pre_hook(note).remove)
            for text in documents:
                ids = [loaded.start_id, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
                loaded.model(torch.tensor([ids]))
        routing = result[language].routing
        assert routing.layers == [0, 2] and routing.tokens == sum(map(len, hidden[0]))
        for index, number in enumerate(routing.layers):
            scores_TE = (torch.cat(hidden[number]) @ layers[number].mlp.gate.weight.T).detach().double().softmax(dim=-1)
            is_first, is_chosen = (
                torch.zeros_like(scores_TE).scatter(1, scores_TE.topk(number).indices, 1) for number in (1, 2)
            )
            loads, weights_TE = is_chosen.mean(0), scores_TE * is_chosen
            expected = {
                "first_choice_share": is_first.mean(0).tolist(),
                "mean_score": scores_TE.mean(0).tolist(),
                "chosen_share": loads.tolist(),
                "load_imbalance": (loads.max() / loads.mean()).item(),
                "original_chosen_share": loads[0].item(),
                "all_original_share": 0,  # one of a token's two experts is always new
                "new_gate_weight": 1 - (weights_TE[:, 0] / weights_TE.sum(1)).mean().item(),
                "entropy": -(scores_TE * scores_TE.log()).sum(1).mean().item(),
            }
            for name, value in expected.items():
                assert getattr(routing, name)[index] == pytest.approx(value, abs=1e-5), name
        assert routing.original_first_share == [shares[0] for shares in routing.first_choice_share]
    assert len({tuple(score.routing.original_first_share) for score in result.values()}) > 1


def test_first_choices_of_all_original_experts_count_together(score, moe_dir, texts):
    loaded = load_model(moe_dir, device="cpu")
    before = score(loaded, {"en": texts["en"]}, Settings(64, 0))["en"].routing
    second_round = dataclasses.replace(loaded, num_original_places=3)
    routing = score(second_round, {"en": texts["en"]}, Settings(64, 0))["en"].routing
    assert routing.first_choice_share == before.first_choice_share
    share = routing.original_first_share
    assert share == pytest.approx([sum(shares[:3]) for shares in routing.first_choice_share])
    assert share != before.original_first_share
    assert routing.original_chosen_share == pytest.approx([1.0, 1.0])  # 1 expert of 4 is new, and each token has 2
    assert before.original_chosen_share != routing.original_chosen_share
    new_chosen = [shares[3] for shares in routing.chosen_share]
    assert routing.all_original_share == pytest.approx([1 - share for share in new_chosen])


def test_context_tokens_are_counted_once(score, moe_dir, texts):
    result = score(load_model(moe_dir, device="cpu"), texts, Settings(8, 5))
    for language, documents in texts.items():
        tokens = result[language].document_tokens
        assert result[language].routing.tokens == sum(tokens) - len(documents)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_routers_of_the_other_exported_families_are_found(family):
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 8, "moe_intermediate_size": 8}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = AutoConfig.for_model(family, **shape, num_local_experts=3, num_experts=3, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config)
    loaded = hf_model(Path(), model, None, 0, None)
    assert {number: tuple(router.weight.shape) for number, router in loaded.routers.items()} == {0: (3, 16), 1: (3, 16)}


def routing_with(*original_first_shares: float) -> Routing:
    """Layers 1, 3, … of two experts, the first of them original."""
    shares = [[share, 1 - share] for share in original_first_shares]
    layers = [2 * index + 1 for index in range(len(shares))]
    return Routing(layers, 10, shares, shares, shares, [0.0] * len(shares), list(original_first_shares), [0.0], [0.0])


def test_a_layer_breaks_the_prior_if_most_first_choices_are_wrong():
    routing = {"en": routing_with(0.9, 0.5, 0.3), "el": routing_with(0.1, 0.5, 0.8)}
    wrong = [("en", True, 5, pytest.approx(0.7)), ("el", False, 5, 0.8)]
    assert [dataclasses.astuple(prior) for prior in broken_priors(routing, ["en"])] == wrong
    assert len(broken_priors(routing, ["en"], threshold=0.05)) == 6
    assert broken_priors(routing, ["en"], threshold=0.85) == []
