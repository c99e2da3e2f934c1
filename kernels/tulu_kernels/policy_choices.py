"""What a policy loss may be made of, by name; `policy_loss` says what each is. Loads without torch, for who reads settings."""

from __future__ import annotations

from typing import Literal

Surrogate = Literal["grpo", "dapo", "cispo", "gspo"]
Aggregation = Literal["token", "sequence", "constant"]
Divergence = Literal["k1", "k2", "k3"]
Importance = Literal["none", "token", "sequence"]
