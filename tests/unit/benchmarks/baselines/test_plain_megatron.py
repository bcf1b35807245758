import torch

from benchmarks.optimizer_steps import plain_step, random_batch
from moelpr.model.model_spec import ModelSpec


def test_language_bits_do_not_change_plain_megatron(spec: ModelSpec) -> None:
    """Its router would count tokens with the bit 1 as padding, so the balance loss would ignore them."""
    gradients = []
    torch.manual_seed(1)
    batch = random_batch(spec, 2)
    for bit in (0, 1):
        torch.manual_seed(1)
        step = plain_step(spec, batch | {"is_original": torch.full_like(batch["is_original"], bit)})
        step.forward_backward()
        gradients.append(step.model.decoder.layers[0].mlp.router.weight.main_grad.clone())
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
