"""The floor: the same training in a plain loop, in this process, with nothing around it.

It draws what fedxmr draws, so at one thread both end with the same parameters up to the order in which sums are taken;
the test of the benchmarks compares them. FedCMR's stages are those of Zong et al., SIGIR 2021, Algorithm 1.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor
from torch.optim.adam import adam

from benchmarks.references.dscmr import DSCMR, mean_average_precision
from benchmarks.references.job import Data, Job, load, say

COMMON = ("common.weight", "common.bias")
ALPHA, GAMMA, JOINT = 20.0, 0.5, 0.8
"""FedCMR's, as fedxmr has them by default."""


@dataclass
class Client:
    """What a client keeps: its network, Adam's moments, and what of its last round waits for the next."""

    number: int
    items: Tensor
    model: DSCMR
    moments: tuple[list[Tensor], list[Tensor], list[Tensor]] = field(init=False)
    before: dict[str, Tensor] = field(default_factory=dict)
    held_back: Tensor | None = None
    round: int = 0

    def __post_init__(self) -> None:
        parameters = list(self.model.parameters())
        means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        self.moments = means, squares, [torch.zeros(()) for _ in parameters]


class Federation:
    """A job's clients, as far as they have taken part, and what they share."""

    def __init__(self, job: Job, data: Data) -> None:
        self.job, self.data = job, data
        self.joint = JOINT if job.strategy == "fedcmr" else 1.0
        self.clients: dict[int, Client] = {}
        self.initial = self._drawn()
        self.shared = {name: self.initial[name] for name in self._shared_names()}

    def run(self) -> float:
        """All rounds; the mean validation mAP of the last round's models, NaN where it is never measured."""
        job, score = self.job, math.nan
        for round in range(1, job.rounds + 1):
            chosen = [self._client(k) for k in self._sampled(round)]
            losses = []
            for client in chosen:
                self._take_over(client)
                if round > 1 and job.evaluate_every and (round - 1) % job.evaluate_every == 0:
                    self._measure(client)
                losses.append(self._train(client, round))
            self._combine(chosen, torch.tensor(losses, dtype=torch.float64))
        for client in self.clients.values():
            self._take_over(client)
        if job.evaluate_every:
            scores = [self._measure(client) for client in list(self.clients.values())[:20]]
            score = sum(scores) / len(scores)
        return score

    def _take_over(self, client: Client) -> None:
        """Replace what is shared; in FedCMR go on along the own change, eq. 6, and enhance on what was held back."""
        own = dict(client.model.named_parameters())
        with torch.no_grad():
            for name, new in self.shared.items():
                if self.job.strategy == "fedcmr" and client.before:
                    own[name].copy_(new + GAMMA * (own[name] - client.before[name]))
                else:
                    own[name].copy_(new)
        if client.held_back is not None and len(client.held_back):
            self._fit(client, client.held_back, _generator(self.job.seed, "enhancement", client.round, client.number))
        client.held_back = None

    def _train(self, client: Client, round: int) -> float:
        """The joint stage; its mean loss per item."""
        if self.job.strategy == "fedcmr":
            client.before = {name: p.detach().clone() for name, p in client.model.named_parameters() if name in COMMON}
        n = len(client.items)
        drawn = torch.randperm(n, generator=_generator(self.job.seed, "division", round, client.number))
        joint = math.ceil(self.joint * n)
        client.round, client.held_back = round, client.items[drawn[joint:].sort().values]
        items = client.items[drawn[:joint].sort().values]
        return self._fit(client, items, _generator(self.job.seed, "joint", round, client.number))

    def _fit(self, client: Client, items: Tensor, rng: Generator) -> float:
        """Epochs of batches of items, which are drawn by index from the one set of features."""
        job, model = self.job, client.model
        image, text, classes = self.data.train
        parameters: list[Tensor] = list(model.parameters())
        total = torch.zeros((), dtype=torch.float64)
        for _ in range(job.epochs):
            for batch in torch.split(items[torch.randperm(len(items), generator=rng)], job.batch_size):
                loss = model.loss(image[batch], text[batch], classes[batch], job.lambda_, job.eta)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach() * len(batch)
                _step(parameters, client.moments, job)
        return float(total) / (job.epochs * len(items))

    def _combine(self, chosen: list[Client], losses: Tensor) -> None:
        n = torch.tensor([len(client.items) for client in chosen], dtype=torch.float64)
        weights = n / n.sum()
        if self.job.strategy == "fedcmr":  # eq. 3 to 5
            seen = [len(set(self.data.train[2][client.items].tolist())) for client in chosen]
            classes = torch.tensor(seen, dtype=torch.float64)
            size = weights * classes / classes.sum()
            weights = torch.softmax(size + ALPHA * torch.exp(-torch.exp(losses / losses.mean())), 0)
        models = [dict(client.model.named_parameters()) for client in chosen]
        with torch.no_grad():
            for name in self.shared:
                total = torch.zeros_like(self.shared[name], dtype=torch.float64)
                for model, weight in zip(models, weights, strict=True):
                    total += weight * model[name].double()
                self.shared[name] = total.float()

    def _measure(self, client: Client) -> float:
        return mean_average_precision(client.model, *self.data.validation)

    def _sampled(self, round: int) -> list[int]:
        clients, sample = self.job.clients, self.job.sample
        if sample is None:
            return list(range(clients))
        drawn = torch.randperm(clients, generator=_generator(self.job.seed, "sample", round))[:sample]
        return sorted(drawn.tolist())

    def _client(self, number: int) -> Client:
        if number not in self.clients:
            model = self._network()
            model.load_state_dict(self.initial)
            self.clients[number] = Client(number, self.data.parts[number], model)
        return self.clients[number]

    def _network(self) -> DSCMR:
        job, (image, text, _) = self.job, self.data.train
        with torch.device("meta"):
            model = DSCMR(image.shape[1], text.shape[1], job.hidden, job.width, self.data.classes)
        return model.to_empty(device="cpu")

    def _drawn(self) -> dict[str, Tensor]:
        """The initial weights: as nn.Linear draws them, in the order of the layers."""
        rng = _generator(self.job.seed, "initial")
        state = self._network().state_dict()
        for layer in ("towers.image", "towers.text", "common", "classifier"):
            bound = state[f"{layer}.weight"].shape[1] ** -0.5
            for kind in ("weight", "bias"):
                state[f"{layer}.{kind}"].uniform_(-bound, bound, generator=rng)
        return state

    def _shared_names(self) -> list[str]:
        return list(COMMON) if self.job.strategy == "fedcmr" else list(self.initial)


def _step(parameters: list[Tensor], moments: tuple[list[Tensor], list[Tensor], list[Tensor]], job: Job) -> None:
    """Adam, fused: torch.optim's class does the same, but its first import takes as long as a hundred steps."""
    means, squares, steps = moments
    beta1, beta2 = job.betas
    with torch.no_grad():
        adam(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            means,
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=job.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
    for p in parameters:
        p.grad = None


def _generator(seed: int, purpose: str, round: int = 0, client: int = 0) -> Generator:
    digest = hashlib.sha256(f"{seed}/{purpose}/{round}/{client}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def main() -> None:
    """Run the job."""
    job = Job.from_command_line()
    torch.set_num_threads(job.threads)
    say(Federation(job, load(job)).run())


if __name__ == "__main__":
    main()
