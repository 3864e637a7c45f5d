r"""How much importance-sampled times lower the variance of the likelihood-weighted gradient, on the digits' network.

    python benchmarks/gradient_variance.py                     # a few minutes on one thread
    python benchmarks/gradient_variance.py --sdes vp --train 0 # at the initial weights

With w(t) = (T - t_min) g^2 / (2 sigma^2), the ELBO's weighting in nats per dimension, a sample drawn at t ~ q has the gradient
g = w(t) / ((T - t_min) q(t)) grad l, l = |eps - eps_hat|^2 / D. All q have the same mean of g; the trace of its covariance is
M_q - |mean|^2 with

    (1)  M_q = E_q |g|^2 = integral of (w / (T - t_min))^2 G / q dt,      G(t) = E |grad l|^2

and a batch of B independent samples has this by B. With q uniform (1) is the mean of w^2 G, in which w^2 is about 1/t^2:
its mean lies at t near t_min, where a uniform draw hardly ever falls, so that the variance over some hundred batches misses
most of it. Hence (1) is computed for every q from the same gradients of single samples, at times stratified in log_snr:

    uniform      q = 1/(T - t_min)
    importance   q proportional to w: `ImportanceTime` (Song et al. 2021, arXiv:2101.09258, section 5.1)
    optimal      q proportional to w sqrt(G), G by bins of log_snr: the least that any q can have

The errors of these are a jackknife's over interleaved parts. Below them stands what `--batches` whole batches show, with
independent and with stratified times; its error is the spread of |g - mean|^2. The network is trained by the digits' own
recipe for `--train` steps, and averaged; then it is fixed.
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

# a folder here has the name of a package, and a script's own folder comes first
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import torch
from tqdm.auto import tqdm

from numerics import SampleStreams, normal
from training import DSM, ELBO, Callback, ImportanceTime, StratifiedTime, UniformTime, train
from training.batches import Batches
from training.streams import StepStreams
from workflow.configuration import config_for
from workflow.setup import resolve

SAMPLERS = {
    "uniform": UniformTime(),
    "uniform, stratified": StratifiedTime(),
    "importance": ImportanceTime(stratified=False),
    "importance, stratified": ImportanceTime(),
}
PARTS, BINS = 16, 32


class Keep(Callback):
    def on_step(self, state):
        self.state = state


def network(name, steps):
    """(model, batches of 128): after `steps` of the recipe, with the averaged weights."""
    setup, keep = resolve(config_for(name)), Keep()
    model, data = setup.model, setup.training_data
    if steps:
        options = dataclasses.replace(setup.options, steps=steps, eval_every=0, checkpoint_every=0)
        train(model, data, setup.transform, options, objective=setup.objective, callbacks=[keep])
        model.load_state_dict({**model.state_dict(), **keep.state.ema.weights()})
    return model.train(), Batches(data, setup.transform, batch_size=128, seed=1)


def gradient(model, losses):
    """The gradient of the mean loss, one vector."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), parameters)])


def singles(model, batches, n, t_min):
    """(log_snr, density of a uniform and of an importance draw, w, |grad l|^2), each `(n,)`, and the mean of g."""
    sde = model.sde
    times, one = ImportanceTime(), ELBO(t_min=t_min)
    t, _ = times(sde, n, torch.Generator().manual_seed(0), t_min)
    t = t[torch.randperm(n, generator=torch.Generator().manual_seed(1))]  # images in any order of times
    w, importance = one(sde, t), times.density(sde, t, t_min)
    per_batch, squares, total = batches.shape[0], [], 0.0
    for i in tqdm(range(n), desc="single gradients", unit="sample", mininterval=2):
        if i % per_batch == 0:
            x_0 = batches(i // per_batch).x_0
        x = x_0[i % per_batch : i % per_batch + 1]
        eps = normal(x.shape, SampleStreams(0, [i]), dtype=x.dtype)
        error = eps - model.noise(sde.perturb(x, t[i : i + 1], eps), t[i : i + 1])
        g = gradient(model, error.square().mean())
        squares.append(float(g.double().square().sum()))
        total = total + float(w[i] / ((sde.T - t_min) * importance[i])) / n * g.double()
    return sde.log_snr(t), UniformTime().density(sde, t, t_min), importance, w, torch.tensor(squares).double(), total


def second_moments(level, uniform, importance, w, square, span):
    """M_q of (1) for the three q, from draws of the importance density."""
    edge = torch.linspace(float(level.min()), float(level.max()), BINS + 1, dtype=level.dtype)[1:-1]
    index = torch.bucketize(level, edge)
    count = torch.bincount(index, minlength=BINS).clamp(min=1)
    G = torch.zeros(BINS, dtype=level.dtype).index_add(0, index, square) / count
    moment = (w / span).square() * square / importance
    return {
        "uniform": float((moment / uniform).mean()),
        "importance": float((moment / importance).mean()),
        "optimal": float((w / span * G[index].sqrt() / importance).mean().square()),
    }


def jackknife(values, compute):
    """(what `compute` makes of all samples, its standard error), over interleaved parts."""
    n, order = len(values[0]), torch.argsort(values[0])
    part = torch.empty(n, dtype=torch.long)
    part[order] = torch.arange(n) % PARTS
    whole = compute(*values)
    left = [compute(*(v[part != k] for v in values)) for k in range(PARTS)]
    errors = {}
    for key in whole:
        each = torch.tensor([one[key] for one in left])
        errors[key] = math.sqrt((PARTS - 1) / PARTS * float((each - each.mean()).square().sum()))
    return whole, errors


def batch_variance(model, batches, times, n, t_min):
    """(trace of the covariance of a step's gradient, its standard error) from `n` batches; that of the loss."""
    objective, gradients, losses = DSM(weighting=ELBO(t_min=t_min), times=times, t_min=t_min), [], []
    for step in tqdm(range(n), desc=str(times), unit="batch", mininterval=2):
        x_0 = batches(step).x_0
        draws = objective.draw(model.sde, x_0.shape, StepStreams(2, step))
        loss = objective.loss(model, x_0, draws, None) * draws["weight"].float()
        gradients.append(gradient(model, loss))
        losses.append(float(loss.detach().mean()))
    g = torch.stack(gradients).double()
    squares = (g - g.mean(dim=0)).square().sum(dim=1) * n / (n - 1)
    return float(squares.mean()), float(squares.std() / math.sqrt(n)), float(torch.tensor(losses).var())


def measure(name, args):
    model, batches = network(name, args.train)
    t_min = args.t_min or model.sde.t_min
    *values, total = singles(model, batches, args.samples, t_min)
    span, B = model.sde.T - t_min, batches.shape[0]
    # |mean|^2, less what the noise of its estimate adds
    noise = float((values[3] / span / values[2]).square().mul(values[4]).mean())
    mean = max(0.0, (float(total.square().sum()) - noise / args.samples) / (1 - 1 / args.samples))

    def compute(*parts):
        found = {key: (M - mean) / B for key, M in second_moments(*parts, span).items()}
        return {**found, "ratio": found["uniform"] / found["importance"]}

    whole, errors = jackknife(values, compute)
    print(f"\n{name}: {model.sde}; {args.train} training steps, t_min {t_min:g}, {args.samples} single gradients")
    print(f"trace of the covariance of a step's gradient, batch {B}, independent times; |mean|^2 = {mean:.3g}")
    for key in ("uniform", "importance", "optimal"):
        print(f"  {key:24s} {whole[key]:.3g} ± {errors[key]:.2g}")
    print(f"  uniform / importance     {whole['ratio']:.3g} ± {errors['ratio']:.2g}")
    result = {"quadrature": whole, "errors": errors, "mean_square": mean, "batches": {}}
    for key, times in SAMPLERS.items() if args.batches else ():
        variance, error, loss = batch_variance(model, batches, times, args.batches, t_min)
        print(
            f"  {key:24s} {variance:.3g} ± {error:.2g} over {args.batches} batches; of the loss {loss:.3g}", flush=True
        )
        result["batches"][key] = {"variance": variance, "stderr": error, "loss_variance": loss}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdes", default="vp,sub_vp", help=f"comma-separated, of {', '.join(('vp', 'sub_vp'))}")
    parser.add_argument("--train", type=int, default=400, help="training steps before the measurement")
    parser.add_argument("--samples", type=int, default=2048, help="single gradients")
    parser.add_argument("--batches", type=int, default=60, help="whole batches for each sampler")
    parser.add_argument("--t-min", type=float, default=0.0, help="0 for the SDE's own")
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(name, args) for name in args.sdes.split(",")}
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
