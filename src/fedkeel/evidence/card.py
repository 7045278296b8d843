"""The model card of what a run exports: how to load it, how it was made, what it scored and what protected the sites.

Its head is what the Hugging Face Hub reads (huggingface_hub's ModelCardData), so that the folder can be uploaded as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fedkeel import tables
from fedkeel.evidence.report import method_table, read_rows, read_scores, summary, sure_table
from fedkeel.evidence.report.privacy import HIDDEN
from fedkeel.evidence.report.tables import escape, site_names
from fedkeel.recipe.checks import anchor_asked
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.state import Best
from fedkeel.types import Row

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TASKS = {
    "causal": "text-generation",
    "seq2seq": "text2text-generation",
    "classifier": "text-classification",
}  # the hub's words
_SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank


@dataclass(frozen=True)
class Made:
    """What stands in the folder of a card. kind: of the model, `causal`, `seq2seq` or `classifier`. rank: of the adapter. left:
    which of its blocks are, in words, where some are not; an adapter then stands upon the base in `base`. best: it is the best
    of the last stage by validation rows, and not what the run's scores are of. classes: of a linear head, which the adapter
    holds; 0: it has none."""

    kind: str
    rank: int
    merged: bool
    gguf: bool
    left: str = ""
    best: bool = False
    classes: int = 0


def base_is_away(recipe: Recipe, run: Path) -> bool:
    """Whether a deployment's run names a base that is a folder at its sites and not here, and no id of a hub."""
    base, away = recipe.model.base, bool(RunFolder(run).state().reference)
    return away and base not in tables.BASES and "/" not in base and not Path(base).exists()


def hub_id(base: str) -> str:
    """The hub's id of a recipe's base, as far as that is known; else nothing."""
    if base in tables.BASES:
        return tables.BASES[base].hub
    return base if _HUB_ID.fullmatch(base) and not Path(base).exists() else ""


def card(recipe: Recipe, run: Path, made: Made) -> str:
    """The card's text, in Markdown with a head in YAML. run: a finished run's folder."""
    rows = read_rows(run / "rows.jsonl")
    state = RunFolder(run).state()
    environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
    scores = read_scores(run)
    names = {site for _, site in scores if site} | set(site_names(rows))
    sites = {name: f"site {k}" for k, name in enumerate(sorted(names), 1)}  # no names of theirs
    rows = [replace(r, site=sites.get(r.site, r.site)) for r in rows]
    sure = sure_table({(leg, sites.get(site, "")): found for (leg, site), found in scores.items()})
    parts = [
        f"---\n{_head(recipe, rows, made)}\n---\n",
        f"# {escape(recipe.name)}\n",
        _HARMED.format(kind=recipe.attack.kind) if recipe.attack.kind != "none" else "",
        f"{_what(recipe, made)} {_WITH_HEAD if recipe.evidence.served else ''}{escape(summary(rows))}\n",
        f"## To use it\n\n{_use(recipe, made)}",
        _best(state.best) if made.best else "",
        f"## How it was made\n\n{_settings(recipe, rows, environment)}",
        method_table(rows).markdown(),
        _BESIDE.format(serve=_served(recipe)) if recipe.evidence.served else "",
        _BY_HEAD if recipe.model.head == "analytic" else "",
        sure.markdown() if sure.lines else "",
        f"## Privacy\n\n{_privacy(recipe, rows)}\n",
        f"## Limits\n\n{_LIMITS}\n",
    ]
    return "\n".join(part for part in parts if part)


def _best(best: Best | None) -> str:
    where = f" of round {best.round} ({100 * best.score:.1f} points there)" if best else ""
    return (
        f"**This is the adapter{where} that did best on validation rows of the last stage.** The scores below are those\n"
        f"of the adapter that the run ended in.\n"
    )


_WITH_HEAD = "**With an analytic head beside it, which is not in this folder**: "
_BESIDE = """\
**The scores of the federated model are those of its adapter with an analytic head served beside it** (`evidence.{serve}`):
a ridge classifier on features of the frozen base, which lies in the run and not in this folder. `fedkeel ask` and
`fedkeel evaluate` on the run use it; PEFT, transformers, vLLM and llama.cpp serve the adapter alone, whose scores are others.
"""
_HARMED = """\
**This model comes out of a simulation of harm** (`attack.kind = "{kind}"`): some of its sites were made to do it. Serve it
to nobody.
"""
_BY_HEAD = """\
**Classes are scored by `label_heads.safetensors`**, a ridge classifier a task of sums over all sites' rows, upon this adapter's
states: without that file they mean nothing. `depths` in `fedkeel_classes.json` says at which shares of the
depth the states are.
"""


def _served(recipe: Recipe) -> str:
    choice = ", ".join(f"{weight:g}" for weight in recipe.evidence.serve_from)
    return f"serve_from =\n[{choice}]" if choice else f"serve =\n{recipe.evidence.serve:g}"


_NOT_PRIVATE = """\
The sites' rows did not leave them: the coordinator received {received}. **No
differential privacy{masks}** {used} used, so there is no bound on what this model tells of a single row or
site, and it may repeat rare texts of its training rows. Look at what it says before you give it to others."""
_PRIVATE = """\
The sites' rows did not leave them: the coordinator received {received}. {promise}

The promise is for one such unit at a time, and of this model's training alone, not of scores that somebody measured beside it.
A large ε promises little: look at what the model says before you give it to others."""


def _privacy(recipe: Recipe, rows: Sequence[Row]) -> str:
    """What a run promises of whose presence its model hides, in one line, with the ε that it really spent."""
    privacy = recipe.privacy
    received = "sums of the sites' updates of the adapter, by secure aggregation" if privacy.masks else "updates of the adapter"
    if anchor_asked(recipe) or "analytic" in recipe.evaluation.baselines:
        received += ", sums of the rows' features in the frozen base by label (of a label with one row, that row's own)"
    if privacy.unit == "none":
        if privacy.masks:
            return _NOT_PRIVATE.format(received=received, masks="", used="was")
        more = f"{received} and statistics of training"
        return _NOT_PRIVATE.format(received=more, masks=" and no secure aggregation", used="were")
    spent = [r.value for r in rows if r.name == "epsilon" and r.method == "federated"]
    unit = HIDDEN[privacy.unit]
    where = "at each site, in every step" if privacy.unit == "row" else f"by the {privacy.noise_at}"
    if privacy.noise_at == "coordinator":
        where = "by the coordinator"
    elif privacy.unit == "site" and privacy.together > 1:
        where += f", of {privacy.together} of them together"
    told = f"ε = {max(spent):.3g}" if spent else "ε unknown, as no round tells it,"
    bound, moved = f"C = {privacy.clip:g}", [r.value for r in rows if r.name == "clip" and r.method == "federated"]
    if moved:
        bound = f"C, which followed the {privacy.quantile:g} quantile of their lengths from {moved[0]:.3g} to {moved[-1]:.3g},"
    return _PRIVATE.format(
        received=received,
        promise=f"**Differential privacy** of {unit}: {told} at δ = {privacy.delta:g}, by clipping to {bound} and "
        f"Gaussian noise of z = {privacy.noise:g} times C, added {where}.",
    )


_LIMITS = """\
The scores are of this run's test rows, which come from the sites that trained; nothing is said of other tasks, languages or
uses. What the base model gets wrong it may still get wrong."""


def _named(recipe: Recipe) -> str:
    """The base, without a path of the machine it lies on."""
    base = recipe.model.base
    return base if base in tables.BASES else hub_id(base) or Path(base).name


def _head(recipe: Recipe, rows: Sequence[Row], made: Made) -> str:
    known = tables.BASES.get(recipe.model.base)
    base = hub_id(recipe.model.base)
    about: dict[str, Any] = (
        {"base_model": base, "base_model_relation": "finetune" if made.merged else "adapter"} if base else {}
    )
    if not made.gguf:
        about["library_name"] = "transformers" if made.merged else "peft"
    if known:
        about["license"] = known.licence.lower()
    results = [] if made.best or made.left or recipe.evidence.served else _results(rows, _TASKS[made.kind])
    if results:
        about |= {"model_name": recipe.name, "eval_results": results}
    tags = ["fedkeel", "federated-learning", *([] if made.merged else ["lora"]), *(["gguf"] if made.gguf else [])]
    return ModelCardData(pipeline_tag=_TASKS[made.kind], tags=tags, **about).to_yaml()


def _results(rows: Sequence[Row], task: str) -> list[EvalResult]:
    """The served model's measures of each task's test rows, those of the last time it was scored."""
    last = {(r.task, r.name): r.value for r in rows if r.method == "federated" and r.split == "test" and r.task}
    return [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^\w.-]+", "-", of) or "rows",
            dataset_name=of,
            dataset_split="test",
            metric_type=name,
            metric_name=tables.METRICS[name].title,
            metric_value=round(value, 4),
        )
        for (of, name), value in sorted(last.items())
        if name in tables.METRICS
    ]


def _what(recipe: Recipe, made: Made) -> str:
    form = "as GGUF, for llama.cpp" if made.gguf else "in Hugging Face layout" if made.merged else "in PEFT's format"
    what = "The whole model, adapter merged in" if made.merged else "A LoRA adapter"
    beside = " Its base lies beside it, in `base`." if made.left and not made.merged else ""
    short = f" **{made.left[0].upper()}{made.left[1:]}**: the scores below are those of all.{beside}" if made.left else ""
    return f"{what}, {form}: `{escape(_named(recipe))}`, fine-tuned by a federation.{short}"


def _use(recipe: Recipe, made: Made) -> str:
    if made.gguf:
        return _use_gguf(made)
    base = "./base" if made.left else hub_id(recipe.model.base) or "BASE"
    where = " (it comes with fedkeel: `fedkeel.model.bases.folder_of`)" if recipe.model.base in tables.BASES else ""
    told = f"`BASE` is where `{escape(_named(recipe))}` lies on your machine{where}.\n\n"
    told = "" if base != "BASE" or made.merged else told
    head = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "classifier": "AutoModel"}[made.kind]
    head, given = ("AutoModelForSequenceClassification", f", num_labels={made.classes}") if made.classes else (head, "")
    if made.merged:
        python = f'model = transformers.{head}.from_pretrained(".")'
        served = "vllm serve . --served-model-name fedkeel"
    else:
        python = f'model = peft.PeftModel.from_pretrained(transformers.{head}.from_pretrained("{base}"{given}), ".")'
        rank = next((size for size in _SERVED_RANKS if size >= made.rank), made.rank)
        served = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules fedkeel=."
    imports = "transformers" if made.merged else "peft, transformers"
    shown = f"{told}```python\nimport {imports}\n\n{python}\n```\n"
    if made.kind == "classifier":
        return (
            f"{shown}\nIts classes are in `fedkeel_classes.json`, in the order of its scores; `fedkeel evaluate` uses them.\n"
        )
    return shown + (f"\n```\n{served}\n```\n" if made.kind == "causal" else "")


def _use_gguf(made: Made) -> str:
    if made.merged:
        return "```\nllama-cli -m model.gguf\nollama create fedkeel -f Modelfile\n```\n"
    return (
        "`base.gguf` is the base model as GGUF, of any quantisation.\n\n"
        "```\nllama-cli -m base.gguf --lora adapter.gguf\nollama create fedkeel -f Modelfile\n```\n"
    )


def _settings(recipe: Recipe, rows: Sequence[Row], environment: Mapping[str, Any]) -> str:
    federation, lora, train = recipe.federation, recipe.lora, recipe.train
    stages = recipe.stream.stages
    commit = environment.get("commit")
    length = f"{train.local_steps} steps" if train.local_steps else f"{train.local_epochs} epochs, steps"
    facts = {
        "base": _named(recipe),
        "sites": str(len(site_names(rows))),
        "rounds": f"{federation.rounds}" + (f" in each of {len(stages)} stages" if stages else ""),
        "a site's round": f"{length} of {train.batch_size} rows, learning rate {train.lr:g}",
        "adapter": f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}",
        "aggregation": f"{federation.rule}, codec {federation.codec_up} up and {federation.codec_down} down",
        "distillation guidance": f"weight {recipe.distill.weight:g}",
        "structure": ", ".join(f"{name} {amount:g}" for name, amount in recipe.structure.amounts.items() if amount) or "none",
        "tasks": ", ".join(sorted({r.task for r in rows if r.task})),
        "made with": f"FedKeel {environment['versions']['fedkeel']}" + (f", commit {commit}" if commit else ""),
    }
    lines = "".join(f"| {name} | {escape(value)} |\n" for name, value in facts.items() if value)
    return f"| | |\n| --- | --- |\n{lines}"
