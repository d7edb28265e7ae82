"""Each operation on CPU: as registered with PyTorch, in float64, compiled, and what it refuses."""

import pytest
import torch

from armillary.kernels.adamw import AdamW, adamw, adamw_step
from armillary.kernels.attention import Packing, attention, attention_and_lse, attention_backward, attention_forward
from armillary.kernels.cross_entropy import cross_entropy_gradient, cross_entropy_statistics, linear_cross_entropy
from armillary.kernels.decode import decode_attention, decode_forward
from armillary.kernels.norm import layer_norm, norm_backward, norm_forward, rms_norm
from armillary.kernels.rope import rope, rope_table, rope_turn
from armillary.kernels.swiglu import swiglu, swiglu_backward, swiglu_forward

T, HEADS, GROUPS, D = 7, 4, 2, 16


def drawn(*shape, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(grad)


def packing(*lengths):
    return Packing(torch.tensor([0, *lengths]).cumsum(0).int(), sum(lengths))


def qkv(t=T, **kwargs):
    return drawn(t, HEADS, D, **kwargs), drawn(t, GROUPS, D, **kwargs), drawn(t, GROUPS, D, **kwargs) * 1.5


def attended(q, k, v, causal=True, window=0):
    return attention_and_lse(q, k, v, packing(3, 4), causal, window)


def tables(packed):
    return packed.blocks(64), packed.blocks(32), packed.blocks(16), packed.cu_seqlens


TABLE = rope_table(torch.arange(T), D, 100.0)
CASES = {
    "norm_forward": (norm_forward, lambda: (drawn(T, 6), drawn(6), drawn(6), drawn(T, 6) * 2, 1e-5, True, False)),
    "norm_forward, rms": (norm_forward, lambda: (drawn(T, 6), drawn(6), None, None, 1e-5, False, True)),
    "swiglu_forward": (swiglu_forward, lambda: (drawn(T, 6),)),
    "rope_turn": (rope_turn, lambda: (drawn(T, HEADS, D), *TABLE, False)),
    "attention_forward": (
        attention_forward,
        lambda: (*qkv(), *tables(packing(3, 4)), True, 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_registration_is_what_it_says(name):
    operation, arguments = CASES[name]
    torch.library.opcheck(operation, arguments())


def test_registrations_without_a_gradient():
    x, rows = drawn(T, 6, grad=False), drawn(T, grad=False).abs()
    torch.library.opcheck(norm_backward, (x, None, x, x[0], rows, rows, True, True, False))
    torch.library.opcheck(swiglu_backward, (x, x[:, :3].clone()))
    q, k, v = (one.detach() for one in qkv())
    o, lse = attended(q, k, v)
    torch.library.opcheck(attention_backward, (o, q, k, v, o, lse, *tables(packing(3, 4))[1:], True, 0))
    torch.library.opcheck(decode_forward, (q, k[None].repeat(T, 1, 1, 1), v[None].repeat(T, 1, 1, 1), torch.arange(T)))
    labels = torch.tensor([0, 1, 2, 3, 4, 5, -100])
    torch.library.opcheck(cross_entropy_statistics, (x, labels))
    torch.library.opcheck(cross_entropy_gradient, (x, labels, rows, rows, 0.1, 0.1, 0.01))
    four = [[one.clone(), one[0].clone()] for one in (x, x, x, x.square())]
    copies = [one.bfloat16() for one in four[0]]
    torch.library.opcheck(adamw_step, (*four, copies, 3, 1e-3, 0.9, 0.95, 1e-8, 0.1, None))


@pytest.mark.parametrize("seed", [None, 1])
def test_adamw_is_that_of_pytorch(seed):
    weight = drawn(T, 6, grad=False)
    theirs, first, second = torch.nn.Parameter(weight.clone()), torch.zeros_like(weight), torch.zeros_like(weight)
    optimizer = torch.optim.AdamW([theirs], 1e-2, (0.8, 0.9), 1e-6, 0.1)
    options = dict(learning_rate=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1, seed=seed)
    copy = torch.zeros(T, 6, dtype=torch.bfloat16)
    for step in range(1, 5):
        theirs.grad = drawn(T, 6, grad=False) / step
        optimizer.step()
        adamw([weight], [theirs.grad], [first], [second], [copy], step, **options)
    torch.testing.assert_close(weight, theirs.detach())
    torch.testing.assert_close(copy.double(), weight, rtol=2**-8 if seed is None else 2**-7, atol=0)


def test_an_exact_adamw_does_not_see_how_numbers_are_shared_out():
    numbers = drawn(4001, dtype=torch.float32, grad=False)

    def taken(parts, exact):
        weights = [torch.nn.Parameter(part.clone()) for part in numbers.chunk(parts)]
        optimizer = AdamW(weights, 1e-2, (0.9, 0.95), 1e-8, 0.1, exact=exact)
        for step in range(1, 4):
            for weight, gradient in zip(weights, numbers.chunk(parts), strict=True):
                weight.grad = gradient / step
            optimizer.step()
        return torch.cat([weight.detach() for weight in weights])

    whole = taken(1, True)
    assert all(torch.equal(taken(parts, True), whole) for parts in (2, 31, 401))
    torch.testing.assert_close(taken(401, False), whole)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_small_differences(name):
    operation, arguments = CASES[name]

    def differentiable(*given):
        found = operation(*given)
        return found if isinstance(found, torch.Tensor) else found[0]

    assert torch.autograd.gradcheck(differentiable, arguments())


def test_the_gradient_of_linear_cross_entropy_is_that_of_small_differences():
    labels, weights = torch.tensor([0, 4, 2, -100, 1, 1, 3]), torch.linspace(0.1, 1, T)

    def total(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, weights, 1e-2, 0.1)[0]

    assert torch.autograd.gradcheck(total, (drawn(T, 3), drawn(5, 3)))


def test_references_and_registrations_agree():
    """What runs on CPU, and what stands for the kernels where they do not run."""
    q, k, v = qkv()
    for causal, window in ((True, 0), (True, 2), (False, 0)):
        torch.testing.assert_close(
            attention(q, k, v, packing(3, 4), causal, window), attended(q, k, v, causal, window)[0]
        )
    x, w, b = drawn(T, 6), drawn(6), drawn(6) * 3
    torch.testing.assert_close(layer_norm(x, w, b, 1e-5), norm_forward(x, w, b, None, 1e-5, True, False)[0])
    y, s = rms_norm(x, w, 1e-5, b.expand(T, 6), True)
    other = norm_forward(x, w, None, b.expand(T, 6), 1e-5, False, True)
    torch.testing.assert_close((y, s), other[:2])
    torch.testing.assert_close(swiglu(x), swiglu_forward(x))


def test_a_layer_compiles_without_a_break():
    def layer(x, weight, cos, sin):
        y, s = rms_norm(x, weight, 1e-5, x)
        turned = rope(y.view(T, 2, 8), cos, sin).flatten(1)
        return swiglu(turned + s)

    x, weight, table = (
        drawn(T, 16, dtype=torch.float32),
        drawn(16, dtype=torch.float32),
        rope_table(torch.arange(T), 8, 10.0),
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, *table), layer(x, weight, *table))


@pytest.mark.parametrize("name", CASES)
def test_registrations_compile_without_a_break(name):
    operation, arguments = CASES[name]
    found = torch.compile(operation, fullgraph=True, backend="aot_eager")(*arguments())
    torch.testing.assert_close(found, operation(*arguments()))


def stepped(weights, gradients, moments, step=1):
    options = dict(learning_rate=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)
    adamw(weights, gradients, moments, moments, [], step, **options)


Q, K = torch.zeros(T, HEADS, D), torch.zeros(T, GROUPS, D)
CACHE = torch.zeros(T, 5, GROUPS, D)
REFUSED = {
    "attention: q must be [Q, heads, d]": lambda: attention(Q[0], K, K, packing(7)),
    "attention: q must be .* Q above 0": lambda: attention(Q[:0], K[:0], K[:0], packing(7)),
    "attention: q must be of floating-point": lambda: attention(Q.int(), K, K, packing(7)),
    "attention: q must be of heads of 256 dimensions or fewer": lambda: attention(
        *[torch.zeros(T, 1, 320)] * 3, packing(7)
    ),
    "decode_attention: lengths must be of whole numbers": lambda: decode_attention(Q, CACHE, CACHE, torch.ones(T)),
    "linear_cross_entropy: labels must be of int64": lambda: linear_cross_entropy(Q[0], Q[1], Q[0, :, 0], Q[0, :, 0]),
    "attention: k must be of groups that divide": lambda: attention(Q, Q[:, :3], Q[:, :3], packing(7)),
    "attention: k must be of shape": lambda: attention(Q, K[..., :8], K[..., :8], packing(7)),
    "attention: v must be of shape": lambda: attention(Q, K, K[:6], packing(7)),
    "attention: k and v must be of torch.float32": lambda: attention(Q, K.half(), K.half(), packing(7)),
    "attention: k must be on cpu, not on meta": lambda: attention(Q, K.to("meta"), K, packing(7)),
    "attention: cu_seqlens must be up to 7, not 6": lambda: attention(Q, K, K, packing(6)),
    "attention: window must be": lambda: attention(Q, K, K, packing(7), False, 3),
    "attention: cu_seqlens must be rising": lambda: Packing(torch.tensor([0, 5, 3, 7]), 7),
    "attention: cu_seqlens must be rising from 0": lambda: Packing(torch.tensor([1, 7]), 7),
    "attention: cu_seqlens must be up to 7": lambda: Packing(torch.tensor([0, 5]), 7),
    "attention: cu_seqlens must be of whole numbers": lambda: Packing(torch.tensor([0.0, 7.0]), 7),
    "decode_attention: q must be": lambda: decode_attention(Q[0], CACHE, CACHE, torch.ones(T)),
    "decode_attention: k must be .n, capacity": lambda: decode_attention(Q, K, K, torch.ones(T)),
    "decode_attention: lengths must be of shape": lambda: decode_attention(Q, CACHE, CACHE, torch.ones(3)),
    "rms_norm: weight must be of shape": lambda: rms_norm(torch.zeros(2, 3), torch.ones(4), 1e-5),
    "rms_norm: x must be of one number": lambda: rms_norm(torch.zeros(0, 3), torch.ones(3), 1e-5),
    "rms_norm: residual must be of shape": lambda: rms_norm(torch.zeros(2, 3), torch.ones(3), 1e-5, torch.zeros(3)),
    "layer_norm: bias must be on cpu": lambda: layer_norm(
        torch.zeros(2, 3), torch.ones(3), torch.ones(3, device="meta"), 1
    ),
    "layer_norm: x must be of floating-point": lambda: layer_norm(torch.zeros(2, 3).int(), torch.ones(3), None, 1e-5),
    "rope: x must be": lambda: rope(torch.zeros(T, 2, 5), *TABLE),
    "rope: cos must be of shape": lambda: rope(torch.zeros(T, 2, 8), *TABLE),
    "adamw: weights must be a list with": lambda: stepped([], [], []),
    "adamw: gradients must be 1 tensors, not 2": lambda: stepped([Q], [Q, Q], [Q]),
    "adamw: gradients must be of shape": lambda: stepped([Q], [K], [Q]),
    "adamw: first must be of one of .*float32": lambda: stepped([Q], [Q], [Q.half()]),
    "adamw: weights must be all of one dtype": lambda: stepped([Q, Q.bfloat16()], [Q, Q], [Q, Q]),
    "adamw: weights must be contiguous": lambda: stepped([Q.transpose(0, 1)], [Q.transpose(0, 1)], [Q.transpose(0, 1)]),
    "adamw: step must be 1 or more": lambda: stepped([Q], [Q], [Q], 0),
    "swiglu: x must be of an even": lambda: swiglu(torch.zeros(2, 3)),
    "linear_cross_entropy: hidden must be": lambda: linear_cross_entropy(Q, Q, Q, Q),
    "linear_cross_entropy: weight must be": lambda: linear_cross_entropy(Q[0], K[0, :, :3], Q[0, :, 0], Q[0, :, 0]),
    "linear_cross_entropy: labels must be of shape": lambda: linear_cross_entropy(Q[0], Q[1], Q[0], Q[0, :, 0]),
    "linear_cross_entropy: label_smoothing": lambda: linear_cross_entropy(
        Q[0], Q[1], Q[0, :, 0].long(), Q[0, :, 0], 0.0, 1.0
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=message.replace("[Q, heads, d]", r"\[Q, heads, d\]")):
        REFUSED[message]()
