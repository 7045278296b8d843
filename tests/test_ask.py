"""Questions to a finished run: each answer is what a bare greedy loop would say, over the exported adapter or over the base."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import peft
import pytest
import shapes
import tiny
import torch
import transformers
from test_run import go

from fedkeel.cli import main
from fedkeel.runs.ask import WHO, Ask
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.prepare import prepare
from fedkeel.scores.evaluate import score
from fedkeel.types import FedKeelError

LEAN = ["evaluation.baselines=[]", "evaluation.test_rows=1", "evaluation.validation_rows=0", "train.lr=0.05"]


def greedy(base: Path, adapter: Path | None, text: str, tokens: int) -> str:
    """The twin: the whole text through the model anew for each token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    model.eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    said: list[int] = []
    with torch.no_grad():
        while len(said) < tokens:
            said.append(int(model(input_ids=torch.tensor([[*ids, *said]])).logits[0, -1].argmax()))
            if said[-1] == tokenizer.eos_token_id:
                break
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


@pytest.fixture(scope="module")
def talker(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with large weights and a head of its own: with the embedding as its head it repeats the last token."""
    folder = tmp_path_factory.mktemp("talker")
    config = transformers.AutoConfig.from_pretrained(tiny_base)
    config.tie_word_embeddings, config.initializer_range = False, 0.5
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rule", ["mean", "residual"])
def test_base_and_federated_say_what_a_bare_loop_says(talker: Path, tiny_data: Path, tmp_path: Path, rule: str) -> None:
    """Of `residual` the federated model has a base of its own, and the base answers without it."""
    recipe, folder, _ = go([*tiny.overrides(talker, tiny_data, tmp_path), *LEAN, f"federation.rule={rule}"])
    models, adapter = Ask(recipe, folder.path), folder.path / "adapter"
    question = "Which colour? the green bird sings"
    said = {who: models.answer(who, [("user", question)], 8, told=lambda text: None) for who in WHO}
    prompt = f"<bos><user>{question}<end><assistant>"
    assert said == {"base": greedy(talker, None, prompt, 8), "federated": greedy(talker, adapter, prompt, 8)}
    assert len(set(said.values()) | {""}) == 3
    # a second question is taken with the first and its answer
    turns = [("user", question), ("assistant", said["federated"]), ("user", "And then?")]
    more = f"{prompt}{said['federated']}<end><user>And then?<end><assistant>"
    again = models.answer("federated", turns, 8, told=lambda text: None)
    assert again == greedy(talker, adapter, more, 8)


@pytest.fixture(scope="module")
def asked(talker: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ask, Path]:
    recipe, folder, _ = go([*tiny.overrides(talker, tiny_data, tmp_path_factory.mktemp("asked")), *LEAN])
    return Ask(recipe, folder.path), folder.path


def test_the_answer_is_told_as_it_grows(asked: tuple[Ask, Path]) -> None:
    told: list[str] = []
    answer = asked[0].answer("base", [("user", "the red cat")], 6, told=told.append)
    assert len(told) > 1
    assert told[-1].strip() == answer.removesuffix("\N{REPLACEMENT CHARACTER}")  # half a character waits for its other half
    assert all(after.startswith(before) for before, after in pairwise(told))


def test_a_temperature_draws_and_the_seed_repeats_it(asked: tuple[Ask, Path]) -> None:
    def drawn(temperature: float) -> str:
        return asked[0].answer("base", [("user", "the red cat")], 12, temperature, told=lambda text: None)

    assert drawn(5.0) == drawn(5.0)
    assert drawn(5.0) != drawn(0.0)


@pytest.mark.parametrize(
    ("question", "told"), [(" \n", "the question is empty"), ("red " * 300, "are over the 256 of this base")]
)
def test_a_question_that_cannot_be_asked_says_why(asked: tuple[Ask, Path], question: str, told: str) -> None:
    with pytest.raises(FedKeelError, match=told):
        asked[0].answer("base", [("user", question)], 8)


def test_the_command_shows_both(
    asked: tuple[Ask, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {who: asked[0].answer(who, [("user", "the red cat")], 5, told=lambda text: None) for who in WHO}
    monkeypatch.setattr("sys.argv", ["fedkeel", "ask", str(asked[1]), "the red cat", "--tokens", "5"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert capsys.readouterr().out.splitlines()[-2:] == [f"{who}: {said[who]}".rstrip() for who in WHO]


def test_a_chat_ends_with_an_empty_line(
    asked: tuple[Ask, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["the red cat", "and the dog", ""])
    monkeypatch.setattr("rich.console.Console.input", lambda self, *given, **named: next(typed))
    monkeypatch.setattr("sys.argv", ["fedkeel", "ask", str(asked[1]), "--tokens", "5"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    answers = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("base:", "federated:"))]
    assert len(answers) == 4
    first = asked[0].answer("base", [("user", "the red cat")], 5, told=lambda text: None)
    second = [("user", "the red cat"), ("assistant", first), ("user", "and the dog")]
    assert answers[2] == f"base: {asked[0].answer('base', second, 5, told=lambda text: None)}".rstrip()


def test_an_encoder_says_its_likeliest_classes(tmp_path: Path, tiny_data: Path) -> None:
    given = [*tiny.overrides(Path(shapes.base("bert")), tiny_data, tmp_path), *LEAN, 'data.tasks=["colour"]']
    recipe, folder, _ = go(given)
    answer = Ask(recipe, folder.path).answer("federated", [("user", "the green bird")], 8, told=lambda text: None)
    shares = [int(part.split("(")[1].rstrip("%)")) for part in answer.split(", ")]
    assert shares == sorted(shares, reverse=True)
    assert abs(sum(shares) - 100) <= 2
    assert {part.split(" (")[0] for part in answer.split(", ")} == {"red", "green", "blue"}


def test_a_long_question_is_cut_where_the_base_counts_from_behind_its_padding(tmp_path: Path, tiny_data: Path) -> None:
    given = [*tiny.overrides(Path(shapes.base("roberta")), tiny_data, tmp_path), *LEAN, 'data.tasks=["colour"]']
    recipe, folder, _ = go(given)
    answer = Ask(recipe, folder.path).answer("federated", [("user", "the green bird sings " * 400)], 8, told=lambda text: None)
    assert {part.split(" (")[0] for part in answer.split(", ")} == {"red", "green", "blue"}


@pytest.mark.parametrize("listed", [0, 16])
def test_asked_as_a_task_it_answers_as_the_score_does(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, listed: int
) -> None:
    """The likeliest label and its share, of base and federated model, are those that test rows were scored by."""
    given = [*tiny_overrides, f"data.list_labels={listed}", "evaluation.baselines=[]"]
    recipe, folder, _ = go(given)
    models, prepared = Ask(recipe, folder.path), prepare(recipe)
    rows = [r for r in prepared.sites.all("test") if r.task == "colour"]
    scored = score(models.model, formatter_of(models.model, prepared), rows, recipe.evaluation)
    for one in scored:
        assert one.distribution is not None
        said = models.answer_as("federated", "colour", one.record.input, 8, told=lambda text: None)
        assert said.startswith(f"{one.prediction} ({max(one.distribution):.0%}), ")
    free = next(r for r in prepared.sites.all("test") if r.task == "echo")
    asked = models.answer_as("federated", "echo", free.input, 8, told=lambda text: None)
    assert asked == models.answer("federated", [("user", f"{free.instruction}\n{free.input}")], 8, told=lambda text: None)
    with pytest.raises(FedKeelError, match="among those that this run learnt: colour, echo"):
        models.answer_as("base", "color", "the red cat", 8)
    monkeypatch.setattr("sys.argv", ["fedkeel", "ask", str(folder.path), rows[0].input, "--task", "colour"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert models.answer_as("base", "colour", rows[0].input, 8, told=lambda text: None) in capsys.readouterr().out
