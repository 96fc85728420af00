"""Federated learning for cross-modal retrieval: FedCMR, FedAvg and FedProx, simulated or between institutions."""

__version__ = "0.1.0"
