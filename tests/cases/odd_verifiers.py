"""Verifiers that return what no verifier should, for every other reply; `verdicts.py` asks them."""

from tulu_mega.rewards.verdict import Verdict


def nan_verdict(response, ground_truth, *, messages=None):
    return Verdict(float("nan")) if len(response) % 2 else Verdict(1.0)


def inf_verdict(response, ground_truth, *, messages=None):
    return Verdict(float("inf")) if len(response) % 2 else Verdict(1.0)


def nan_float(response, ground_truth, *, messages=None):
    return float("nan") if len(response) % 2 else 1.0


def numpy_float(response, ground_truth, *, messages=None):
    import numpy as np

    return np.float32(len(response) % 2)


def torch_float(response, ground_truth, *, messages=None):
    import torch

    return torch.tensor(1.0)


def str_verdict(response, ground_truth, *, messages=None):
    return Verdict("1.0")
