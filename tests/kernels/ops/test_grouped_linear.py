"""Grouped products and their sort outside of kernels: devices without values, autocast, compilers, graphs."""

import torch

from qwen2vl_kernels import group_by_expert, grouped_linear, use_backend
from qwen2vl_kernels.ops.grouped_linear import grouped_linear_ref

BOUNDS = torch.tensor([0, 2, 2, 7], dtype=torch.int32)


def _operands(dtype=torch.float32):
    return torch.randn(8, 16).to(dtype).requires_grad_(), torch.randn(3, 6, 16).to(dtype).requires_grad_()


def test_shapes_on_the_meta_device():
    x, weight = (t.detach().to("meta") for t in _operands())
    assert grouped_linear(x, weight, BOUNDS.to("meta")).shape == (8, 6)
    found = group_by_expert(torch.zeros(9, 2, dtype=torch.int64, device="meta"), 4)
    assert [one.shape for one in found] == [(18,), (18,), (5,)]


def test_autocast_is_that_of_a_linear_layer():
    x, weight = _operands()
    with torch.autocast("cpu", torch.bfloat16):
        got = grouped_linear(x, weight, BOUNDS)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, grouped_linear(x.bfloat16(), weight.bfloat16(), BOUNDS))
    got.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_compiled_with_its_backward_for_any_bounds():
    """One graph, in which the loop over groups is one op."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(lambda x, w, b: grouped_linear(x, w, b).square().sum(), fullgraph=True, backend=backend)
    x, weight = _operands(torch.float64)
    for bounds in (BOUNDS, torch.tensor([0, 0, 5, 8], dtype=torch.int32)):
        got = torch.autograd.grad(run(x, weight, bounds), (x, weight))
        want = torch.autograd.grad(grouped_linear_ref(x, weight, bounds).square().sum(), (x, weight))
        torch.testing.assert_close(got, want)
    assert len(graphs) == 1


def test_inference_in_bf16_takes_the_products_of_few_rows():
    """A token a group, as in decoding: sums in float32, rounded once, which a product of another form need not be."""
    x, weight = (t.detach() for t in _operands(torch.bfloat16))
    with torch.no_grad():
        got = grouped_linear(x[:7], weight, BOUNDS)
    want = torch.cat([x[:2].float() @ weight[0].float().T, x[2:7].float() @ weight[2].float().T])
    torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=2**-9)


def test_second_derivatives_are_those_of_the_formula():
    x, weight = _operands(torch.float64)
    with use_backend(grouped_linear="eager"):
        assert torch.autograd.gradgradcheck(lambda x, w: grouped_linear(x, w, BOUNDS), (x, weight))
