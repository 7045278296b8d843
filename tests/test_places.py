"""Where structures go in every architecture, and that what they do there is what it does to the model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from shapes import ARCHITECTURES, HEADS, HIDDEN, INNER, LAYERS, chosen, make, randomise
from torch import Tensor, nn

from fedkeel import tables
from fedkeel.method.structure.inject import Injection
from fedkeel.method.structure.weights import row_norms
from fedkeel.model.lora import Model
from fedkeel.model.places import Place, Places, StructureError, find_places

SEQ2SEQ = ("t5", "t5:gated", "bart", "mt5", "mbart")
GROUPED = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "granite",
    "phi3",
)
KV_GROUPS = 2
# after a norm that would undo a scale in front of it: what reaches the residual stream is the norm's output
POST_NORMS = ("gemma2", "gemma3_text", "olmo2")
# architectures that normalise the sum of residual stream and branch: the norms of a block, in order
NORMS_OF_SUMS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "deberta-v2"), "attention.output.LayerNorm output.LayerNorm"),
    "distilbert": "sa_layer_norm output_layer_norm",
    "bart": "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm",
}
every = pytest.mark.parametrize("name", chosen(ARCHITECTURES))
# probability so near 1 that every unit of these tests is dropped
ALL_GONE = 0.9999998


@cache
def model_of(name: str) -> Model:
    made = make(name)
    randomise(made)
    return made


def places_of(model: Model) -> Places:
    base = model.net.get_base_model()
    branches = {
        path: (layer, layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
        for path, layer in model.layers.items()
    }
    return replace(find_places(base, base.config, branches), forms=model.places.forms)


def inputs_of(model: Model, rows: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(8, 100, (rows, 7), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if model.kind == "seq2seq" else {})


@torch.no_grad()
def run(model: Model, inputs: dict[str, Tensor] | None = None) -> Tensor:
    output = model.net(**(inputs or inputs_of(model)))
    return output.last_hidden_state if model.kind == "classifier" else output.logits


def injected(places: Places, amounts: dict[str, float], **fields: Any) -> Injection:
    injection = Injection(places, amounts)
    for field, value in {"on": True, "strength": 1.0, "key": 3, **fields}.items():
        setattr(injection.draw, field, value)
    return injection


def check_counts(name: str, places: Places) -> None:
    """Counted by hand: a block has one attention and one down map, a decoder block with cross-attention two and one."""
    stacks = 2 if name in SEQ2SEQ else 1
    attention, down = (3 * LAYERS, 2 * LAYERS) if stacks == 2 else (LAYERS, 0 if name == "mixtral" else LAYERS)
    assert (len(places.attention), len(places.down)) == (attention, down)
    assert len(places.residual) == attention + stacks * LAYERS  # mixtral's experts together, too
    assert {p.units for p in places.attention} == {KV_GROUPS if name in GROUPED else HEADS}
    assert {p.units for p in (*places.down, *places.residual) if p not in places.attention} <= {0, HEADS, KV_GROUPS}
    for place in (*places.attention, *places.down, *places.residual):
        assert place.blocks == LAYERS
        assert f".{place.block}." in f".{place.path}"
    mine = {p.path for p in (*places.attention, *places.down)}
    if name in POST_NORMS:
        assert {p.path.rpartition(".")[2] for p in places.residual} == {
            "post_attention_layernorm",
            "post_feedforward_layernorm",
        }
    elif name != "mixtral":
        assert {p.path for p in places.residual} == mine
    assert len(places.stack) == LAYERS
    assert all(path.endswith(f".{i}") or path == str(i) for i, (path, _) in enumerate(places.stack))
    if stacks == 2:
        assert all("decoder" in path for path, _ in places.stack)


@every
def test_places_are_found_in_a_model_with_lora(name: str) -> None:
    model = model_of(name)
    places = places_of(model)
    check_counts(name.partition(":")[0], places)
    modules = dict(model.net.get_base_model().named_modules())
    found = (*places.attention, *places.down, *places.residual)
    assert all(modules[p.path] is p.module for p in found)
    assert all(modules[path] is block for path, block in places.stack)
    assert [b.path for b in places.branches] == list(model.layers)
    for branch in places.branches:
        layer = model.layers[branch.path]
        assert branch.shape == (layer.lora_B["default"].weight.shape[0], 4, layer.lora_A["default"].weight.shape[1])
        assert (f".{branch.block}." in f".{branch.path}", branch.blocks) == (True, LAYERS)


SIZES: dict[str, Any] = {
    "vocab_size": 110,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_GROUPS,
    "embedding_size": HIDDEN,
    "num_local_experts": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
OTHER_NAMES = {
    "bloom": {"n_layer": LAYERS, "n_head": HEADS},
    "mbart": {
        "d_model": HIDDEN,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": INNER,
        "decoder_ffn_dim": INNER,
    },
    "mt5": {"d_model": HIDDEN, "d_kv": 12, "d_ff": INNER, "num_layers": LAYERS, "num_heads": HEADS},
    "gemma3_text": {"head_dim": 16, "sliding_window": 4, "layer_types": ["full_attention"] * LAYERS},
}
STRUCTURES = [name for name, entry in tables.STRUCTURES.items() if not entry.learns]
UNSHAPED = sorted(set(tables.ARCHITECTURES) - set(ARCHITECTURES))


@cache
def plain_of(name: str) -> nn.Module:
    """A base without LoRA of an architecture that tests/shapes.py does not build."""
    sizes = {k: v for k, v in SIZES.items() if name in GROUPED or k != "num_key_value_heads"}
    if name in OTHER_NAMES and name not in GROUPED:
        sizes = {k: v for k, v in sizes.items() if "num_" not in k}
    config = transformers.AutoConfig.for_model(name, **(sizes | OTHER_NAMES.get(name, {})))
    torch.manual_seed(1)
    made = transformers.AutoModel.from_config(config).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, 0.2)
    return made


def test_every_architecture_with_default_targets_is_known() -> None:
    for maps in tables.ARCHITECTURES.values():
        assert maps.targets
        assert maps.added


@torch.no_grad()
@pytest.mark.parametrize("name", UNSHAPED)
def test_places_are_found_in_a_plain_base(name: str) -> None:
    base = plain_of(name)
    places = find_places(base, base.config, {})
    check_counts(name, places)
    assert places.branches == ()
    ids = torch.arange(10, 24).view(2, 7)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if name in SEQ2SEQ else {})
    clean = base(**inputs).last_hidden_state
    for structure in ("heads", "channels", "layers") if places.down else ("heads", "layers"):
        with injected(places, {structure: 0.5}):
            assert (base(**inputs).last_hidden_state - clean).abs().max() > 1e-3
    assert torch.equal(base(**inputs).last_hidden_state, clean)


def test_the_decoder_may_have_other_heads_than_the_encoder() -> None:
    changes = {"decoder_attention_heads": 8}
    config = transformers.AutoConfig.for_model("mbart", vocab_size=50, **(OTHER_NAMES["mbart"] | changes))
    places = find_places(transformers.AutoModel.from_config(config), config, {})
    assert [p.units for p in places.attention] == [HEADS] * LAYERS + [8] * 2 * LAYERS


@every
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_structure_changes_what_the_model_says_and_is_gone_after_it(name: str, structure: str) -> None:
    model = model_of(name)
    clean = run(model)
    with injected(places_of(model), {structure: 0.9999 if structure == "skip" else 0.5}) as injection:
        assert (run(model) - clean).abs().max() > 1e-3
        injection.draw.on = False
        assert torch.equal(run(model), clean)
    assert torch.equal(run(model), clean)


@every
def test_one_batch_of_4_rows_is_2_of_2_under_all_structures(name: str) -> None:
    """Also where the model flattens rows and time (OPT)."""
    model = model_of(name)
    inputs = inputs_of(model)
    with injected(places_of(model), dict.fromkeys(STRUCTURES, 0.2), rows=4) as injection:
        whole = run(model, inputs)
        parts = []
        for row in (0, 2):
            injection.draw.row, injection.draw.rows = row, 2
            parts.append(run(model, {k: v[row : row + 2] for k, v in inputs.items()}))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-3, atol=1e-3)


def zeroed(place: Place) -> Any:
    """A hook that gives the map zeros for input."""
    return place.module.register_forward_pre_hook(lambda module, inputs: (torch.zeros_like(inputs[0]), *inputs[1:]))


@every
@pytest.mark.parametrize(("structure", "field"), [("heads", "attention"), ("channels", "down")])
def test_dropping_every_unit_is_the_map_with_zeros_for_input(name: str, structure: str, field: str) -> None:
    model = model_of(name)
    places = places_of(model)
    with injected(places, {structure: ALL_GONE}) as injection:
        got = run(model)
        assert float(injection.draw.dropped) == injection.draw.units > 0
    handles = [zeroed(place) for place in getattr(places, field)]
    want = run(model)
    for handle in handles:
        handle.remove()
    assert torch.equal(got, want)
    assert not torch.allclose(got, run(model))


@every
def test_heads_are_what_the_attention_drops(name: str) -> None:
    """What the first output map gets differs from the clean one by whole heads (KV groups) of single rows, to nothing else."""
    model = model_of(name)
    places, seen = places_of(model), []
    place = places.attention[0]

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].unflatten(-1, (place.units, -1)))

    for amount in (0.0, 0.5):
        with injected(places, {"heads": amount}):
            probe = place.module.register_forward_pre_hook(look)
            run(model)
            probe.remove()
    clean, dropped = seen
    kept = dropped.abs().amax((1, 3)) > 0  # (rows, units)
    assert 0 < int(kept.sum()) < kept.numel()
    torch.testing.assert_close(dropped, clean * 2.0 * kept[:, None, :, None])


def block_paths(places: Places) -> list[str]:
    """The top block of every stack in which something is residual."""
    top = [p for p in places.residual if p.block == p.blocks - 1]
    inner = [next(i for i, part in enumerate(p.path.split(".")) if part.isdigit()) for p in top]
    return sorted({".".join(p.path.split(".")[: i + 1]) for p, i in zip(top, inner, strict=True)})


@every
def test_leaving_out_residual_branches_leaves_the_residual_stream(name: str) -> None:
    """With all its branches dropped, a block hands on what it got, or only the norms that this architecture puts on sums."""
    model = model_of(name)
    places, base = places_of(model), model.net.get_base_model()
    assert len(block_paths(places)) == (2 if model.kind == "seq2seq" else 1)
    for path in block_paths(places):
        block, got = base.get_submodule(path), []

        def look(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, got: list[Tensor] = got
        ) -> None:
            got.append(args[0] if args else kwargs["hidden_states"])
            got.append(output[0] if isinstance(output, tuple) else output)

        with injected(places, {"layers": ALL_GONE}):
            probe = block.register_forward_hook(look, with_kwargs=True)
            run(model)
            probe.remove()
        want, after = got
        for norm in NORMS_OF_SUMS.get(name, "").split():
            if hasattr(block, norm.partition(".")[0]):  # an encoder's block has no norm behind cross-attention
                want = block.get_submodule(norm)(want)
        torch.testing.assert_close(after, want, rtol=1e-5, atol=1e-5)


def test_in_gemma2_a_scale_must_stand_behind_the_post_norm() -> None:
    """A branch scaled by 2 in front of the norm adds the same; behind it, twice as much."""
    model = model_of("gemma2")
    places, clean = places_of(model), run(model_of("gemma2"))

    def doubled(place: Place) -> Tensor:
        handle = place.module.register_forward_hook(lambda module, inputs, output: 2.0 * output)
        got = run(model)
        handle.remove()
        return got

    torch.testing.assert_close(doubled(places.attention[1]), clean, rtol=1e-3, atol=1e-3)
    assert (doubled(places.residual[0]) - clean).abs().max() > 0.1


@every
@torch.no_grad()
def test_row_norms_are_those_of_the_base_weight(name: str) -> None:
    for branch in places_of(model_of(name)).branches:
        weight = branch.base.weight
        want = weight.norm(dim=1) if isinstance(branch.base, nn.Linear) else weight.norm(dim=0)  # GPT-2 holds it transposed
        torch.testing.assert_close(row_norms(branch), want, rtol=1e-4, atol=1e-5)


@every
def test_gradients_reach_every_adapter_through_all_structures(name: str) -> None:
    model = make(name)
    randomise(model)
    amounts = dict.fromkeys(STRUCTURES, 0.2) | {"branch": 0.0, "skip": 0.0, "adversary": 0.5}
    with injected(places_of(model), amounts) as injection:
        output = model.net(**inputs_of(model))
        (output.last_hidden_state if model.kind == "classifier" else output.logits).square().mean().backward()
    adversary = injection.learners["adversary"]
    parameters = [*model.parameters(), *(b2 for b2, _ in adversary.pairs)]
    silent = [p for p in parameters if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert silent == []
    assert {id(p) for pair in adversary.pairs for p in pair} & {id(p) for p in model.net.parameters()} == set()


@pytest.mark.parametrize("structure", ["heads", "channels", "layers", "skip"])
def test_an_unknown_architecture_is_an_error_only_where_a_structure_needs_it(structure: str) -> None:
    model = model_of("llama")
    branches = {p: (m, m.base_layer, m.lora_A["default"], m.lora_B["default"]) for p, m in model.layers.items()}
    config = SimpleNamespace(model_type="invented", is_encoder_decoder=False)
    places = find_places(model.net.get_base_model(), config, branches)
    assert (places.attention, places.down, places.residual) == ((), (), ())
    assert [path for path, _ in places.stack] == ["model.layers.0", "model.layers.1"]
    clean = run(model)
    with injected(places, {"rank": 0.5, "weights": 0.5, "branch": 0.5, "lodrop": 0.5}):
        assert not torch.allclose(run(model), clean)
    with pytest.raises(StructureError, match=f"'{structure}' finds no place in a model of type 'invented'.*llama.*t5"):
        Injection(places, {structure: 0.1}).attach()
    assert torch.equal(run(model), clean)


def test_fused_experts_have_no_channels() -> None:
    base = plain_of("mixtral")
    places = find_places(base, base.config, {})
    with pytest.raises(StructureError, match=r"'channels' finds no place in a model of type 'mixtral'.*this mixtral hold no"):
        Injection(places, {"channels": 0.1}).attach()


def test_a_model_without_blocks_has_no_stack() -> None:
    net = nn.ModuleDict({"head": nn.Linear(3, 3)})
    a, b = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)
    found = find_places(net, SimpleNamespace(model_type="flat"), {"head": (net["head"], net["head"], a, b)})
    assert found.stack == ()
    assert (found.branches[0].block, found.branches[0].blocks, found.branches[0].shape) == (0, 1, (3, 2, 3))
    listed = find_places(nn.Sequential(nn.Linear(3, 3)), SimpleNamespace(model_type="flat"), {"0": (a, a, a, b)})
    assert [path for path, _ in listed.stack] == ["0"]
