"""FlowDistribution as Pyro's: sampling, SVI, plates, expand, transforms, values of any shape, nothing stale."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO

from vi_flows.flows import recipes
from vi_flows.flows.bases import Mixture


@pytest.fixture(autouse=True)
def clean_store():
    pyro.clear_param_store()


def bent(context=None, name="spline", dim=2):
    """A flow that is not the identity."""
    flow = getattr(recipes, name)(dim, context).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return flow


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["spline", "planar", "iaf"])
def test_guide_of_svi(name):
    """As a guide under Trace_ELBO the loss falls towards −log Z = 0."""
    flow = getattr(recipes, name)(2)
    target = dist.MultivariateNormal(torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.8], [0.8, 2.0]]))

    def model():
        pyro.sample("x", target)

    def guide():
        pyro.module("flow", flow)
        pyro.sample("x", flow())

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(num_particles=8))
    losses = [svi.step() for _ in range(80)]
    assert sum(losses[-10:]) / 10 < 0.3 * sum(losses[:3]) / 3


def test_plate_of_local_latents():
    """A context per datum: event (dim,), batch shape from the context, one independent draw for each member."""
    flow = recipes.realnvp(2, 3)
    context = torch.randn(5, 3)

    def model():
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def guide():
        pyro.module("flow", flow)
        with pyro.plate("data", 5):
            return pyro.sample("z", flow(context))

    trace = pyro.poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (5, 2)
    assert trace.nodes["z"]["log_prob"].shape == (5,)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    assert all(abs(svi.step()) < 100 for _ in range(3))


def test_plate_expands_an_own_flow():
    """Without context, a plate expands the flow to independent draws."""
    flow = bent()
    with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 3, dim=-1):
        z = pyro.sample("z", flow())
    assert z.shape == (4, 3, 2)
    assert len(z.reshape(-1, 2).unique(dim=0)) == 12


def test_shapes_and_support():
    q = bent(3)(torch.randn(2, 4, 3).double())
    assert (q.batch_shape, q.event_shape, q.has_rsample) == ((2, 4), (2,), True)
    assert q.support is constraints.real_vector or q.support.event_dim == 1
    x, log_q = q.rsample_and_log_prob((5,))
    assert x.shape == (5, 2, 4, 2) and log_q.shape == (5, 2, 4)
    assert q.shape((5,)) == (5, 2, 4, 2)


def test_expand():
    flow, context = bent(3), torch.randn(4, 3).double()
    q = flow(context)
    wide = q.expand((6, 4))
    x = torch.randn(2).double()
    assert wide.batch_shape == (6, 4) and wide.rsample((2,)).shape == (2, 6, 4, 2)
    close(wide.log_prob(x), q.log_prob(x).expand(6, 4))
    for wrong in ((3,), (4, 3), ()):
        with pytest.raises(ValueError, match=r"^batch_shape: \(4,\) does not expand to [^\n]*$"):
            q.expand(wrong)


def test_log_prob_broadcasts_values():
    """Values of fewer or more batch axes than the context, and of size 1."""
    flow, context = bent(3), torch.randn(2, 4, 3).double()
    q = flow(context)
    for shape in ((2,), (4, 2), (2, 1, 2), (5, 1, 1, 2), (5, 2, 4, 2)):
        x = torch.randn(shape).double()
        full = x.expand(torch.broadcast_shapes(shape, (2, 4, 2)))
        expected = torch.stack(
            [flow(context[i, j]).log_prob(full[..., i, j, :]) for i in range(2) for j in range(4)], -1
        )
        close(q.log_prob(x), expected.unflatten(-1, (2, 4)))


@pytest.mark.parametrize("shape", [(), (3,), (4, 1)])
def test_wrong_values(shape):
    with pytest.raises(ValueError, match=r"^value: expected shape \(..., 2\), got [^\n]*$"):
        bent()().log_prob(torch.zeros(shape).double())


def test_values_that_do_not_broadcast():
    q = bent(3)(torch.randn(4, 3).double())
    with pytest.raises(ValueError, match=r"^value: [^\n]*\(3,\)[^\n]*\(4,\)[^\n]*$"):
        q.log_prob(torch.zeros(3, 2).double())


@pytest.mark.parametrize("name", recipes.__all__)
def test_wrong_contexts(name):
    own, amortized = getattr(recipes, name)(2), getattr(recipes, name)(2, 3)
    for flow, context in (
        (own, torch.zeros(3)),
        (amortized, None),
        (amortized, torch.zeros(4)),
        (amortized, torch.zeros(())),
    ):
        with pytest.raises(ValueError, match=r"^context: expected [^\n]*$"):
            flow(context)


@pytest.mark.parametrize("context", [None, 3])
def test_transformed_distribution(context):
    """A chain of as_transform() over the base's distribution is the flow, also with exp at its end."""
    flow = bent(context)
    q = flow(None if context is None else torch.randn(context).double())
    base = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
    chained = dist.TransformedDistribution(base, [q.as_transform()])
    x = torch.randn(7, 2).double()
    close(chained.log_prob(x), q.log_prob(x))
    z, transform = torch.randn(7, 2).double(), q.as_transform()
    close(transform.inv(transform(z)), z)
    close(transform.log_abs_det_jacobian(z, transform(z)), -transform.inv.log_abs_det_jacobian(transform(z), z))
    positive = dist.TransformedDistribution(q, [dist.transforms.ExpTransform()])
    close(positive.log_prob(x.exp()), q.log_prob(x) - x.sum(-1))
    both = dist.TransformedDistribution(base, [q.as_transform(), dist.transforms.ExpTransform()])
    draw = both.rsample((5,))
    assert draw.shape == (5, 2) and (draw > 0).all()
    close(both.log_prob(draw), positive.log_prob(draw))


def test_two_flows_in_a_chain():
    first, second = bent(name="planar"), bent(name="realnvp")
    base = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
    chained = dist.TransformedDistribution(base, [first().as_transform(), second().as_transform()])
    x = torch.randn(7, 2).double()
    close(chained.log_prob(x), first.then(*second.layers)().log_prob(x))


def test_nothing_is_stale_after_a_step():
    """A draw scored after an optimizer step, by a new distribution, is scored by the new parameters."""
    flow = bent()
    q = flow()
    x = q.rsample((4,))
    before = q.log_prob(x)
    optimizer = torch.optim.SGD(flow.parameters(), 0.1)
    (before + x.square().sum(-1)).mean().backward()
    optimizer.step()
    after = flow().log_prob(x.detach())
    assert (after - before).abs().max() > 1e-4
    close(after, copy.deepcopy(flow)().log_prob(x.detach().clone()))


def test_nothing_is_stale_after_an_edit():
    """x changed in place is not the tensor that was drawn."""
    flow = bent()
    with torch.no_grad():
        q = flow()
    with torch.enable_grad():
        x = q.rsample((4,))
        with torch.no_grad():
            x.add_(1.0)
        close(q.log_prob(x), flow().log_prob(x.detach().clone()))


def test_nothing_is_stale_after_a_second_draw():
    q = bent()()
    first, second = q.rsample((3,)), q.rsample((3,))
    close(q.log_prob(first), q.log_prob(first.clone()))
    close(q.log_prob(second), q.log_prob(second.clone()))


def test_drawn_without_graph_scored_with_one():
    flow = bent()
    q = flow()
    with torch.no_grad():
        x = q.rsample((4,))
    log_q = q.log_prob(x)
    assert log_q.requires_grad
    assert all(g is not None for g in torch.autograd.grad(log_q.sum(), list(flow.parameters())))


def test_sample_has_no_graph():
    q = bent()()
    assert not q.sample((4,)).requires_grad
    assert q.rsample((4,)).requires_grad


def test_then_is_a_copy():
    flow = bent()
    longer = flow.then(*recipes.diagonal(2).double().layers)
    assert len(longer.layers) == len(flow.layers) + 1
    assert not {id(p) for p in flow.parameters()} & {id(p) for p in longer.parameters()}


def test_mixture_base_with_batch_shape():
    """Strata run over all draws of a batch, shuffled, so that each member's draws are a fair sample."""
    base = Mixture(torch.tensor([[-5.0, 0.0], [5.0, 0.0]]), 0.1)
    flow = recipes.diagonal(2, 3, base=base)
    x = flow(torch.randn(40, 3)).sample((200,))
    right = (x[..., 0] > 0).double()
    assert abs(right.mean() - 0.5) < 1e-3
    assert 0.25 < right.mean(0).min() < right.mean(0).max() < 0.75


def test_a_wider_dtype_than_the_flows_is_refused():
    """A float32 flow would score float64 values with float32 errors, in a float64 tensor."""
    flow = recipes.planar(2, context=1)
    context = torch.zeros(1)
    with pytest.raises(ValueError, match=r"value: expected torch\.float32"):
        flow(context).log_prob(torch.zeros(2).double())
    with pytest.raises(ValueError, match=r"context: expected torch\.float32"):
        flow(context.double())
    assert flow.double()(context).log_prob(torch.zeros(2)).dtype == torch.float64
