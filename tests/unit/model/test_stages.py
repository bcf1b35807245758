"""The parts that parameters belong to, and those that a stage trains."""

import pytest

from moelpr.model.stages import Part, part_of, trained_parts


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("embedding.word_embeddings.weight", Part.EMBEDDING),
        ("output_layer.weight", Part.OUTPUT_LAYER),
        ("decoder.final_layernorm.weight", Part.NORM),
        ("decoder.layers.0.pre_mlp_layernorm.weight", Part.NORM),
        ("decoder.layers.0.self_attention.q_layernorm.weight", Part.NORM),
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", Part.NORM),
        ("decoder.layers.0.self_attention.linear_qkv.weight", Part.ATTENTION),
        ("decoder.layers.0.mlp.linear_fc1.weight", Part.DENSE_FFN),
        ("decoder.layers.0.mlp.router.weight", Part.ROUTER),
        ("decoder.layers.0.mlp.original_experts.1.linear_fc2.weight", Part.ORIGINAL_EXPERTS),
        ("decoder.layers.0.mlp.experts.experts.linear_fc1.weight", Part.NEW_EXPERTS),
    ],
)
def test_the_part_of_a_name(name: str, part: Part) -> None:
    assert part_of(name) is part


def test_the_stages_train_what_the_paper_says() -> None:
    assert trained_parts("dense") == frozenset(Part)
    assert trained_parts("ffn") == {Part.DENSE_FFN}
    assert trained_parts("stage0") == {Part.EMBEDDING, Part.OUTPUT_LAYER}
    assert trained_parts("stage1") == {Part.NEW_EXPERTS, Part.ROUTER}
    assert trained_parts("stage1", train_new_embeddings=True) == trained_parts("stage0") | trained_parts("stage1")
    assert trained_parts("stage2") == {Part.ROUTER}
    assert trained_parts("sft") == trained_parts("stage1")
    assert trained_parts("stage2", train_everything=True) == frozenset(Part)
