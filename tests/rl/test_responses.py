"""Responses of several segments, trained and untrained in turn: masks, labels, values by token, packs, prefixes, figures."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from tulu_mega.config import EngineSettings, RewardSettings
from tulu_mega.data.prompts import Prompt
from tulu_mega.objectives.advantages import ESTIMATORS
from tulu_mega.quickstart import tiny_model
from tulu_mega.records import IGNORE, PackedBatch, Response, Segment
from tulu_mega.rewards.verdict import Verdict
from tulu_mega.rl import journal
from tulu_mega.rl.batches import Compared, TrainedResponse, differences, effective_share, packed
from tulu_mega.rl.judging import JudgedResponse, Rewards
from tulu_mega.rl.rollouts import Group, StepRollouts

HF = LlamaConfig(
    architectures=["LlamaForCausalLM"], hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
token = st.integers(0, 499)
drawn_segments = st.lists(st.tuples(st.booleans(), st.lists(token, min_size=1, max_size=6)), min_size=1, max_size=5)
drawn_groups = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.lists(drawn_segments, min_size=1, max_size=4)),
    min_size=1,
    max_size=5,
)


def segment(trained: bool, ids: list[int], logp: float = -1.0) -> Segment:
    return Segment(ids, True, [logp - at / 8 for at in range(len(ids))], [3] * len(ids)) if trained else Segment(ids, False)


def responses_of(groups) -> list[TrainedResponse]:
    """Responses to prompts of few kinds of tokens, so that neighbours happen to begin alike too."""
    made = []
    for prompt, several in groups:
        for number, parts in enumerate(several):
            segments = [segment(trained, ids, -1.0 - number) for trained, ids in parts]
            response = Response((segment(False, prompt), *segments), "stop")
            made.append(TrainedResponse(len(made), response, len(made) - 1.5))
    return made


def engine(rank: int = 0, data: int = 1, layout: dict | None = None, whole_packs: bool = True) -> SimpleNamespace:
    """What `packed` reads of an engine."""
    given = EngineSettings.model_validate({"model": {"path": "m"}, "parallel": layout or {}})
    topology = SimpleNamespace(data=data, data_rank=rank)
    return SimpleNamespace(settings=given, hf=HF, topology=topology, whole_packs=whole_packs)


def laid_out(packs: list[PackedBatch]) -> dict[int, tuple[list, list, list, list]]:
    """By row: tokens as its last token sees them, and the labels, log-probabilities and advantages at them."""
    found = {}
    for batch in packs:
        bounds = list(zip(batch.cu_seqlens_S1.tolist(), batch.cu_seqlens_S1.tolist()[1:], strict=False))
        seen = [torch.arange(a, b) for a, b in bounds]
        if batch.key_rows_K is not None:
            seen = batch.key_rows_K.split(batch.cu_keys_S1.diff().tolist())
        for row, rows in zip(batch.rows_S.tolist(), seen, strict=True):
            if row >= 0:
                assert row not in found, "in one pack only"
                columns = (batch.tokens_T, batch.labels_T, batch.column("sampler_logp_T"), batch.column("advantages_T"))
                found[row] = tuple(column[rows].tolist() for column in columns)
    return found


@given(st.lists(token, min_size=1, max_size=6), drawn_segments)
def test_masks_and_sums(prompt, parts):
    response = Response((segment(False, prompt), *(segment(*part) for part in parts)), "length")
    mask = [False] * len(prompt) + [trained for trained, ids in parts for _ in ids]
    assert response.token_ids == prompt + [each for _, ids in parts for each in ids]
    assert [label != IGNORE for label in response.labels] == mask
    assert all(label in (IGNORE, each) for label, each in zip(response.labels, response.token_ids, strict=True))
    assert (response.num_tokens, response.num_trained) == (len(mask), sum(mask))
    assert len(response.sampler_logp) == len(response.versions) == sum(mask)
    assert response.last_answer == next((ids for trained, ids in reversed(parts) if trained), [])


@settings(max_examples=150, deadline=None)
@given(drawn_groups, st.integers(1, 3), st.integers(48, 90), st.booleans())
def test_packs_keep_every_token_and_its_values(groups, ranks, capacity, share):
    """Whatever shares its prefix: labels are shifted inside the response, values lie where their token is predicted."""
    responses = responses_of(groups)
    made = [packed(engine(rank, ranks), responses, capacity, share) for rank in range(ranks)]
    found = laid_out([pack for part in made for pack in part.packs])
    want = {}
    for one in responses:
        response, labels = one.response, one.response.labels[1:]
        logp = iter(response.sampler_logp)
        want[one.number] = (
            response.token_ids[:-1],
            labels,
            [0.0 if label == IGNORE else next(logp) for label in labels],
            [0.0 if label == IGNORE else one.advantage for label in labels],
        )
    assert found == want
    assert all(part.repeated == made[0].repeated for part in made)
    spared = sum(made[0].repeated)
    assert sum(part.own_tokens for part in made) + spared == sum(one.response.num_tokens - 1 for one in responses)
    assert share or not spared
    for pack in (pack for part in made for pack in part.packs):
        assert int(pack.trained_S.sum()) == int(pack.loss_mask_T.sum()) == len(pack.labelled_N)


def test_what_comes_before_the_first_answer_is_shared_and_nothing_behind_it():
    """Two responses whose second prompt-like segment is the same too, behind answers that differ."""
    parts = [[(True, [5]), (False, [7, 7, 7]), (True, [8])], [(True, [6]), (False, [7, 7, 7]), (True, [8])]]
    batch = packed(engine(), responses_of([([1, 2, 3], parts)]), 64)
    assert batch.repeated == [2] and batch.own_tokens == 2 + 2 * 5
    (pack,) = batch.packs
    assert pack.tokens_T[: batch.own_tokens].tolist() == [1, 2, 3, 5, 7, 7, 7, 3, 6, 7, 7, 7]
    assert pack.labels_T[2:7].tolist() == [5, IGNORE, IGNORE, IGNORE, 8]


@settings(max_examples=50, deadline=None)
@given(drawn_groups)
def test_aligned_sequences_keep_everything_too(groups):
    """Under context parallelism, where nothing is shared and each sequence is padded."""
    responses = responses_of(groups)
    made = packed(engine(layout={"context": 2}, whole_packs=False), responses, 512)
    for number, (tokens, labels, _, _) in laid_out(made.packs).items():
        response, size = responses[number].response, responses[number].response.num_tokens - 1
        assert len(tokens) % 4 == 0 and tokens[:size] == response.token_ids[:-1]
        assert labels[:size] == response.labels[1:] and set(labels[size:]) <= {IGNORE}


def test_differences_are_of_trained_tokens():
    parts = [(True, [5, 6]), (False, [7, 7, 7]), (True, [8, 9])]
    (pack,) = packed(engine(), responses_of([([1, 2], [parts])]), 64).packs
    moved_T = torch.where(pack.loss_mask_T, torch.tensor(0.25), torch.tensor(100.0))
    moved_T[pack.labels_T == 9] = 0.75
    found = differences([pack.with_columns(old_logp_T=pack.column("sampler_logp_T") - moved_T)])
    ratios = [math.exp(-0.25)] * 3 + [math.exp(-0.75)]
    assert found == {0: (0.375, 0.75, pytest.approx(sum(ratios)), pytest.approx(sum(r * r for r in ratios)), 4)}
    two = [*found.values(), Compared(0.0, 0.0, 2.0, 2.0, 2)]
    ratios += [1.0, 1.0]
    assert effective_share(two) == pytest.approx(sum(ratios) ** 2 / sum(r * r for r in ratios) / 6)
    far = pack.with_columns(old_logp_T=pack.column("sampler_logp_T") + 1e4)
    assert effective_share(differences([far]).values()) == pytest.approx(1.0), "no infinity"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (([1, 2], True, [-1.0], [0, 0]), "2 tokens that are trained, with 1 log-probabilities and 2 versions"),
        (([1, 2], True, [-1.0, -1.0]), "with 2 log-probabilities and 0 versions"),
        (([1, 2], False, [-1.0, -1.0]), "not trained, with 2 log-probabilities and 0 versions"),
        (([], False), "a segment of 0 tokens"),
    ],
    ids=str,
)
def test_segments_that_are_refused(values, problem):
    with pytest.raises(ValueError, match=problem):
        Segment(*values)


@pytest.mark.parametrize("segments", [(), (segment(True, [1]), segment(False, [2]))], ids=["none", "trained first"])
def test_a_response_begins_with_its_prompt(segments):
    with pytest.raises(ValueError, match="begins with a segment that is not trained"):
        Response(segments, "stop")


def test_figures_and_files_count_trained_tokens(tmp_path):
    """Of a response with a tool's output of three tokens between answers of two and one, by weights of two versions."""
    answer = Segment([5, 6], True, [-1.0, -2.0], [3, 3]), segment(False, [7] * 3), Segment([8], True, [-1.0], [4])
    response = Response((segment(False, [1] * 4), *answer), "stop")
    judged = [JudgedResponse(response, "text", Verdict(score, parts={"gsm8k": score}), score) for score in (1.0, 0.0)]
    prompt = Prompt([1] * 4, [{"role": "user", "content": "?"}], "1", "gsm8k", "line 1")
    step = StepRollouts(3, [Group(0, prompt, judged, ESTIMATORS["centred"]([1.0, 0.0], [False] * 2))])
    figures = step.figures()
    assert (figures["response_length"], figures["response_length_max"], figures["generated_tokens"]) == (3, 3, 6)
    journal.write_rollouts(tmp_path, 1, step, {})
    line, _ = [json.loads(each) for each in journal.rollouts_file(tmp_path, 1).read_text().splitlines()]
    assert (line["tokens"], line["version"], line["finish_reason"], line["advantage"]) == (3, [3, 4], "stop", 0.5)


def test_verifiers_read_the_last_answer():
    tokenizer = tiny_model.make_tokenizer()
    said = [tokenizer.encode(text) for text in ("Say 4.", "It is 5.", "No, it is not.", "It is 4.")]
    response = Response(tuple(segment(bool(at % 2), ids) for at, ids in enumerate(said)), "stop")
    prompt = Prompt(said[0], [{"role": "user", "content": "Say 4."}], "4", "gsm8k", "line 1")
    with Rewards(RewardSettings(scale=10.0, workers=1), ["gsm8k"], tokenizer) as rewards:
        ((judged,),) = rewards.finish([[response]], [rewards.begin(prompt, [response])])
    assert judged.text.strip() == "It is 4." and judged.solved and judged.reward == 10.0
