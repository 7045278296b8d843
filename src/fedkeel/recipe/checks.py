"""What keys of a recipe demand of each other."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

from fedkeel import tables
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import ConfigError, toml_value

ORDERS = ("task_orders", "streams")  # where data.tasks_file keeps orders of tasks: name -> tasks


def _orders(path: Path) -> dict[str, list[str]]:
    """The orders of tasks that `path` names. Raises ConfigError naming the file, and the order where one is malformed."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} (data.tasks_file, for stream.order) cannot be read: {error}; set data.root to the folder that holds it, "
            f"or write stream.stages out"
        ) from error
    found: dict[str, list[str]] = {}
    for key in ORDERS:
        named = about.get(key, {}) if isinstance(about, dict) else {}
        if not isinstance(named, dict):
            raise ConfigError(f"{path}: under {key!r} belongs an object that holds, by name, a list of tasks")
        for name, tasks in named.items():
            if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
                raise ConfigError(f"{path}: {key}.{name} is not a list of tasks")
            if name in found:
                raise ConfigError(f"{path} names the order {name!r} twice, under each of {' and '.join(ORDERS)}")
            found[name] = tasks
    return found


def with_order(recipe: Recipe) -> Recipe:
    """The recipe with stream.order written out as stream.stages, as it is again when such a recipe is read back.

    Raises ConfigError if there is no such order, nothing of it is among data.tasks, or stream.stages says something else.
    """
    stream, data = recipe.stream, recipe.data
    if not stream.order:
        if stream.tasks_a_stage != 1:
            raise ConfigError(
                f"stream.tasks_a_stage = {stream.tasks_a_stage} groups the tasks of stream.order, which is not set"
            )
        return recipe
    if not data.tasks_file:
        raise ConfigError(
            f"stream.order = {stream.order!r} is looked up in data.tasks_file, which is not set: name it, or write "
            f"stream.stages out"
        )
    path = Path(data.root) / data.tasks_file
    orders = _orders(path)
    if stream.order not in orders:
        near = difflib.get_close_matches(stream.order, orders, 1)
        known = f"known: {', '.join(orders)}" if orders else f"it has none, under any of {', '.join(ORDERS)}"
        raise ConfigError(
            f"stream.order = {stream.order!r} is not in {path}; " + (f"did you mean {near[0]!r}? " if near else "") + known
        )
    tasks = [task for task in orders[stream.order] if not data.tasks or task in data.tasks]
    if not tasks:
        raise ConfigError(f"stream.order = {stream.order!r} of {path} has none of data.tasks = {list(data.tasks)}")
    size = stream.tasks_a_stage
    stages = tuple(" + ".join(tasks[at : at + size]) for at in range(0, len(tasks), size))
    if stream.stages and stream.stages != stages:
        raise ConfigError(
            f"stream.order = {stream.order!r}, stream.tasks_a_stage = {size} means stages {list(stages)}, and stream.stages is "
            f"{list(stream.stages)}: set one of stream.order and stream.stages, and the other to nothing"
        )
    return dataclasses.replace(recipe, stream=dataclasses.replace(stream, stages=stages))


_LACKS = {
    "root": "data.root is not set: name the folder that holds the data, as in data.root=/path/to/data",
    "files": "data.files is empty: list the JSON Lines files, relative to data.root",
    "dataset": "data.dataset is not set: name a Hugging Face data set id or a local folder",
}


def check_data(recipe: Recipe) -> None:
    """Raise ConfigError unless what the source needs is named, and its files are there."""
    data = recipe.data
    source = tables.SOURCES[data.source]
    for key in source.needs:
        if not getattr(data, key):
            raise ConfigError(_LACKS.get(key, f"data.{key} is not set, and data.source = {data.source!r} needs it"))
    for name in (*data.files, *([data.tasks_file] if data.tasks_file else [])) if source.files else ():
        pattern = any(c in name for c in "*?[")  # whether a file fits is seen when the rows are read
        if not pattern and not os.path.isfile(Path(data.root) / name):  # Path.is_file raises for a name that is too long
            raise ConfigError(f"data file not found: {Path(data.root) / name} (data.root = {data.root!r})")


def cross_check(recipe: Recipe) -> None:
    """Raise ConfigError where keys cannot go together."""
    train = recipe.train
    if (train.local_steps > 0) == (train.local_epochs > 0):
        raise ConfigError(
            f"train.local_steps = {train.local_steps} and train.local_epochs = {train.local_epochs}: set exactly one above 0, "
            f"and the other to 0"
        )
    if train.micro_batch_size > train.batch_size:
        raise ConfigError(f"train.micro_batch_size = {train.micro_batch_size} is over train.batch_size = {train.batch_size}")
    distill, structure = recipe.distill, recipe.structure
    if structure.mode == "anchored" and not distill.weight:
        raise ConfigError(
            "structure.mode = 'anchored' takes its consistency from the distillation term: set distill.weight above 0, or "
            "structure.mode = 'implicit'"
        )
    if structure.mode == "self" and not structure.amounts:
        raise ConfigError(
            "structure.mode = 'self' compares a disturbed pass with a clean one, and no structure is asked for: set one above 0"
        )
    if train.sam and any(tables.STRUCTURES[name].learns for name in structure.amounts):
        raise ConfigError(
            "train.sam and structure.adversary both ascend before a step, and the adversary would mix the gradients of two "
            "points: set one of them to 0"
        )
    if recipe.exit.weight and recipe.model.feature_depths and recipe.model.head == "analytic":
        raise ConfigError(
            "exit.weight and model.feature_depths under model.head = 'analytic': an early exit has no states of the depths "
            "above it; set one of the two to nothing"
        )
    if distill.weight and distill.align == "cka" and 0 < train.micro_batch_size < train.batch_size:
        raise ConfigError(
            "distill.align = 'cka' compares the positions of a whole batch, so train.micro_batch_size would change what is "
            "minimised: set it to 0, or distill.align = 'cosine'"
        )
    _check_terms(recipe)
    _check_stream(recipe)
    _check_exchange(recipe)
    _check_privacy(recipe)
    _check_masks(recipe)
    _check_anchor(recipe)
    if recipe.privacy.unit == "row":
        _check_row_privacy(recipe)
    if recipe.privacy.unit == "site":
        _check_quantile(recipe)
    if not recipe.name or recipe.name != Path(recipe.name).name or recipe.name.startswith("."):
        raise ConfigError(f"name = {recipe.name!r}: a plain folder name belongs here")


def _check_terms(recipe: Recipe) -> None:
    for entry in tables.TERMS.values():
        if entry.asks is None or not recipe.takes(entry):
            continue
        key, value = entry.asks
        if attrgetter(key)(recipe) != value:
            raise ConfigError(
                f"{entry.switch} has no meaning without {key} = {toml_value(value)}: set that, or leave {entry.switch} at 0"
            )


def _check_stream(recipe: Recipe) -> None:
    if recipe.stream.replay and not recipe.stream.stages:
        raise ConfigError(
            f"stream.replay = {recipe.stream.replay} keeps rows of earlier stages, and there is one stage: set "
            f"stream.stages or stream.order, or stream.replay = 0"
        )
    if recipe.stream.slices:
        _check_slices(recipe)


def _check_slices(recipe: Recipe) -> None:
    """What a stage leaves alone must stay as it was, from the first round to the last."""
    stages, rule = len(recipe.stream.stages), tables.RULES[recipe.federation.rule]
    if not stages:
        raise ConfigError("stream.slices = true deals ranks to stages, and there is one: set stream.stages or stream.order")
    wrong = {
        f"lora.rank = {recipe.lora.rank} for {stages} stages (at least one each)": stages > recipe.lora.rank,
        "lora.site_ranks": not recipe.lora.one_rank,
        f"federation.rule = {rule.name!r} ({_rules(_holds_ranks)} go)": not _holds_ranks(rule),
        f"train.weight_decay = {recipe.train.weight_decay:g}, which shrinks all": recipe.train.weight_decay,
        f"federation.optimiser = {recipe.federation.optimiser!r}": recipe.federation.optimiser != "average",
        f"privacy.unit = {recipe.privacy.unit!r}, whose noise moves all": recipe.privacy.unit != "none",
    }
    found = _those(wrong)
    if found:
        raise ConfigError(
            f"stream.slices = true trains a share of the ranks in each stage; it does not go with {', '.join(found)}"
        )


def _check_privacy(recipe: Recipe) -> None:
    privacy, federation, distill = recipe.privacy, recipe.federation, recipe.distill
    rule = tables.RULES[federation.rule]
    if privacy.unit == "none":
        if privacy.noise or privacy.epsilon or privacy.quantile:
            raise ConfigError(
                "privacy.noise and privacy.epsilon need privacy.unit = 'site' or 'row', and privacy.quantile 'site'"
            )
        return
    if not privacy.noise:
        raise ConfigError(
            f"privacy.unit = {privacy.unit!r} without noise promises nothing: set privacy.noise; --dry-run says what ε asks"
        )
    if federation.weighting != "uniform":
        raise ConfigError(
            f"privacy.unit = {privacy.unit!r}: under federation.weighting = {federation.weighting!r} a site's weight "
            f"tells of its rows; set 'uniform'"
        )
    if distill.weight and (distill.task_trust or distill.site_trust):
        raise ConfigError(
            f"privacy.unit = {privacy.unit!r}: distill.task_trust and site_trust send counts of a site's rows; set both "
            f"to false"
        )
    if privacy.summed:
        _check_summed(recipe)
    if privacy.noise_at == "coordinator" and privacy.together > 1:
        raise ConfigError("privacy.together counts sites that add noise; with noise_at = 'coordinator' none does: set 1")
    if rule.personal:
        raise ConfigError(
            f"privacy.unit = {privacy.unit!r}: federation.rule = {rule.name!r} keeps a factor at each site, without noise; "
            f"choose another rule"
        )


def _check_summed(recipe: Recipe) -> None:
    """Noise that is whole in a sum alone hides a site whose part of that sum is no longer than the bound."""
    privacy, federation = recipe.privacy, recipe.federation
    wrong = {
        f"federation.rule = {federation.rule!r} is no sum ({_rules(lambda r: r.sums)} are)": not tables.RULES[
            federation.rule
        ].sums,
        "structure.hold = true: what few sites train is divided by those few": recipe.structure.hold,
        f"federation.codec_up = {federation.codec_up!r} rounds behind the bound, and what it leaves out comes later beside it "
        f"('fp32' does not)": federation.codec_up != "fp32",
    }
    found = _those(wrong)
    if found:
        raise ConfigError(
            f"privacy.noise_at = {privacy.noise_at!r}, together = {privacy.together}: noise hides a site in a sum of parts "
            f"that are no longer than privacy.clip, and {'; '.join(found)}. Change that, or set noise_at = 'sites' and "
            f"together = 1"
        )


def _check_quantile(recipe: Recipe) -> None:
    privacy = recipe.privacy
    if privacy.quantile == 1:
        raise ConfigError("privacy.quantile = 1: no bound is ever too long, and C would grow without end; set a share below 1")
    if privacy.quantile and privacy.count_noise and privacy.count_noise <= privacy.noise / 2:
        raise ConfigError(
            f"privacy.count_noise = {privacy.count_noise:g}: the count alone would tell more than privacy.noise = "
            f"{privacy.noise:g} allows of a round; set it above half of that, or 0"
        )
    if not privacy.quantile and privacy.count_noise:
        raise ConfigError("privacy.count_noise is of the count that privacy.quantile asks for, and that is 0")


def _check_masks(recipe: Recipe) -> None:
    """Under masks the coordinator has the sum of the changes, in whole numbers, and nothing of one site."""
    federation, distill, privacy = recipe.federation, recipe.distill, recipe.privacy
    if not privacy.masks:
        return
    rule = tables.RULES[federation.rule]
    asked = anchor_asked(recipe)
    added = ("fp32", *(name for name, codec in tables.CODECS.items() if codec.bits))
    wrong = {
        f"federation.rule = {rule.name!r}": not rule.sums or len(rule.trains) > 1,
        f"federation.weighting = {federation.weighting!r}": federation.weighting != "uniform",
        f"federation.codec_up = {federation.codec_up!r}": federation.codec_up not in added,
        f"federation.max_update_norm = {federation.max_update_norm:g}": math.isfinite(federation.max_update_norm),
        "lora.site_ranks": not recipe.lora.one_rank,
        "structure.hold": recipe.structure.hold,
        "privacy.noise_at = 'coordinator'": privacy.noise_at == "coordinator",
        "distill.task_trust, site_trust": distill.weight and (distill.task_trust or distill.site_trust),
        "distill.align with layer_trust": distill.weight and distill.align != "off" and distill.layer_trust,
        ", ".join(asked): asked,
        "evaluation.baselines = analytic": "analytic" in recipe.evaluation.baselines,
    }
    if find_spec("cryptography") is None:
        raise ConfigError("privacy.masks goes through `cryptography`: pip install 'fedkeel[privacy]'")
    found = _those(wrong)
    if found:
        raise ConfigError(
            f"privacy.masks shows the coordinator the sum of the sites' changes alone, and {', '.join(found)} would need more: "
            f"federation.rule = 'mean' or 'freeze_a', weighting = 'uniform' and codec_up of {', '.join(added)} go with it, "
            f"and what is not among these has to be left out"
        )


def anchor_asked(recipe: Recipe) -> list[str]:
    """What of a recipe asks for the analytic anchor in the federation itself, each as `key = value`."""
    evidence = recipe.evidence
    asked = [
        f"evidence.{key} = {getattr(evidence, key):g}" for key in ("anchor", "prototype", "serve") if getattr(evidence, key)
    ]
    asked += [f"evidence.serve_from = {list(evidence.serve_from)}"] if evidence.serve_from else []
    return asked + (["model.head = 'analytic'"] if recipe.model.head == "analytic" else [])


def _check_anchor(recipe: Recipe) -> None:
    """The anchor is made of sums over rows, through a base that stays as it is."""
    rule, own = tables.RULES[recipe.federation.rule], anchor_asked(recipe)
    _check_choice(recipe)
    asked = own + (["evaluation.baselines = analytic"] if "analytic" in recipe.evaluation.baselines else [])
    if recipe.model.feature_depths and not asked:
        raise ConfigError(
            f"model.feature_depths = {list(recipe.model.feature_depths)} says where the analytic anchor looks, and nothing "
            f"asks for it: set evidence.anchor, prototype, serve or serve_from, model.head = 'analytic', or the baseline "
            f"`analytic`"
        )
    if recipe.evidence.prototype and not recipe.model.feature_depths and recipe.model.head != "analytic":
        raise ConfigError(
            f"evidence.prototype = {recipe.evidence.prototype:g} compares an encoder's states of one depth: set "
            f"model.feature_depths = [1.0], or model.head = 'analytic'"
        )
    if asked and recipe.privacy.unit != "none":
        raise ConfigError(
            f"{', '.join(asked)}: sites send sums over their rows, without noise, which privacy.unit = {recipe.privacy.unit!r} "
            f"keeps at the sites; leave it out"
        )
    if own and rule.shifts:
        raise ConfigError(
            f"{', '.join(asked)}: the anchor looks through the frozen base, which federation.rule = {rule.name!r} moves; set a "
            f"rule such as 'mean'"
        )


def _check_choice(recipe: Recipe) -> None:
    """A weight to serve is one thing, or the other."""
    evidence, stream = recipe.evidence, recipe.stream
    if stream.average_from and stream.average:
        raise ConfigError(
            f"stream.average_from = {list(stream.average_from)} beside stream.average = {stream.average:g}: one of the two "
            f"says what is served; leave one out"
        )
    if stream.average_from and not stream.stages and not stream.order:
        raise ConfigError(
            f"stream.average_from = {list(stream.average_from)} averages over stages, and there is one: set stream.stages or "
            f"stream.order, or leave it out"
        )
    if evidence.serve_from and evidence.serve:
        raise ConfigError(
            f"evidence.serve_from = {list(evidence.serve_from)} beside evidence.serve = {evidence.serve:g}: one of the two "
            f"says what is served; leave one out"
        )


def _check_row_privacy(recipe: Recipe) -> None:
    """A row's gradient must be a function of that row, and of nothing else that is private."""
    privacy, structure = recipe.privacy, recipe.structure
    if privacy.noise_at != "sites" or privacy.together > 1:
        raise ConfigError(
            "privacy.unit = 'row': the noise is in each step, at the sites; set noise_at = 'sites' and together = 1"
        )
    if privacy.quantile or privacy.count_noise:
        raise ConfigError(
            "privacy.unit = 'row': privacy.quantile moves the bound of a site's change; a row's gradient has a fixed one: set "
            "quantile and count_noise to 0"
        )
    wrong = {
        "evidence.task": recipe.evidence.task != "plain",  # which labels a site holds
        "distill.align": recipe.distill.weight and recipe.distill.align == "cka",  # of a whole batch
        "train.sam": recipe.train.sam,
        "train.proximal": recipe.train.proximal,  # no function of a row, and would be clipped with it
        "structure.*": structure.amounts,
        "stream.replay": recipe.stream.replay,  # rows of an earlier stage are drawn again
    }
    found = _those(wrong)
    if found:
        raise ConfigError(
            f"privacy.unit = 'row' takes each row's gradient by itself, which {', '.join(found)} would couple to other rows or "
            f"spend twice; leave it out"
        )


def _holds_ranks(rule: tables.Rule) -> bool:
    """Whether a rank of both factors is the same from round to round, on a base that stays."""
    return rule.keeps_basis and rule.trains == ("ab",) and not rule.shifts and not rule.personal


def _those(wrong: Mapping[str, object]) -> list[str]:
    """What is so, of what would be wrong."""
    return [what for what, so in wrong.items() if so]


def _rules(having: Callable[[tables.Rule], bool]) -> str:
    return ", ".join(name for name, rule in tables.RULES.items() if having(rule))


def _check_exchange(recipe: Recipe) -> None:
    """What a rule cannot do is an error before the first round, not in the seventh."""
    federation, stream, lora = recipe.federation, recipe.stream, recipe.lora
    rule, name = tables.RULES[federation.rule], federation.rule
    steady = rule.keeps_basis and lora.one_rank
    if rule.shifts and (stream.averages or (recipe.distill.weight and recipe.distill.memory)):
        raise ConfigError(
            f"federation.rule = {name!r} moves the base itself, so what was served before is no adapter of today's base: set "
            f"stream.average = 0, stream.average_from = [] and distill.memory = 0, or a rule such as 'mean'"
        )
    if federation.keep == "best" and (rule.shifts or rule.personal):
        raise ConfigError(
            f"federation.keep = 'best' goes back to the adapter of an earlier round, and federation.rule = {name!r} "
            f"{'moves the base' if rule.shifts else 'leaves a factor at each site'}, which does not go back with it: set 'last'"
        )
    if stream.averages and not steady:
        key = "average_from" if stream.average_from else "average"
        raise ConfigError(
            f"stream.{key} averages factors of several rounds, and rule {name!r} finds them anew each round, in another basis: "
            f"leave it out, or use rule 'mean', 'freeze_a' or 'krum' with one rank for all sites"
        )
    if (federation.optimiser != "average" or federation.server_lr != 1.0) and not steady:
        raise ConfigError(
            f"federation.optimiser = {federation.optimiser!r}, server_lr = {federation.server_lr:g}: rule {name!r} finds its "
            f"factors anew each round, so their difference is no step to carry on; set 'average' and 1, or one of the rules "
            f"{_rules(lambda r: r.keeps_basis)}"
        )
    if rule.personal and (stream.stages or recipe.distill.weight):
        raise ConfigError(
            f"federation.rule = {name!r} leaves a factor at each site, so there is no one global model to learn from or to "
            f"follow over stages: set distill.weight = 0 and no stream, or another rule"
        )
    if lora.site_ranks and max(lora.site_ranks) > lora.rank:
        raise ConfigError(f"lora.site_ranks = {list(lora.site_ranks)}: none may be over lora.rank = {lora.rank}")
    if not rule.mixed and not lora.one_rank:
        raise ConfigError(
            f"lora.site_ranks = {list(lora.site_ranks)}: federation.rule = {name!r} averages factors, which must be of one "
            f"rank and scale; rules that take several: {_rules(lambda r: r.mixed)}"
        )
    if federation.hostile and not rule.withstands:
        told = " and ".join(repr(n) for n, r in tables.RULES.items() if r.withstands)
        raise ConfigError(
            f"federation.hostile = {federation.hostile} is not read by rule {name!r}, but by {told}: leave it at 0"
        )
    _check_held(recipe, rule)


def _check_held(recipe: Recipe, rule: tables.Rule) -> None:
    structure = recipe.structure
    if structure.hold and not any(map(structure.amount, tables.HELD)):
        raise ConfigError(
            "structure.hold = true holds what structure.branch and structure.skip draw: set structure.branch above 0, or skip"
        )
    if structure.hold and not rule.apart:
        raise ConfigError(
            f"structure.hold = true leaves modules out of a round; federation.rule = {rule.name!r} needs them all"
        )
    if structure.hold and structure.mode in ("self", "rdrop") and not structure.amounts.keys() - set(tables.HELD):
        raise ConfigError(
            f"structure.mode = {structure.mode!r} compares two draws, and what is held for a round is drawn once: set another "
            f"structure above 0, or structure.mode = 'implicit'"
        )


def check_one_model(recipe: Recipe, adapters: Path) -> None:
    """Raise ConfigError where a federation ends in no one model that could be loaded. adapters: the folder that they are in."""
    if tables.RULES[recipe.federation.rule].personal:
        raise ConfigError(
            f"federation.rule = {recipe.federation.rule!r} leaves one adapter a site, in {adapters}/SITE; there is no one "
            f"model to load"
        )


def check_deployed(recipe: Recipe, count: int) -> None:
    """Raise ConfigError for what a deployment does not run, as its sites hold their own rows. count: of sites; 0: not known."""
    evaluation, attack = recipe.evaluation, recipe.attack.kind
    if evaluation.unseen_sites:
        raise ConfigError(
            f"evaluation.unseen_sites = {evaluation.unseen_sites} keeps sites apart from all training, and in a deployment "
            f"every site takes part: set it to 0, and leave those out of --sites that do not"
        )
    if attack != "none":
        raise ConfigError(
            f"attack.kind = {attack!r}: harm is simulated in one process alone, never in a deployment: leave it out"
        )
    if recipe.audit.canaries and not recipe.audit.site:
        raise ConfigError("audit.site: no site of a deployment knows who else is there: name the one that plants the secrets")
    if count:
        check_enough(recipe, count)


def check_enough(recipe: Recipe, count: int, where: str = "") -> None:
    """Raise ConfigError where `count` sites are fewer than the recipe's rule, or its privacy, needs in a round. where: which
    rounds these are, in words."""
    federation, rule, privacy = recipe.federation, tables.RULES[recipe.federation.rule], recipe.privacy
    asked, least = min(federation.sites_per_round or count, count), rule.least(federation.hostile)
    if asked < least:
        raise ConfigError(
            f"federation.rule = {rule.name!r} with federation.hostile = {federation.hostile} needs at least {least} sites in a "
            f"round, and {asked} of {count} are asked{where}: more sites, a larger federation.sites_per_round or another rule"
        )
    answers = math.ceil(federation.quorum * asked - 1e-9)
    if privacy.unit != "none" and privacy.together > answers:
        raise ConfigError(
            f"privacy.together = {privacy.together}: by federation.quorum = {federation.quorum:g} a round may go on with "
            f"{answers} of {asked} sites{where}, whose noise would not add up; set it to {answers} or less"
        )
