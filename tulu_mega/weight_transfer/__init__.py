"""A trainer's weights to vLLM servers: protocol, ledger, both ends of every transport."""
