"""FedAvg with Apple's pfl-research: FederatedAveraging on a SimulatedBackend in one process, as its tutorials have it.

It runs in the environment that `benchmarks.environments.pfl` makes. What pfl decides, and the other programs do not:
Adam starts anew in each round, as pfl makes an optimiser for a user's round and keeps none; where not all clients take
part, they take turns; and the averaged model, the same for all, is measured once and not by each client. Its datasets
cut a user's batches once for all epochs, so `Items` shuffles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics, StringMetricName, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Generator, Tensor, nn

from benchmarks.references.dscmr import DSCMR, mean_average_precision
from benchmarks.references.job import Data, Job, load, say


class Model(nn.Module):
    """The network as pfl asks for one: with the loss of a batch, and what is to be measured on one."""

    def __init__(self, job: Job, data: Data) -> None:
        super().__init__()
        image, text, _ = data.train
        self.network = DSCMR(image.shape[1], text.shape[1], job.hidden, job.width, data.classes)
        self.lambda_, self.eta = job.lambda_, job.eta

    def loss(self, image: Tensor, text: Tensor, classes: Tensor) -> Tensor:
        """DSCMR's objective."""
        return self.network.loss(image, text, classes, self.lambda_, self.eta)

    def metrics(self, image: Tensor, text: Tensor, classes: Tensor) -> dict[str, Weighted]:  # noqa: ARG002
        """Nothing: `Validation` measures."""
        return {}


class Items(PyTorchTensorDataset):
    """A client's items of the one set of features, in batches that are drawn anew in every epoch."""

    def __init__(self, items: Tensor, data: Data, rng: Generator) -> None:
        super().__init__((items,))
        self.items, self.data, self.rng = items, data, rng

    def iter(self, batch_size: int | None) -> Iterator[list[Tensor]]:
        """Batches of (image, text, classes); None: one of all."""
        order = self.items[torch.randperm(len(self.items), generator=self.rng)]
        for batch in order.split(batch_size or len(order)):
            yield [values[batch] for values in self.data.train]


class Validation(TrainingProcessCallback[PyTorchModel]):
    """mAP of the averaged model every so many rounds and after the last.

    pfl's own CentralEvaluationCallback counts rounds from 0, leaves that one out and may leave the last one out.
    """

    def __init__(self, job: Job, data: Data) -> None:
        self.job, self.data, self.score = job, data, math.nan

    def after_central_iteration(
        self,
        aggregate_metrics: Metrics,  # noqa: ARG002 - pfl gives it by name
        model: PyTorchModel,
        *,
        central_iteration: int,
    ) -> tuple[bool, Metrics]:
        """Never stops the training."""
        rounds, every = central_iteration + 1, self.job.evaluate_every
        if not every or (rounds % every and rounds < self.job.rounds):
            return False, Metrics()
        self.score = mean_average_precision(model.pytorch_model.network, *self.data.validation)
        return False, Metrics([(StringMetricName("validation mAP"), self.score)])


def main() -> None:
    """Run the job."""
    job = Job.from_command_line()
    if job.strategy != "fedavg":
        raise ValueError(f"strategy: expected fedavg, got {job.strategy}")
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    np.random.seed(job.seed)  # pfl's own draws
    data = load(job)
    users = {
        number: Items(items, data, Generator().manual_seed(hash((job.seed, number))))
        for number, items in enumerate(data.parts)
    }
    dataset = FederatedDataset(users.__getitem__, MinimizeReuseUserSampler(list(users)))
    model, validation = Model(job, data), Validation(job, data)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=job.rounds,
            evaluation_frequency=job.rounds,
            train_cohort_size=job.sample or job.clients,
            val_cohort_size=None,
        ),
        SimulatedBackend(dataset, dataset, [WeightByDatapoints()]),
        PyTorchModel(
            model,
            functools.partial(torch.optim.Adam, betas=job.betas, fused=True),
            torch.optim.SGD(model.parameters(), lr=1.0),  # the mean of the clients' models takes the model's place
        ),
        NNTrainHyperParams(local_batch_size=job.batch_size, local_num_epochs=job.epochs, local_learning_rate=job.lr),
        callbacks=[validation],
    )
    say(validation.score)


if __name__ == "__main__":
    main()
