"""Hand-written operations and the loss in pieces: equal to torch's own, gradients too, in fp32 and under autocast."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainer.config.model import Decoder as Config
from trainer.models.decoder import Decoder, rotary
from trainer.models.ops import attention, causal_attention, rms_norm, rotate
from trainer.tasks import token_loss as module
from trainer.tasks.token_loss import IGNORE, token_loss
from trainer.train.device import onednn_is_faster, products_by_onednn


@pytest.fixture(params=["mkl", "onednn"])
def products(request):
    """fp32 products of matrices by MKL, and by oneDNN where that is ever chosen."""
    wanted = request.param == "onednn"
    if wanted and not onednn_is_faster():
        pytest.skip("oneDNN would round to bf16 here, or is no faster")
    with products_by_onednn(wanted):
        yield


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def assert_same(found, expected, inputs, atol):
    """Equal values, and equal gradients by all inputs from one random gradient."""
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)
    left, right = torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, inputs, gradient)
    for one, other in zip(left, right, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-5, atol=10 * atol)


def plain_rotation(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def test_rms_norm() -> None:
    torch.manual_seed(0)
    x, weight = numbers(3, 5, 24), numbers(24)
    assert_same(rms_norm(x, weight, 1e-6), functional.rms_norm(x, (24,), weight, 1e-6), (x, weight), 1e-6)


def test_rms_norm_gives_the_type_of_the_products_that_follow() -> None:
    x, weight = numbers(4, 8), numbers(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_norm(x, weight, 1e-6).dtype == torch.bfloat16
    assert rms_norm(x, weight, 1e-6).dtype == torch.float32


def test_rotate() -> None:
    torch.manual_seed(0)
    x = numbers(2, 3, 7, 8)
    cos, sin = rotary(7, 8, 100.0, torch.device("cpu"))
    assert_same(rotate(x, cos, sin), plain_rotation(x, cos, sin), (x,), 1e-6)


@pytest.mark.parametrize(("length", "before"), [(1, 3), (5, 128), (130, 70)])
def test_causal_attention_of_the_last_places(products, length, before) -> None:
    torch.manual_seed(0)
    whole = tuple(numbers(2, before + length, 3, 16).transpose(1, 2) for _ in range(3))
    parts = (whole[0][:, :, before:].detach().requires_grad_(), *whole[1:])
    expected = functional.scaled_dot_product_attention(parts[0], *whole[1:], attn_mask=mask_of(length, before))
    assert_same(causal_attention(*parts), expected, parts, 2e-6)


def mask_of(length: int, before: int) -> Tensor:
    """What each of the last places sees."""
    return torch.arange(before + length)[None, :] <= torch.arange(before, before + length)[:, None]


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
def test_causal_attention(products, length) -> None:
    torch.manual_seed(0)
    # As a model hands them over: heads were turned to the front without a copy.
    parts = tuple(numbers(2, length, 3, 16).transpose(1, 2) for _ in range(3))
    expected = functional.scaled_dot_product_attention(*parts, is_causal=True)
    assert_same(causal_attention(*parts), expected, parts, 2e-6)


def test_causal_attention_in_bf16_is_near_fp32() -> None:
    torch.manual_seed(0)
    wide = tuple(numbers(2, 3, 150, 16) for _ in range(3))
    narrow = tuple(part.detach().bfloat16().requires_grad_() for part in wide)
    expected, found = functional.scaled_dot_product_attention(*wide, is_causal=True), causal_attention(*narrow)
    assert (found - expected).abs().max() < 0.03
    gradient = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(found, narrow, gradient.bfloat16()),
        torch.autograd.grad(expected, wide, gradient),
        strict=True,
    )
    assert all((one - other).abs().max() < 0.1 for one, other in pairs)


def test_attention_with_a_mask(products) -> None:
    torch.manual_seed(0)
    parts = tuple(numbers(2, 3, 9, 16) for _ in range(3))
    mask = (torch.arange(9) < 6)[None, None, None, :]
    assert_same(
        attention(*parts, mask, 0.0),
        functional.scaled_dot_product_attention(*parts, attn_mask=mask),
        parts,
        1e-6,
    )


def test_products_by_onednn_keep_the_bits_of_fp32(products) -> None:
    generator = torch.Generator().manual_seed(3)
    for rows, width, columns in ((1, 7, 3), (64, 1000, 33), (300, 128, 512)):
        left = torch.randn(rows, width, generator=generator)
        right = torch.randn(width, columns, generator=generator)
        assert ((left @ right).double() - left.double() @ right.double()).abs().max() < 1e-3


def full_loss(hidden, weight, targets, smoothing):
    logits = (hidden @ weight.t()).float().flatten(0, 1)
    return functional.cross_entropy(
        logits, targets.flatten(), reduction="sum", ignore_index=IGNORE, label_smoothing=smoothing
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("elements", [1, 37 * 5, 1 << 20])
def test_loss_in_pieces_is_that_of_all_logits(monkeypatch, smoothing, elements) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(module.ELEMENTS, "cpu", elements)
    hidden, weight = numbers(3, 7, 16), numbers(37, 16)
    targets = torch.randint(37, (3, 7)).masked_fill(torch.rand(3, 7) < 0.3, IGNORE)
    found, expected = token_loss(hidden, weight, targets, smoothing), full_loss(hidden, weight, targets, smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    # As the loop does it: divided by the units, here an odd number of them.
    left, right = (torch.autograd.grad(loss / 13, (hidden, weight)) for loss in (found, expected))
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(token_loss(hidden, weight, targets, smoothing), found)


def test_loss_of_nothing_is_zero() -> None:
    hidden, weight = numbers(1, 4, 8), numbers(11, 8)
    loss = token_loss(hidden, weight, torch.full((1, 4), IGNORE))
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_loss_of_logits_is_the_same() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = numbers(2, 5, 8), numbers(11, 8), torch.randint(11, (2, 5))
    torch.testing.assert_close(token_loss(hidden @ weight.t(), None, targets), token_loss(hidden, weight, targets))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_decoders_loss_and_gradients(tied, precision) -> None:
    torch.manual_seed(0)
    model = Decoder(Config(dim=32, layers=2, heads=4, kv_heads=2, ff=48, tie_embeddings=tied), 50)
    tokens, targets = torch.randint(50, (2, 2, 20))
    found = []
    for finish in (partial(token_loss, targets=targets), None):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model(tokens, finish=finish)
            loss = out if finish else token_loss(out, None, targets)
        (loss / 40).backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
        found.append((loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    torch.testing.assert_close(found[0][0], found[1][0], rtol=tolerance, atol=0.0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=tolerance, atol=tolerance)
