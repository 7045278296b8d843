"""Fewer blocks: what hands on in place of a block, early exits and cut stacks, against the model written out without them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from further import further
from shapes import ARCHITECTURES, LAYERS, chosen, make, randomise
from test_places import injected, inputs_of, run
from torch import Tensor, nn
from training import recipe_of, same_bits, setting, train, whole_batch

from fedkeel.method.objective.exits import early, exit_block
from fedkeel.method.objective.task import task_loss
from fedkeel.model.bases import ModelError
from fedkeel.model.depth import Patch, kept_blocks, without
from fedkeel.model.export import cut, save_merged, save_with_base
from fedkeel.model.lora import Model
from fedkeel.model.places import StructureError
from fedkeel.recipe.schema import Exit, LoraConfig
from fedkeel.recipe.schema import Model as ModelConfig
from fedkeel.scores.damage import damaged
from fedkeel.types import Forward, Global, Head

every = pytest.mark.parametrize("name", chosen(ARCHITECTURES))


@cache
def model_of(name: str) -> Model:
    made = make(name)
    randomise(made)
    return made


def stack_of(model: Model) -> tuple[nn.Module, str, nn.ModuleList]:
    """(the module that holds the stack that predicts, its name there, the stack)."""
    path = model.places.stack[0][0].rpartition(".")[0]
    above, _, name = path.rpartition(".")
    holder = model.net.get_base_model().get_submodule(above)
    return holder, name, getattr(holder, name)


@torch.no_grad()
def written_out(model: Model, kept: Sequence[int], inputs: dict[str, Tensor] | None = None) -> Tensor:
    """The model's output with only these blocks in its list. What a model reads of its config beside that list is cut to it."""
    holder, name, blocks = stack_of(model)
    config = holder.config if hasattr(holder, "config") else model.net.config
    sizes = {k: getattr(config, k) for k in ("num_hidden_layers", "n_layer", "layer_types") if hasattr(config, k)}
    setattr(holder, name, nn.ModuleList(blocks[n] for n in kept))
    for key, value in sizes.items():
        if isinstance(value, int):
            setattr(config, key, len(kept))
        elif value:
            setattr(config, key, [value[n] for n in kept])
    try:
        return run(model, inputs)
    finally:
        setattr(holder, name, blocks)
        for key, value in sizes.items():
            setattr(config, key, value)


@every
@torch.no_grad()
def test_a_stack_with_skipped_blocks_is_the_one_written_without_them(name: str) -> None:
    """Each but the first block, alone and together; T5's first block makes what the others read of relative positions."""
    model = model_of(name)
    places = model.places
    clean = run(model)
    for gone in ([LAYERS - 1], list(range(1, LAYERS)), [1]):
        kept = [n for n in range(LAYERS) if n not in gone]
        with without([places.stack[n][1] for n in gone], [places.forms[n] for n in gone]):
            short = run(model)
        torch.testing.assert_close(short, written_out(model, kept), rtol=1e-6, atol=1e-6)
        assert (short - clean).abs().max() > 1e-3
    assert torch.equal(run(model), clean)


@every
@torch.no_grad()
def test_skip_in_every_architecture(name: str) -> None:
    model = model_of(name)
    with injected(model.places, {"skip": 0.9999999}):
        short = run(model)
    torch.testing.assert_close(short, written_out(model, range(LAYERS - 1)), rtol=1e-6, atol=1e-6)  # the top one's chance is ~1
    with injected(model.places, {"skip": 0.9999999}, strength=0.0):
        assert torch.equal(run(model), run(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert", "t5", "bart"])
def test_an_exit_is_what_the_model_written_out_up_to_there_says(name: str) -> None:
    model, examples = setting(name)
    batch = whole_batch(model, examples)
    clean = model.forward(batch)
    blocks = stack_of(model)[2]
    for exit in range(LAYERS - 1):
        forward = model.forward(batch, exit=exit)
        assert torch.equal(forward.logits, clean.logits)
        with without(list(blocks[exit + 1 :]), model.places.forms[exit + 1 :]):
            short = model.forward(batch).logits
        torch.testing.assert_close(forward.exit, short, rtol=1e-5, atol=1e-5)
        model.net.zero_grad(set_to_none=True)
        task_loss(Forward(forward.exit, forward.targets, forward.rows)).backward()
        trained = {path for path, layer in model.layers.items() if layer.lora_B["default"].weight.grad is not None}
        above = {p for p in trained for n in range(exit + 1, LAYERS) if p.startswith(model.places.stack[n][0] + ".")}
        assert trained
        assert not above  # an exit teaches the blocks below it
    model.net.zero_grad(set_to_none=True)
    again = model.forward(batch)
    assert torch.equal(again.logits, clean.logits)
    assert again.exit is None


def test_exits_above_kept_states_are_the_same() -> None:
    """Adapters in the upper block alone: the lower one's states are kept, and the exit's own pass does without any block."""
    model, examples = setting("llama", layers=(f"{LAYERS - 2}-{LAYERS - 1}",))
    batch = whole_batch(model, examples)
    plain = model.forward(batch, exit=LAYERS - 2)
    with model.remembering():
        kept = model.forward(batch, exit=LAYERS - 2)
    torch.testing.assert_close(kept.exit, plain.exit, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "blocks", "first", "uniform", "progress", "want"),
    [
        ({}, 30, 0, 0.0, 0.0, 28),  # least 0.5: behind block 14 (the fifteenth) up to 28
        ({}, 30, 0, 0.999, 0.0, 14),
        ({}, 30, 15, 0.999, 0.0, 15),  # none below what is trained
        ({"least": 1.0}, 30, 0, 0.5, 0.0, -1),
        ({"least": 0.0}, 4, 0, 0.999, 0.0, 0),
        ({"deepen": 0.5}, 30, 0, 0.999, 0.0, 28),  # at first the deepest alone
        ({"deepen": 0.5}, 30, 0, 0.999, 0.25, 21),  # half of the fifteen, rounded up
        ({"deepen": 0.5}, 30, 0, 0.999, 0.9, 14),
        ({}, 1, 0, 0.5, 0.0, -1),
    ],
)
def test_exit_blocks_by_hand(
    options: dict[str, Any], blocks: int, first: int, uniform: float, progress: float, want: int
) -> None:
    assert exit_block(Exit(**options), blocks, first, uniform, progress) == want


def test_the_term_by_hand() -> None:
    """Logits (0, 0) at the exit and (log 3, 0) at full depth; the answer is the first."""
    full, exit = torch.tensor([[math.log(3.0), 0.0]], requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    forward = Forward(full, torch.tensor([0]), torch.tensor([0]), exit=exit)
    labels, self_ = math.log(2), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    for teach, want in (("labels", labels), ("self", self_), ("both", (labels + self_) / 2)):
        assert float(early(forward, Exit(teach=teach)).detach()) == pytest.approx(want, abs=1e-6)
    early(forward, Exit(teach="self")).backward()
    assert full.grad is None  # the full depth teaches and does not learn
    assert exit.grad.tolist() == [[pytest.approx(-0.25), pytest.approx(0.25)]]
    assert float(early(Forward(full, forward.targets, forward.rows), Exit())) == 0.0


def test_a_round_with_exits_is_its_own_and_one_of_weight_0_plain() -> None:
    model, examples = setting("llama")
    start = model.read()

    def trained(*keys: str) -> dict[str, Tensor]:
        return train(model, examples, recipe_of(*keys), Global(0, start))[0]

    plain, exits = trained(), trained("exit.weight=0.3", "exit.least=0")
    assert same_bits(trained("exit.weight=0"), plain)
    assert not same_bits(exits, plain)
    assert same_bits(trained("exit.weight=0.3", "exit.least=0"), exits)
    micro = trained("exit.weight=0.3", "exit.least=0", "train.micro_batch_size=1")  # one exit a step, for all
    assert max(float((micro[n] - exits[n]).abs().max()) for n in exits) < 1e-3


def test_a_round_with_skipped_blocks_beside_an_exit() -> None:
    """Both put another forward in place of a block's; what is left behind is neither."""
    model, examples = setting("llama")
    start = model.read()
    recipe = recipe_of("structure.skip=0.8", "exit.weight=0.3", "exit.least=0", "train.local_steps=6")
    first, stats = train(model, examples, recipe, Global(0, start))
    assert 0 < stats["dropped"] < 1
    assert same_bits(train(model, examples, recipe, Global(0, start))[0], first)
    assert all("forward" not in block.__dict__ for _, block in model.places.stack)


@every
def test_depth_damage_cuts_the_top(name: str) -> None:
    model = model_of(name)
    clean = run(model)
    with damaged(model, "depth", 1 / LAYERS, 1):
        short = run(model)
    torch.testing.assert_close(short, written_out(model, range(LAYERS - 1)), rtol=1e-6, atol=1e-6)
    assert torch.equal(run(model), clean)
    with damaged(model, "depth", 0.01, 1):  # rounds to no block
        assert torch.equal(run(model), clean)


@every
def test_a_cut_model_is_saved_as_one_of_fewer_blocks(name: str, tmp_path: Path) -> None:
    """Read back by transformers alone, it says what the model written out says, its adapter folded in."""
    model = make(name)  # of its own, as it is of no further use
    randomise(model)
    want = written_out(model, range(LAYERS - 1))
    cut(model, range(LAYERS - 1))
    kind, inputs = model.kind, inputs_of(model)
    save_merged(model, tmp_path)
    classes = {"causal": transformers.AutoModelForCausalLM, "seq2seq": transformers.AutoModelForSeq2SeqLM}
    net = classes.get(kind, transformers.AutoModel).from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        out = net(**inputs)
    torch.testing.assert_close(out.last_hidden_state if kind == "classifier" else out.logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", chosen(ARCHITECTURES))
@pytest.mark.parametrize("layers", [(), (f"1-{LAYERS - 1}",)], ids=["all", "upper"])
def test_an_adapter_comes_with_the_base_that_it_fits(name: str, layers: tuple[str, ...], tmp_path: Path) -> None:
    """Without the top block, or, where only that has branches, without the lowest, so that it gets another number; base and
    adapter read back by transformers and PEFT alone."""
    if layers and model_of(name).kind == "seq2seq":
        pytest.skip("an encoder-decoder has no lora.layers")
    if layers and name == "modernbert":
        pytest.skip("its lowest block alone has no norm in front of attention, so another cannot be the lowest")
    model = make(name, layers=layers)
    randomise(model)
    kept = [LAYERS - 1] if layers else [0]
    want = written_out(model, kept)
    cut(model, kept)
    kind, inputs = model.kind, inputs_of(model)
    save_with_base(model, tmp_path)
    classes = {"causal": transformers.AutoModelForCausalLM, "seq2seq": transformers.AutoModelForSeq2SeqLM}
    base = classes.get(kind, transformers.AutoModel).from_pretrained(tmp_path / "base", dtype=torch.float32)
    net = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        out = net(**inputs)
    torch.testing.assert_close(out.last_hidden_state if kind == "classifier" else out.logits, want, rtol=1e-4, atol=1e-4)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize(
    ("blocks", "depth", "order", "kept"),
    [
        (30, 0.9, (), range(27)),
        (15, 0.9, (), range(13)),  # 1.5 blocks, rounded to even: 2, as 0.1 of the damage family
        (4, 0.05, (), [0]),
        (5, 1.0, (1, 2, 3, 4), range(5)),
        (5, 0.6, (1, 3, 4, 2), [0, 2, 4]),  # the first stays always
        (4, 0.5, (3, 2, 1), [0, 1]),
        (3, 0.01, (1, 2), [0]),
    ],
)
def test_which_blocks_are_kept(blocks: int, depth: float, order: Sequence[int], kept: Sequence[int]) -> None:
    assert kept_blocks(blocks, depth, order) == list(kept)
    if order:
        with pytest.raises(ValueError, match=rf"is no order of the blocks 1 to {blocks}"):
            kept_blocks(blocks + 1, depth, order)


def test_what_a_cut_encoder_sees_stands_where_it_is_now(tmp_path: Path) -> None:
    """Of two blocks the first is left: what was half of the depth is all of it."""
    model = make("bert", ("no", "yes"), head="analytic", feature_depths=(0.5, 1.0))
    model.know({"t": Head(("no", "yes"), torch.ones(2, 65), 1.0, torch.ones(2))})
    cut(model, [0])
    save_with_base(model, tmp_path)
    assert json.loads((tmp_path / "fedkeel_classes.json").read_text())["depths"] == [1.0, 1.0]


def test_blocks_that_differ_by_number_are_not_written_as_others(tmp_path: Path) -> None:
    """A base whose first block alone has no experts: without it, its config would make the second one so."""
    folder = further("qwen3_moe", tmp_path / "base")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.mlp_only_layers = [0]
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for number, save in enumerate((save_with_base, save_merged)):
        model = Model(ModelConfig(base=str(folder), precision="fp32"), LoraConfig(rank=2), 1)
        cut(model, [1])
        with pytest.raises(ModelError, match="its config says by number what a block is"):
            save(model, tmp_path / str(number))


def test_unknown_blocks_are_told() -> None:
    model = make("llama")
    model.__dict__["places"] = replace(model.places, forms=())
    with pytest.raises(ModelError, match="its blocks are not known, so none can be left out"):
        cut(model, [0])


def test_the_forms_of_blocks_are_found_where_weights_are_held_in_bf16() -> None:
    model = make("llama", precision="bf16", layers=(f"1-{LAYERS - 1}",))
    half = [m for m in model.net.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
    for module in half:  # as those of a real base are
        module.weight.data = module.weight.data.bfloat16()
    assert model.places.forms == (0,) * LAYERS


def test_patches_of_one_module_come_off_in_turn() -> None:
    module = nn.Identity()
    first = Patch(module, lambda x: x + 1)
    second = Patch(module, lambda x: x + 2)
    one = torch.ones(1)
    assert module(one) == 3
    second.remove()
    assert module(one) == 2
    first.remove()
    assert module(one) is one


def test_blocks_that_are_not_known_are_told() -> None:
    with pytest.raises(StructureError, match="structure 'skip' finds no place"):
        injected(replace(model_of("llama").places, forms=()), {"skip": 0.5}).attach()
