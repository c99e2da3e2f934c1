"""Verifiers: rules that score a response against a ground truth. Importable without torch."""

from tulu_mega.rewards.pool import VerifierPool
from tulu_mega.rewards.registry import Judge, RewardSpec, check_rows
from tulu_mega.rewards.sandbox import CodeLimits
from tulu_mega.rewards.verdict import Verdict, Verifier, VerifierInput

__all__ = ["CodeLimits", "Judge", "RewardSpec", "Verdict", "Verifier", "VerifierInput", "VerifierPool", "check_rows"]
