"""Several compact sub-spaces, each trained as a supernet of its own, and one table of all their networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from lightning_nas.callbacks._lightning import callbacks_of, uncompiled
from lightning_nas.callbacks._networks import find_network
from lightning_nas.callbacks.instatune import InstaTune
from lightning_nas.callbacks.supernet_training import SupernetTraining
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from torch import nn

from lightning_nas.errors import NASError
from lightning_nas.objectives import Maximize, Minimize, Objective
from lightning_nas.results import Candidate, SearchResult
from lightning_nas.sampling import Sandwich
from lightning_nas.space import Architecture, Choice, SearchSpace, Value
from lightning_nas.supernet import Supernet

__all__ = ["Subspaces", "train_subspaces"]

_DEFAULTS: dict[str, Any] = {
    "monitor": "val_loss",
    "mode": "min",
    "costs": ("macs", "params"),
    "budget": 256,
    "students_learn_from": "task",
    "sampler": Sandwich(random=2),
    "warmup": 0,
    "order": None,
}


@dataclass(frozen=True, eq=False)
class Subspaces:
    """Sub-spaces that were trained, and what was measured in all of them.

    Args:
        supernets: by the name of their sub-space, each with weights of its own.
        result: the candidates of all, with the further choice ``"subspace"``. Its space is the smallest
            product that holds every sub-space; it holds more architectures than they do.
    """

    supernets: Mapping[str, Supernet]
    result: SearchResult

    def extract(self, candidate: Candidate | Architecture) -> nn.Module:
        """The plain network of a candidate, with the weights of its sub-space.

        Raises:
            KeyError: if it names no sub-space, or one that was not trained.
            ValueError: if it is not in its sub-space.
        """
        architecture = candidate.architecture if isinstance(candidate, Candidate) else candidate
        supernet = self.supernets[str(architecture["subspace"])]
        return supernet.extract({name: architecture[name] for name in supernet.space.names})


def train_subspaces(
    spaces: Mapping[str, SearchSpace | str],
    trainer: Callable[[str], Trainer],
    module: LightningModule,
    datamodule: LightningDataModule | None = None,
    *,
    folder: str | Path = "subspaces",
    ckpt_path: Literal["last"] | None = None,
    **settings: Any,  # those of InstaTune, which checks them
) -> Subspaces:
    """Train each sub-space as a supernet of its own, and measure the networks of all in one table.

    Fewer networks share one set of weights than in one large space, so they disturb each other less. For each
    sub-space a copy of the module is trained and then searched by :class:`InstaTune`. Unless told otherwise
    all members of a step learn from the module's own loss, ``training_step``, and networks are judged by the
    ``val_loss`` that it logs. With :class:`~lightning_nas.modules.RelationDistillation` as the module this is
    AutoDistil: one loss for all, no labels, and no network trained once more to be judged.

    Example:
        .. code-block:: python

            trained = train_subspaces(
                {"small": "autodistil-small", "tiny": "autodistil-tiny"},
                lambda name: Trainer(max_epochs=10, default_root_dir=name),
                RelationDistillation("bert-base-uncased"),
                texts,
            )
            best = trained.result.best("val_loss", where={"macs": ("<=", 2e9)})
            student = trained.extract(best)

    Args:
        spaces: the name of each sub-space and its space, or the name of a preset.
        trainer: makes a fresh Trainer for the sub-space of this name; all are made before the first is used.
        module: the user's; it stays as it is.
        datamodule: training and validation data; None: the module's own.
        folder: gets the joined result, and in a folder for each sub-space its study and result. A search that
            was killed continues where it stopped.
        ckpt_path: ``"last"`` continues runs that were killed from their last checkpoints, and only loads
            those that are complete. It needs Trainers with a ``ModelCheckpoint(dirpath=..., save_last=True)``
            and a folder each.
        **settings: of :class:`InstaTune`, in place of ``monitor="val_loss", mode="min", costs=("macs",
            "params"), budget=256, students_learn_from="task", sampler=Sandwich(random=2), warmup=0,
            order=None``. A budget that is at least the size of a sub-space measures all of its networks.

    Returns:
        The supernets and the joined result.

    Raises:
        TypeError: if ``trainer`` is not a function that makes Trainers.
        ValueError: before any training, all faults at once: no sub-space, one that does not fit the network
            or holds nothing, two that are the same, one without a choice in common with the others; and
            Trainers that are not fresh.

    Reference: Xu et al., AutoDistil, NeurIPS 2022; Zhao et al., Few-Shot NAS, ICML 2021.
    """
    network = find_network(module, settings.get("network"), "train_subspaces")
    assert network is not None  # may_be_missing is False
    fitted = _fitted(spaces, network)
    trainers = _made(trainer, fitted, ckpt_path)
    folder, settings = Path(folder), {**_DEFAULTS, **settings}
    searches = {
        name: InstaTune(space=space, folder=folder / name, **settings) for name, space in fitted.items()
    }
    results: dict[str, SearchResult] = {}
    supernets: dict[str, Supernet] = {}
    for i, (name, instatune) in enumerate(searches.items(), 1):
        rank_zero_info(f"train_subspaces: {name!r}, {i} of {len(fitted)}.")
        copied, one = uncompiled(copy.deepcopy(module)), trainers.pop(name)
        callbacks_of(one).insert(0, instatune)
        one.fit(copied, datamodule=datamodule, ckpt_path=ckpt_path)
        # Of a run that was complete already, fit has only loaded the weights.
        results[name] = instatune.result or instatune.search(one, copied, datamodule)
        assert instatune.supernet is not None  # made in fit
        supernets[name] = instatune.supernet
    result = joined(results)
    _report(result, folder, len(fitted))
    return Subspaces(supernets, result)


def joined(results: Mapping[str, SearchResult]) -> SearchResult:
    """One result of several, with the further choice ``"subspace"``: the name of the one it comes from.

    A choice that a sub-space does not have is inactive there and shows its largest value.
    """
    first = next(iter(results.values()))
    space = _union({name: result.space for name, result in results.items()})

    def labelled(name: str, architecture: Mapping[str, Value]) -> Architecture:
        values = {"subspace": name, **architecture}
        return Architecture({c.name: values.get(c.name, c.values[-1]) for c in space})

    def named(objective: Objective) -> Objective:  # a cost object counts in one supernet only
        kind = Maximize if isinstance(objective, Maximize) else Minimize
        return kind(objective.name, objective.unit)

    costs_first = sorted(first.objectives, key=lambda objective: isinstance(objective.quantity, str))
    return SearchResult(
        space,
        tuple(map(named, costs_first)),
        tuple(
            Candidate(labelled(n, c.architecture), c.values) for n, r in results.items() for c in r.candidates
        ),
        limits=first.limits,
        failed=tuple(
            replace(f, architecture=labelled(n, f.architecture)) for n, r in results.items() for f in r.failed
        ),
        duplicates=sum(result.duplicates for result in results.values()),
        rejected=sum(result.rejected for result in results.values()),
    )


def _union(spaces: Mapping[str, SearchSpace]) -> SearchSpace:
    choices = [Choice("subspace", tuple(spaces))]
    for name in dict.fromkeys(name for space in spaces.values() for name in space.names):
        owners = tuple(label for label, space in spaces.items() if name in space)
        values = {value for owner in owners for value in spaces[owner][name].values}
        when = () if len(owners) == len(spaces) else (("subspace", owners),)
        choices.append(Choice(name, tuple(sorted(values)), when))
    return SearchSpace(choices)


def _fitted(spaces: Mapping[str, SearchSpace | str], network: nn.Module) -> dict[str, SearchSpace]:
    """The sub-spaces as they fit the network; all faults in one message."""
    if not isinstance(spaces, Mapping) or not spaces:
        raise ValueError(
            "train_subspaces: spaces must name at least one sub-space, as {'tiny': 'autodistil-tiny'}, got "
            f"{spaces!r}."
        )
    faults: list[str] = []
    fitted: dict[str, SearchSpace] = {}
    for name, space in spaces.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            faults.append(f"{name!r} cannot be the name of a sub-space, which is a folder's too.")
        if not isinstance(space, SearchSpace | str) or not space:
            faults.append(
                f"{name!r} holds no architecture, got {space!r}; give a SearchSpace or a preset's name."
            )
            continue
        try:
            supernet = Supernet(network, space)
        except (ValueError, NASError) as error:
            faults.append(f"{name!r}: {error}")
            continue
        fitted[name] = supernet.space
        supernet.release()
    for one, other in combinations(fitted, 2):
        if set(fitted[one].choices) == set(fitted[other].choices):
            faults.append(f"{one!r} and {other!r} are the same sub-space; leave one out.")
    for name, space in fitted.items():
        others = {choice for other in fitted if other != name for choice in fitted[other].names}
        if len(fitted) > 1 and not others & set(space.names):
            faults.append(
                f"{name!r} has no choice in common with another sub-space: it decides about "
                f"{', '.join(space.names)}, they about {', '.join(sorted(others))}. Networks that share no "
                "choice make no table; name one of theirs, if need be with a single value."
            )
    if faults:
        raise ValueError(f"train_subspaces: {' '.join(faults)}")
    return fitted


def _made(
    trainer: Callable[[str], Trainer], spaces: Mapping[str, SearchSpace], ckpt_path: str | None
) -> dict[str, Trainer]:
    if isinstance(trainer, Trainer) or not callable(trainer):
        raise TypeError(
            "train_subspaces: each sub-space needs a fresh Trainer; give a function of its name, as "
            f"lambda name: Trainer(default_root_dir=name), got {trainer!r}."
        )
    made = {name: trainer(name) for name in spaces}
    for name, one in made.items():
        if not isinstance(one, Trainer):
            raise TypeError(f"train_subspaces: trainer({name!r}) must return a Trainer, got {one!r}.")
    faults = []
    if len({id(one) for one in made.values()}) < len(made) or any(one.global_step for one in made.values()):
        faults.append("trainer must make a fresh Trainer for each sub-space; one was used, or stands for two")
    if any(isinstance(c, SupernetTraining) for one in made.values() for c in callbacks_of(one)):
        faults.append("a Trainer has a SupernetTraining or InstaTune callback; leave it out")
    folders = [{getattr(c, "dirpath", None) for c in one.checkpoint_callbacks} for one in made.values()]
    own = set[Any]().union(*folders)
    are_apart = all(folders) and None not in own and len(own) == sum(map(len, folders))
    if ckpt_path is not None and not (ckpt_path == "last" and are_apart):
        faults.append(
            f"ckpt_path={ckpt_path!r}: it must be 'last', and each Trainer needs a ModelCheckpoint with "
            "save_last=True and a dirpath of its own, such as one named after the sub-space"
        )
    if faults:
        raise ValueError(f"train_subspaces: {'; and '.join(faults)}.")
    return made


@rank_zero_only
def _report(result: SearchResult, folder: Path, count: int) -> None:
    result.save(folder)
    rank_zero_info(
        f"train_subspaces: {len(result.candidates)} candidates of {count} sub-spaces, {len(result.front)} on "
        f"the front; written to {folder}.\n"
        "Next: take one of .result, a plain network, and fine-tune it:\n"
        "    student = trained.extract(trained.result.best(...))"
    )
