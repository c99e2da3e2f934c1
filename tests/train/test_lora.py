"""Low-rank adapters against PEFT beside transformers, under layouts; the frozen weights stay what they are to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.lib import lora_jobs, world
from tests.lib.layouts import LAYOUTS, size, weights
from tulu_mega.bridge.adapters import adapted
from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.files.peft import open_adapter, settings_of
from tulu_mega.config import SftSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.convert.run import run as convert
from tulu_mega.convert.settings import ConvertSettings
from tulu_mega.errors import UserError

pytestmark = pytest.mark.ranks

HOW = {
    "r3": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
    "r8 rslora, some": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"]},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]},
    "patterns": {
        "r": 3, "lora_alpha": 6, "target_modules": r"model\.layers\.(0|1|3)\..*(_proj)",
        "rank_pattern": {"k_proj": 5, r"1\.mlp\..*": 2, "down_proj": 7},
        "alpha_pattern": {"layers.3.self_attn.q_proj": 12, "o_proj": 1.5},
    },
}  # fmt: skip
FEW = [  # kind, layout, adapters, recompute
    ("Llama", "TP2", "r3", "none"),
    ("Qwen 2", "TP2xPP2", "dora", "none"),
    ("OLMo 2", "TP2 without SP", "r8 rslora, some", "full"),
    ("Llama", "PP2xVPP2", "patterns", "full"),
]
FAMILIES = ("Llama", "Llama tied", "Qwen 2", "Qwen 3", "Mistral", "OLMo 2", "OLMo 3")
GRID = [
    (kind, layout, how, "none")
    for kind in FAMILIES
    for layout in ("TP1", "TP2", "TP2 without SP", "TP4", "PP2", "PP2xVPP2", "CP2", "DP2", "TP2xPP2")
    for how in HOW
]


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    made = {}

    def of(kind: str, how: str, optimizer: str = "sgd") -> tuple[Path, dict]:
        if (kind, how, optimizer) not in made:
            root = tmp_path_factory.mktemp("peft")
            seen = world.run(1, lora_jobs.peft_truth, kind, str(root), HOW[how], optimizer)[0]
            made[kind, how, optimizer] = root, seen
        return made[kind, how, optimizer]

    return of


def check(truth, out: Path, kind: str, layout: str, how: str, recompute: str, optimizer: str = "sgd", bound: float = 1e-5):
    root, want = truth(kind, how, optimizer)
    lora = {"adapter": str(root / "adapter")}
    ranks = world.run(
        size(LAYOUTS[layout]), lora_jobs.trained, str(root / "model"), LAYOUTS[layout], lora, str(out), optimizer,
        lora_jobs.STEPS, recompute,
    )  # fmt: skip
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"][0], want["losses"][0], rtol=1e-6)
        np.testing.assert_allclose(rank["norms"][0], want["norms"][0], rtol=1e-5)
    norm = np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in weights(out / "adapter").values()))
    for rank in ranks:
        assert rank["adapter_norm"] == pytest.approx(norm)
        assert 0 < rank["trained_share"] < 0.2
    same(out / "adapter", root / "trained", bound)
    same(out / "hf", root / "merged", bound)


def same(ours: Path, theirs: Path, bound: float) -> None:
    have, want = weights(ours), weights(theirs)
    assert have.keys() == want.keys()
    for name, value in want.items():
        assert np.linalg.norm(have[name].astype(np.float64) - value) < bound * np.linalg.norm(value.astype(np.float64)), name


@pytest.mark.parametrize(("kind", "layout", "how", "recompute"), FEW)
def test_adapters_are_pefts(truth, tmp_path, kind, layout, how, recompute):
    check(truth, tmp_path, kind, layout, how, recompute)


@pytest.mark.acceptance
@pytest.mark.parametrize(("kind", "layout", "how", "recompute"), GRID)
def test_every_family_under_every_layout(truth, tmp_path, kind, layout, how, recompute):
    check(truth, tmp_path, kind, layout, how, recompute)


@pytest.mark.acceptance
@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", "DP2"])
def test_adamw(truth, tmp_path, layout):
    check(truth, tmp_path, "Llama", layout, "r3", "none", "adamw", 1e-4)


def test_new_adapters_and_their_run_are_the_same_under_every_layout_and_go_on_under_another(truth, tmp_path):
    model = str(truth("Llama", "r3")[0] / "model")
    lora = {"rank": 3, "targets": ["q_proj", "k_proj", "down_proj"], "dora": True}

    def run(name: str, layout: str, steps: int, first: int = 0, folder: str | None = None) -> list[float]:
        arguments = (LAYOUTS[layout], lora, str(tmp_path / name), "adamw", steps, "none", folder, first)
        return world.run(size(LAYOUTS[layout]), lora_jobs.trained, model, *arguments)[0]["losses"]

    folder = str(tmp_path / "checkpoints")
    run("drawn", "TP1", 0)
    drawn = weights(tmp_path / "drawn" / "adapter")
    assert sum(not value.any() for value in drawn.values()) == len(drawn) / 3  # B
    base = weights(model)
    for name in (name for name in drawn if name.endswith("magnitude_vector")):
        rows = base[name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")]
        np.testing.assert_allclose(drawn[name], np.linalg.norm(rows, axis=1), rtol=1e-6)
    bound = max(abs(value).max() * value.shape[1] ** 0.5 for name, value in drawn.items() if "lora_A" in name)
    assert 0.9 < bound <= 1
    whole = run("whole", "TP1", 3)
    parts = run("first", "TP2xPP2", 2, folder=folder)
    same(tmp_path / "first" / "adapter", tmp_path / "first" / "adapter", 1e-6)
    parts += run("then", "DP2", 3, 2, folder)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    same(tmp_path / "then" / "adapter", tmp_path / "whole" / "adapter", 1e-4)
    held = FileSystemReader(max(Path(folder).glob("step_*"))).read_metadata().state_dict_metadata
    shapes = {name: tuple(each.size) for name, each in held.items() if isinstance(each, TensorStorageMetadata)}
    # of each its parameter, main parameter and two moments
    assert sum(map(np.prod, shapes.values())) == 4 * sum(value.size for value in drawn.values())
    assert all("adapters." in name for name in shapes)  # no frozen weights


def test_adapters_go_in_and_out_bit_for_bit_and_the_weights_stay(truth, tmp_path):
    root = truth("Llama", "r3")[0]
    for name, layout in (("one", "TP1"), ("four", "TP2xPP2")):
        how = (LAYOUTS[layout], {"adapter": str(root / "adapter")}, str(tmp_path / name), "sgd", 0)
        world.run(size(LAYOUTS[layout]), lora_jobs.trained, str(root / "model"), *how)
        have, want = weights(tmp_path / name / "adapter"), weights(root / "adapter")
        assert have.keys() == want.keys()
        for tensor, value in want.items():
            np.testing.assert_array_equal(have[tensor], value, err_msg=tensor)
    places = (tmp_path / "four" / "adapter", root / "adapter")
    written, given = (json.loads((each / "adapter_config.json").read_text()) for each in places)
    shared = ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "bias", "lora_dropout")
    assert {name: written[name] for name in shared} == {name: given[name] for name in shared}
    assert sorted(written["target_modules"]) == sorted(given["target_modules"])


@pytest.mark.parametrize("layout", ["TP2xPP2", pytest.param("PP2xVPP2", marks=pytest.mark.acceptance)])
def test_a_policys_reference_is_what_it_began_with_and_servers_get_merged_weights(truth, tmp_path, layout):
    root = truth("Llama", "r3")[0]
    arguments = (str(root / "model"), LAYOUTS[layout], str(root / "adapter"), str(tmp_path))
    assert all(world.run(size(LAYOUTS[layout]), lora_jobs.policy_parts, *arguments))
    sent, exported = weights(tmp_path), weights(tmp_path / "hf")
    assert sent.keys() == exported.keys()
    for name, value in exported.items():
        np.testing.assert_array_equal(sent[name], value, err_msg=name)


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_convert_merges_them(truth, tmp_path, to):
    root = truth(*{"hf": ("Qwen 2", "dora"), "megatron": ("Llama", "patterns")}[to])[0]
    settings = {"source": str(root / "model"), "adapter": str(root / "trained"), "workers": 1}
    convert(ConvertSettings(**settings, output=str(tmp_path / "merged"), to=to))
    if to == "megatron":
        convert(ConvertSettings(source=str(tmp_path / "merged"), output=str(tmp_path / "back"), to="hf", workers=1))
    same(tmp_path / ("back" if to == "megatron" else "merged"), root / "merged", 1e-6)


def test_convert_refuses_adapters_of_another_model(truth, tmp_path):
    root, other = truth("Llama", "r3")[0], adapter(tmp_path / "other")
    settings = {"source": str(root / "model"), "output": str(tmp_path / "merged"), "to": "hf"}
    with pytest.raises(UserError, match="does not belong to the source"):
        convert(ConvertSettings(**settings, adapter=str(other)))


def test_a_reward_models_head_trains_beside_its_adapters(tmp_path):
    """And goes with them, where PEFT and transformers find it; whatever the layout, the same."""
    model = str(tmp_path / "model")
    world.run(1, lora_jobs.families.make_language_model, model, "Llama")
    scored = [
        world.run(size(LAYOUTS[layout]), lora_jobs.trained_reward, model, LAYOUTS[layout], str(tmp_path / layout))
        for layout in ("TP1", "TP2xPP2")
    ]
    same(tmp_path / "TP2xPP2" / "adapter", tmp_path / "TP1" / "adapter", 1e-5)
    theirs = world.run(1, lora_jobs.peft_scores, model, str(tmp_path / "TP1" / "adapter"))[0]
    for ranks in scored:
        np.testing.assert_allclose(next(filter(None, ranks)), theirs, rtol=1e-5, atol=1e-5)


def adapter(directory: Path, **changes) -> Path:
    """A directory of adapters of one matrix."""
    directory.mkdir()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"} | changes
    (directory / "adapter_config.json").write_text(json.dumps(told))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: np.zeros((2, 8), np.float32)}, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3', expected 'LORA'"),
        ({"use_dora": "very"}, "use_dora = 'very': Input should be a valid boolean"),
        ({"rank_pattern": {"k_proj": 0}}, "rank_pattern = 0: Input should be greater than or equal to 1"),
        ({"alpha_pattern": {"k_proj(": 4}}, "'k_proj(' is no regular expression"),
        ({"target_modules": "("}, "target_modules = '(': Value error, '(' is no regular expression"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is not had here"),
        ({"bias": "all"}, "bias = all is not had here; expected 'none'"),
        ({"r": 0}, "r = 0"),
        ({"r": "8"}, "r = '8'"),
        ({"lora_alpha": -1}, "lora_alpha = -1"),
        ({"target_modules": ["c_attn"]}, "c_attn: expected 'all-linear' or some of q_proj"),
        ({"target_modules": None}, "target_modules"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' changes the model's weights, too"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config = {'beta': 1.0} is not had here; expected {}"),
        ({"what_a_later_version_adds": 3}, "what_a_later_version_adds = 3 is not had here; expected 0"),
    ],
    ids=str,
)
def test_adapters_that_are_not_had_are_refused_by_name(tmp_path, changes, told):
    with pytest.raises(UserError) as error:
        settings_of(adapter(tmp_path / "adapter", **changes))
    assert told in str(error.value)


@pytest.mark.parametrize("more", [{}, {"init_lora_weights": "eva", "lora_dropout": 0.1, "eva_config": {"rho": 2.0}}], ids=str)
def test_what_says_nothing_of_trained_adapters_is_passed_over(tmp_path, more):
    settings = settings_of(adapter(tmp_path / "adapter", **more))
    assert settings.targets == ["q_proj"] and settings.scale_of("model.layers.0.self_attn.q_proj") == 2.0


def test_directories_that_are_no_adapters(tmp_path):
    for damage, told in (
        (lambda made: shutil.rmtree(made), "no such directory"),
        (lambda made: (made / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
        (lambda made: (made / "adapter_config.json").write_text("[]"), "holds list, expected a JSON object"),
        (lambda made: (made / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
        (lambda made: (made / "adapter_model.safetensors").unlink(), "safe_serialization=True"),
        (lambda made: (made / "adapter_model.safetensors").write_bytes(b"12"), "too short for its header"),
    ):
        made = adapter(tmp_path / "adapter")
        damage(made)
        with pytest.raises(UserError, match=told):
            open_adapter(made)
        shutil.rmtree(made, ignore_errors=True)


TARGETS = [
    "all-linear", ["q_proj", "down_proj"], ["layers.1.mlp.up_proj", "v_proj"], ["model.layers.0.self_attn.k_proj"],
    r"model\.layers\.[02]\..*_proj", r".*\.(gate|up)_proj", r"layers\.0\..*",
]  # fmt: skip
PATTERNS = [
    {}, {"k_proj": 4, "proj": 5}, {r"layers\.1\..*": 2, "q_proj": 9}, {r"^model\.layers\.0\..*": 7},
    {"model.layers.2.mlp.up_proj": 3, "up_proj": 6, ".*": 1}, {r"self_attn\.(q|v)_proj": 8, "1.mlp.down_proj": 2},
]  # fmt: skip


def test_names_match_as_in_peft():
    """Of every matrix of three layers: whether it has an adapter, and of which rank."""
    parts = [f"self_attn.{each}_proj" for each in "qkvo"] + [f"mlp.{each}_proj" for each in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{part}" for layer in range(3) for part in parts]
    has, ranks = world.run(1, lora_jobs.peft_matches, names, TARGETS, PATTERNS)[0]
    assert [[LoraSettings(targets=each).has(f"{name}.weight") for name in names] for each in TARGETS] == has
    assert [[LoraSettings(rank=11, rank_pattern=each).rank_of(f"{name}.weight") for name in names] for each in PATTERNS] == ranks


def test_targets_that_fit_no_matrix_are_told_with_the_nearest():
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 8, "vocab_size": 16,
    }  # fmt: skip
    patterns = {"rank_pattern": {"k_proj": 2, "q_proj": 2}, "alpha_pattern": {"x": 1}}
    lora = LoraSettings(targets=["layers.2.mlp.up_proj", "q_proj"], **patterns)
    assert lora.unmatched(adapted(family_for(config), config)) == [
        "targets: 'layers.2.mlp.up_proj' fits no matrix of the model; the nearest is layers.1.mlp.up_proj",
        "rank_pattern: 'k_proj' fits no matrix that has an adapter",
        "alpha_pattern: 'x' fits no matrix that has an adapter",
    ]
    (told,) = LoraSettings(targets=r"layers\..*_proj").unmatched(adapted(family_for(config), config))
    assert told.startswith(r"targets: 'layers\\..*_proj' fits no matrix of the model; ")


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"rank": 0}, "greater than or equal to 1"),
        ({"alpha": 0}, "greater than 0"),
        ({"targets": ["qproj"]}, "qproj: expected 'all-linear' or some of q_proj.*did you mean q_proj"),
        ({"targets": "q_proj"}, r"write \['q_proj'\] for these matrices"),
        ({"targets": "model.layers.(0"}, "is no regular expression"),
        ({"rank_pattern": {"k_proj": 0}}, "greater than or equal to 1"),
        ({"targets": []}, "expected 'all-linear'"),
        ({"targets": ["q_proj", "q_proj"]}, "q_proj: named more than once"),
        ({"adapter": "somewhere", "rank": 4}, "decides about rank, too"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(lora, told):
    settings = {"model": {"path": "m"}, "run_dir": "r", "data": {"train": "d"}, "lora": lora}
    with pytest.raises(ValueError, match=told):
        SftSettings.model_validate(settings)
