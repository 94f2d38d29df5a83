"""Eight schools (Rubin 1981): how much coaching raised test scores, and how much schools differ.

Run it:             python examples/eight_schools.py
From the shell:     vi-flows fit examples/eight_schools.py:model --data examples/eight_schools.json
"""

import pyro
import pyro.distributions as dist
import torch

import vi_flows as vf

# estimated effect of coaching in each school, and the standard error of the estimate
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))  # mean effect
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))  # spread between schools
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)  # effect of each school
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


if __name__ == "__main__":
    posterior = vf.fit(model, y, sigma)

    print(posterior.summary().round(2))
    print(posterior.describe())

    draws = posterior.sample(4000, seed=1)  # a dict of named tensors
    best = (draws["theta"].argmax(-1) == 0).double().mean()
    print(f"probability that coaching works best in the first school: {best:.2f}")
