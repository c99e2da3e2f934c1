"""`tulu-mega data inspect`: what a run would train on, before it does."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tulu_mega.config import DataInspectSettings
from tulu_mega.data.loader import PackedLoader
from tulu_mega.data.prepare import prepare
from tulu_mega.data.store import TokenStore
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.data.tools.inspect_views import print_inspection, write_page
from tulu_mega.data.tools.inspection import Inspection, Lengths, Packing, Sample
from tulu_mega.data.tools.row_kind import of_its_kind
from tulu_mega.layout.cost import sequence_flops
from tulu_mega.layout.packing_rules import pack_alignment, pipeline_of
from tulu_mega.model.hf_config import load_config
from tulu_mega.records import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BINS = 20
_REJECTS = 20


def inspect(settings: DataInspectSettings) -> None:
    """Tokenises the data (or takes it from ``data.cache``), prints what is in it, and writes the page that is asked for.

    Raises:
        UserError: data, tokenizer or model are not to be used, or the layout cannot pack a step.
    """
    settings = of_its_kind(settings)
    with tempfile.TemporaryDirectory() as scratch:
        store = prepare(settings.data, settings.model, Path(scratch) / "data")
        found = look(settings, store, load_config(settings.model).to_dict())
    print_inspection(found)
    if settings.html is not None:
        write_page(found, Path(settings.html).expanduser())


def look(settings: DataInspectSettings, store: TokenStore, config: Mapping[str, Any]) -> Inspection:
    """
    Args:
        config: the model's config.json.
    """
    data, model = settings.data, settings.model
    tokenizer = load_tokenizer(model.path, data.tokenizer, data.template, model.trust_remote_code)
    used = np.bincount(store.origins[:: store.width, 0], minlength=len(store.sources))
    tokens = np.bincount(store.origins[:, 0], weights=store.lengths, minlength=len(store.sources))
    rows = dict.fromkeys(np.linspace(0, len(store) // store.width - 1, settings.rows).astype(int).tolist())
    return Inspection(
        model=model.path,
        template=store.template,
        told=store.told,
        max_length=data.max_length,
        sources=[
            {**source, "used": int(rows), "tokens": int(size)}
            for source, rows, size in zip(store.sources, used, tokens, strict=True)
        ],
        rejected=store.rejected,
        rejects=list(islice(dict.fromkeys(store.rejects()), _REJECTS)),
        truncated=int(np.count_nonzero(store.cuts)),
        cut=int(store.cuts.sum()),
        lengths=_lengths(store),
        packing=_packing(settings, store, config),
        samples=[_sample(store, row * store.width + side, tokenizer) for row in rows for side in range(store.width)],
    )


def _lengths(store: TokenStore) -> Lengths:
    lengths = store.lengths
    named = {"least": 0, "5 %": 5, "median": 50, "95 %": 95, "99 %": 99, "most": 100}
    quantiles = dict(zip(named, np.percentile(lengths, list(named.values())).tolist(), strict=True))
    width = max(1, -(-int(lengths.max()) // _BINS))
    counts = np.bincount((lengths - 1) // width)
    return Lengths(
        rows=len(store) // store.width,
        tokens=int(lengths.sum()),
        trained=int(store.supervised.sum()),
        quantiles={**quantiles, "mean": float(lengths.mean())},
        histogram=[
            (number * width + 1, min((number + 1) * width, int(lengths.max())), count)
            for number, count in enumerate(counts.tolist())
        ],
    )


def _packing(settings: DataInspectSettings, store: TokenStore, config: Mapping[str, Any]) -> Packing:
    parallel, replicas = settings.parallel, settings.parallel.data or 1
    cost = sequence_flops(config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"], config["vocab_size"])
    loader = PackedLoader(
        store,
        settings.train,
        settings.data,
        settings.seed,
        pack_alignment(settings),
        data_parallel_rank=0,
        data_parallel_size=replicas,
        cost=cost,
        pipeline=pipeline_of(config, settings),
    )
    sampled = np.unique(np.linspace(0, loader.steps - 1, min(settings.plan_steps, loader.steps)).astype(int)).tolist()
    steps = [loader.batches(step) for step in sampled]
    each = [len(step.micro_batches) for step in steps]
    computed, real = sum(step.packed_tokens for step in steps), sum(step.tokens for step in steps)
    efficiencies = [step.schedule_efficiency for step in steps]
    return Packing(
        layout=f"data {replicas} · tensor {parallel.tensor} · pipeline {parallel.pipeline} · context {parallel.context}",
        steps=loader.steps,
        sampled=len(sampled),
        capacity=settings.data.pack_length or settings.data.max_length * store.width,
        micro_batches=(min(each), sum(each) / len(each), max(each)),
        sequences=sum(step.sequences for step in steps) / (replicas * sum(each)),
        padding=(1 - real / computed, max(step.padding for step in steps)),
        balance=(sum(efficiencies) / len(efficiencies), min(efficiencies)),
    )


def _sample(store: TokenStore, row: int, tokenizer: PreTrainedTokenizerFast) -> Sample:
    sequence = store[row]
    pairs = zip(sequence.input_ids, sequence.labels, strict=True)
    runs = [(trained, [token for token, _ in run]) for trained, run in groupby(pairs, lambda pair: pair[1] != IGNORE)]
    side = f", {('chosen', 'rejected')[row % 2]}" if store.width == 2 else ""
    return Sample(
        where=store.where(row) + side,
        tokens=len(sequence.input_ids),
        trained=int(store.supervised[row]),
        cut=int(store.cuts[row]),
        pieces=[(tokenizer.decode(run, clean_up_tokenization_spaces=False), trained) for trained, run in runs],
    )
